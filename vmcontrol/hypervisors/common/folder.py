"""A VM's folder, <slot>/vm/<name>, and the file in it that says what the VM is. No hypervisor is asked here.

The definition is replaced atomically. A folder that is deleted is renamed first: a crash leaves a VM or something to
sweep, never half a VM.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from vmcontrol.common import jsonfile
from vmcontrol.common.atomicfile import write_atomically
from vmcontrol.hypervisors.common import places
from vmcontrol.hypervisors.interface import HypervisorError

VM_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
"""What a VM may be called, for its folder has that name."""
DOOMED = ".deleting-"
"""Prefix of a VM folder whose deletion was not finished. No VM's name begins with a dot."""
_VERSION = 1


@dataclass(frozen=True, slots=True)
class FurtherDisk:
    """A read-only disk of a VM beside its own. path, id: as VmDefinition's image and image_id."""

    path: str
    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VmDefinition:
    """What a VM was made for. Drivers add what their hypervisor needs."""

    name: str
    image: str
    """Path; as that of the console log relative to the slot where it moves along with it (places.py)."""
    image_id: str = ""
    """What imageid said of the image when the VM was made from it; empty: an older version made it."""
    disks: tuple[FurtherDisk, ...] = ()
    mac: str
    agent_port: int
    console_log: str
    memory_mb: int
    network: bool
    network_connected: bool = True


D = TypeVar("D", bound=VmDefinition)


class VmFolder(Generic[D]):
    """The folder of one VM. D: the driver's definition."""

    def __init__(self, folder: Path, kind: type[D], definition_name: str, version_field: str) -> None:
        """version_field: the name under which the definition's file has its version."""
        self._kind = kind
        self.folder = folder
        self.slot = folder.parent.parent
        self.definition_file = folder / definition_name
        self._version_field = version_field

    def load(self) -> D | None:
        """None where there is none. Raises HypervisorError when it cannot be read."""
        try:
            value = jsonfile.load(self.definition_file)
            if not isinstance(value, dict) or value.get(self._version_field) != _VERSION:
                raise ValueError("another version of vmwrapper wrote it")
            found = jsonfile.typed(self._kind, places.carried_over(value))
            if found.name != self.folder.name:
                raise ValueError(f"it is of a VM {found.name!r:.120}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise HypervisorError(f"{self.definition_file}: {error}") from error
        return found

    def is_readable(self) -> bool:
        """Whether there is a definition that can be read, or none."""
        try:
            self.load()
        except HypervisorError:
            return False
        return True

    def store(self, definition: D) -> None:
        """Atomic. Readable for the owner alone. Raises OSError."""
        value = {self._version_field: _VERSION, **asdict(definition)}
        write_atomically(self.definition_file, json.dumps(value, indent=1).encode(), mode=0o600)

    def path(self, remembered: str) -> Path:
        """Where a path of the definition leads now."""
        return places.recall(remembered, self.slot)

    def remove(self) -> None:
        """Delete it. What `sweep` deletes at the same time, in another thread, is no error. Raises OSError."""
        if not self.folder.is_dir():
            return
        doomed = self.folder.with_name(f"{DOOMED}{self.folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        self.folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            if doomed.exists():
                shutil.rmtree(doomed)  # which says what the trouble is


class Record(Generic[D]):
    """The definition of a VM, the same in memory and on the disk."""

    def __init__(self, files: VmFolder[D], definition: D) -> None:
        self._files = files
        self.definition = definition

    def change(self, **changes: Any) -> None:
        """Set fields, stored when one of them differs. Raises OSError; nothing has changed then."""
        changed = replace(self.definition, **changes)
        if changed != self.definition:
            self._files.store(changed)
            self.definition = changed


def sweep(folder: Path) -> None:
    """Finish the deletions that a crash interrupted."""
    if folder.is_dir():
        for doomed in folder.glob(f"{DOOMED}*"):
            shutil.rmtree(doomed, ignore_errors=True)


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, that no other user can look into.

    A VM's files hold its memory, and in that the secret of the link. Raises FileExistsError.
    """
    for missing in [above for above in reversed(folder.parents) if not above.exists()]:
        missing.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700)
