"""VMs that were there before us: one task of a computer uses one at a time, and leaves it as it found it.

Owns, for each such VM, a note in the slot (what it was when the task first used it) and a lock file in VirtualBox's
home that names that note. Whoever holds the lock file's lock uses the VM; so does a slot whose note is still there, as
a task that the client has stopped goes on with its saved state later. A slot that vanished takes its note along.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
from pathlib import Path
from typing import IO

from vmcontrol.common import jsonfile
from vmcontrol.common.atomicfile import write_atomically
from vmcontrol.common.filelock import open_lock_file, try_lock
from vmcontrol.hypervisors.virtualbox import problems
from vmcontrol.protocol.vm import VmState

log = logging.getLogger(__name__)
SNAPSHOT_PREFIX = "vmwrapper_"
NOTE_FORMAT = 1
LATER_FORMAT = b"vmwrapper-format "
"""What the lock file of a later version begins with. The first format has no room for a number: versions of today take
all of it for a path."""
LOCK_BYTES = 64 * 1024


def home() -> Path:
    """Where VirtualBox keeps what it knows of this user's VMs."""
    told = os.environ.get("VBOX_USER_HOME")
    if told:
        return Path(told)
    base, system = Path.home(), platform.system()
    if system == "Linux":
        config = Path(os.environ.get("XDG_CONFIG_HOME") or base / ".config")
        return base / ".VirtualBox" if (base / ".VirtualBox").is_dir() else config / "VirtualBox"
    return base / ("Library/VirtualBox" if system == "Darwin" else ".VirtualBox")


def _is_used(content: bytes, note: Path) -> bool:
    """Whether the content of a lock file that nobody holds names another slot that still uses the VM.

    It is the path of that slot's note, in its first format; a later one begins with LATER_FORMAT, and who uses the VM
    is then not for us to know. What is neither counts as nothing.
    """
    if content.startswith(LATER_FORMAT):
        return True
    user = os.fsdecode(content.strip())
    return user != str(note) and Path(user).name == note.name and os.path.exists(user)  # noqa: PTH110 (raises nothing)


class Existing:
    """The existing VMs that this slot uses."""

    def __init__(self, folder: Path) -> None:
        """folder: <slot>/vm, for the notes."""
        self._folder = folder
        self._locks: dict[str, IO[bytes]] = {}

    def take(self, name: str, uuid: str, state: VmState) -> None:
        """This slot uses the VM from now on. Raises HostProblem `vm-in-use` when another one does."""
        note = self._note(uuid)
        if uuid not in self._locks and (file := self._locked(name, uuid, note)) is not None:
            self._locks[uuid] = file
        if not note.exists():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            content = {jsonfile.FORMAT: NOTE_FORMAT, "name": name, "found": state.value}
            write_atomically(note, json.dumps(content).encode(), mode=0o600)

    def _locked(self, name: str, uuid: str, note: Path) -> IO[bytes] | None:
        """The lock file, locked, with our note's name in it; None, with a line, where something else is in its place.

        Raises HostProblem `vm-in-use`, OSError.
        """
        home().mkdir(mode=0o700, parents=True, exist_ok=True)
        path = home() / f"vmwrapper-{uuid}.lock"
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            log.warning("%s is no file: that another task uses %s at the same time would not be noticed", path, name)
            return None
        with contextlib.ExitStack() as undo:
            file = undo.enter_context(os.fdopen(open_lock_file(path), "a+b"))
            try:
                is_free = try_lock(file.fileno())
            except OSError as error:
                raise problems.in_use(name) from error
            file.seek(0)
            if not is_free or _is_used(file.read(LOCK_BYTES), note):
                raise problems.in_use(name)
            file.truncate(0)
            file.write(os.fsencode(note) + b"\n")
            file.flush()
            undo.pop_all()
        return file

    def found(self, uuid: str) -> VmState | None:
        """The state in which this slot found it; None when it does not use it."""
        try:
            return VmState(jsonfile.load(self._note(uuid))["found"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: %s; taken for a VM that was off", self._note(uuid), error)
            return VmState.POWERED_OFF

    @staticmethod
    def is_our_snapshot(name: str) -> bool:
        return name.startswith(SNAPSHOT_PREFIX)

    def release(self, uuid: str) -> None:
        self._note(uuid).unlink(missing_ok=True)
        file = self._locks.pop(uuid, None)
        if file is not None:
            file.truncate(0)
            file.close()

    def close(self) -> None:
        """This HostMain ends; the slot uses what it uses."""
        for file in self._locks.values():
            file.close()
        self._locks.clear()

    def _note(self, uuid: str) -> Path:
        return self._folder / f".existing-{uuid}.json"
