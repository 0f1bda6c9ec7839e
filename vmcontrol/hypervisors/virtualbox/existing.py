"""VMs that were there before us: one task of a computer uses one at a time, and leaves it as it found it.

Beside the note of a VM (common/existing.py) there is a lock file in VirtualBox's home that names that note. Whoever
holds the lock file's lock uses the VM; so does a slot whose note is still there, as a task that the client has stopped
goes on with its saved state later. A slot that vanished takes its note along.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import IO

from vmcontrol.common.filelock import open_lock_file, try_lock
from vmcontrol.common.virtualbox import home
from vmcontrol.hypervisors.common.existing import Existing
from vmcontrol.hypervisors.virtualbox import problems
from vmcontrol.protocol.vm import VmState

log = logging.getLogger(__name__)
LATER_FORMAT = b"vmwrapper-format "
"""What the lock file of a later version begins with. The first format has no room for a number: versions of today take
all of it for a path."""
LOCK_BYTES = 64 * 1024


def _is_used(content: bytes, note: Path) -> bool:
    """Whether the content of a lock file that nobody holds names another slot that still uses the VM.

    It is the path of that slot's note, in its first format; a later one begins with LATER_FORMAT, and who uses the VM
    is then not for us to know. What is neither counts as nothing.
    """
    if content.startswith(LATER_FORMAT):
        return True
    user = os.fsdecode(content.strip())
    return user != str(note) and Path(user).name == note.name and os.path.exists(user)  # noqa: PTH110 (raises nothing)


class LockedExisting(Existing):
    """One of VirtualBox's VMs."""

    def __init__(self, folder: Path, uuid: str) -> None:
        """folder: <slot>/vm, for the note."""
        super().__init__(folder / f".existing-{uuid}.json")
        self._path = home() / f"vmwrapper-{uuid}.lock"
        self._lock: IO[bytes] | None = None

    def take(self, name: str, state: VmState) -> None:
        """Raises HostProblem `vm-in-use` when another slot uses the VM."""
        if self._lock is None:
            self._lock = self._locked(name)
        super().take(name, state)

    def _locked(self, name: str) -> IO[bytes] | None:
        """The lock file, locked, with our note's name in it; None, with a line, where something else is in its place.

        Raises HostProblem `vm-in-use`, OSError.
        """
        path = self._path
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
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
            if not is_free or _is_used(file.read(LOCK_BYTES), self.note):
                raise problems.in_use(name)
            file.truncate(0)
            file.write(os.fsencode(self.note) + b"\n")
            file.flush()
            undo.pop_all()
        return file

    def give_back(self) -> None:
        super().give_back()
        if self._lock is not None:
            self._lock.truncate(0)
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None
