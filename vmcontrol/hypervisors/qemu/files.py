"""The files of one QEMU VM, <slot>/vm/<name>/, and what follows from which of them are there. No QEMU is asked here.

| file | meaning |
| --- | --- |
| vm.json | the VM exists, and this is it; written last by create, replaced atomically |
| disk.qcow2 | overlay of the image, with the snapshots inside |
| running.json | pid and birth of its QEMU; still there without such a process: Aborted |
| saved.state.partial | a state being written; worthless |
| saved.state | RAM and devices of a saved VM, complete; fits the disk exactly as it is |
| saved.state.used | was resumed from: the disk has moved on, it must never be resumed from again |
| taken.json | it was there before the job that uses it now, in this state: its disk is never thrown away |

The order of operations makes every crash harmless; each method says its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from vmcontrol.common import birth, jsonfile
from vmcontrol.common.atomicfile import fsync_folder, write_atomically
from vmcontrol.common.birth import Birth
from vmcontrol.hypervisors.common import places
from vmcontrol.hypervisors.interface import HypervisorError
from vmcontrol.protocol.vm import PortForward, VmState

_FORMAT = 1
_STARTED = "started"
"""What running.json calls the time at which a process began."""


@dataclass(frozen=True, slots=True)
class Definition:
    """What vm.json says."""

    name: str
    image: str
    """Path; as all of them relative to the slot where it moves along with it (places.py)."""
    image_format: str
    memory_mb: int
    cpus: int
    mac: str
    agent_port: int
    secret_file: str | None
    console_log: str
    network: bool
    port_forwards: tuple[PortForward, ...] = ()
    network_connected: bool = True
    host_only: bool = False
    machine: str | None = None
    """QEMU's versioned machine type; None before the first start."""
    accelerator: str | None = None
    cpu: str | None = None
    """With these the VM ran last; a saved state or snapshot goes on with the same."""
    snapshot_hardware: Mapping[str, tuple[str, str]] | None = None
    """Tag of a snapshot with memory -> accelerator and cpu it was taken with."""
    current_snapshot: str | None = None
    """Tag in the overlay."""
    resume_snapshot: str | None = None
    """Tag of the snapshot that the next start loads: the VM is Saved."""
    unclean: bool = False
    """The disk is in the middle of something that nobody remembers."""
    image_id: str = ""
    """What imageid said of the image when the VM was made from it; empty: an older version made it."""

    def to_json(self) -> bytes:
        return json.dumps({"format": _FORMAT} | asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Definition:
        """Raises ValueError for anything that `to_json` cannot have written."""
        value = jsonfile.parse(text)
        if not isinstance(value, dict) or value.get("format") != _FORMAT:
            raise ValueError("not a definition of this version")
        return jsonfile.typed(cls, places.carried_over(value))


class VmFiles:
    """The folder of one VM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.definition_file = folder / "vm.json"
        self.overlay = folder / "disk.qcow2"
        self.running = folder / "running.json"
        self.partial = folder / "saved.state.partial"
        self.saved = folder / "saved.state"
        self.used = folder / "saved.state.used"
        self.taken = folder / "taken.json"
        self.slot = folder.parent.parent

    def exists(self) -> bool:
        return self.definition_file.is_file()

    def load(self) -> Definition:
        """Raises HypervisorError when vm.json cannot be read."""
        try:
            definition = Definition.from_json(jsonfile.read_file(self.definition_file))
        except (OSError, ValueError) as error:
            raise HypervisorError(f"{self.definition_file}: {error}") from error
        if definition.name != self.folder.name:
            raise HypervisorError(f"{self.definition_file}: it is of a VM {definition.name!r:.120}")
        return definition

    def store(self, definition: Definition) -> None:
        write_atomically(self.definition_file, definition.to_json(), mode=0o600)

    def state(self, definition: Definition) -> VmState:
        """Of a VM without a process."""
        if definition.resume_snapshot is not None or self.saved.exists():
            return VmState.SAVED
        return VmState.ABORTED if self.running.exists() else VmState.POWERED_OFF

    # A VM that was there before the job ----------------------------------------------------------------------------

    def write_taken(self, found: VmState) -> None:
        write_atomically(self.taken, json.dumps({"found": found.value}).encode(), mode=0o600)

    def found(self) -> VmState | None:
        """The state in which it was taken; None when it is not. What cannot be read counts as PoweredOff."""
        try:
            return VmState(jsonfile.load(self.taken)["found"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            return VmState.POWERED_OFF

    def give_back(self) -> None:
        self._remove(self.taken)

    # The process ----------------------------------------------------------------------------------------------------

    def write_running(self, pid: int, began: Birth) -> None:
        """`began`: so that a re-used pid is told apart."""
        value = {"pid": pid, **began.to_json(_STARTED)}
        write_atomically(self.running, json.dumps(value).encode(), mode=0o600)

    def stale_process(self) -> psutil.Process | None:
        """The QEMU that running.json names, if exactly that one still lives."""
        try:
            value = jsonfile.load(self.running)
            return birth.find(birth.pid_of(value["pid"]), Birth.from_json(value, _STARTED))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def ended_orderly(self) -> None:
        self._remove(self.running)

    # The saved state, used once -------------------------------------------------------------------------------------

    def complete_saved(self) -> None:
        """The partial state is whole: sync disk and state, then give it its name. Blocks for as long as syncing takes.

        A crash before the rename leaves a partial file, which is nothing; after it, a VM that is Saved.
        """
        fsync_file(self.overlay)
        fsync_file(self.partial)
        self.partial.replace(self.saved)
        fsync_folder(self.folder)

    def sync_overlay(self) -> None:
        """Make the overlay with the snapshots in it durable. Blocks."""
        fsync_file(self.overlay)

    def use_saved(self) -> None:
        """The state was loaded and the guest goes on after this: it is no state of the disk any more. Durable."""
        self.saved.replace(self.used)
        fsync_folder(self.folder)

    def discard_saved(self) -> bool:
        """Whether there was one."""
        there = self.saved.exists()
        self._remove(self.saved, self.partial, self.used)
        return there

    def remove_leftovers(self) -> None:
        """What a crash or a finished resume left: worth nothing."""
        self._remove(self.partial, self.used)
        for temporary in (*self.folder.glob(".vm.json.*"), *self.folder.glob(".running.json.*")):
            self._remove(temporary)

    # All of it ------------------------------------------------------------------------------------------------------

    def disk_bytes(self) -> int:
        """Bytes that the files take on the disk (not their nominal size)."""
        total = 0
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    total += getattr(entry.stat(), "st_blocks", 0) * 512  # stat(2): always units of 512
        return total

    def remove(self) -> None:
        """Delete the folder; see `remove_folder`."""
        remove_folder(self.folder)

    def _remove(self, *paths: Path) -> None:
        for path in paths:
            path.unlink(missing_ok=True)
        if self.folder.is_dir():
            fsync_folder(self.folder)


class Record:
    """What is remembered of a VM: its Definition, in memory and in vm.json the same."""

    def __init__(self, files: VmFiles) -> None:
        """Raises HypervisorError when vm.json cannot be read."""
        self.files = files
        self.definition = files.load()

    def store(self, definition: Definition) -> None:
        """Raises OSError; nothing has changed then."""
        self.files.store(definition)
        self.definition = definition

    def change(self, **changes: Any) -> None:
        """Fields of the Definition, stored. Raises OSError."""
        self.store(replace(self.definition, **changes))

    def state(self) -> VmState:
        """Of the VM without a process."""
        return self.files.state(self.definition)


DOOMED = ".deleting-"
"""Prefix of a VM folder whose deletion was not finished. No VM's name begins with a dot."""


def remove_folder(folder: Path) -> None:
    """Delete a VM's folder. Renamed first: a crash in the middle leaves no half VM, only something to sweep.

    What `sweep` deletes at the same time, in another thread, is no error. Raises OSError.
    """
    if not folder.is_dir():
        return
    doomed = folder.with_name(f"{DOOMED}{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        if doomed.exists():
            shutil.rmtree(doomed)  # which says what the trouble is


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


def fsync_file(path: Path) -> None:
    """Make all that was written to `path` durable, whoever wrote it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def with_snapshot(definition: Definition, tag: str) -> Definition:
    """`definition` after a snapshot with memory was taken as `tag`: it remembers what hardware it needs."""
    hardware = dict(definition.snapshot_hardware or {}) | {tag: (definition.accelerator or "", definition.cpu or "")}
    return replace(definition, current_snapshot=tag, snapshot_hardware=hardware)
