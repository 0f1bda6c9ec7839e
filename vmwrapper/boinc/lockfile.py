"""boinc_lockfile: one process works in a slot. Facts: lib/filesys.cpp (FILE_LOCK), api/boinc_api.cpp.

The lock is the one that libboinc takes (POSIX record lock), so the two exclude each other. Such a lock belongs to the
process: within ours, libboinc may take it again, and closing any descriptor of the file gives it up. So this one stays
open until the end.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from pathlib import Path

from vmcontrol.common import slotfiles
from vmcontrol.common.filelock import is_current, open_lock_file, try_lock
from vmwrapper.boinc.runtime import BoincError, SlotLocked

WAIT_S = 35.0
"""LOCKFILE_TIMEOUT_PERIOD: a former occupant that lost its client needs 30 s to notice it."""
LOOK_AGAIN_S = 0.1
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP)
"""A file system without locks: BOINC then goes on without, and so do we."""


log = logging.getLogger(__name__)


class SlotLock:
    """The lock of one slot."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / slotfiles.LOCK_FILE
        self._fd: int | None = None

    def acquire(self, wait_s: float = WAIT_S) -> None:
        """Take the lock, waiting for its holder at most `wait_s`.

        Raises SlotLocked, and BoincError when the file cannot be made.
        """
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fd = open_lock_file(self._path, mode=0o660)  # lib/filesys.cpp, FILE_LOCK::lock
            except OSError as error:
                raise BoincError(f"boinc_init: {self._path.name} cannot be opened: {error.strerror}") from error
            try:
                _lock(fd, deadline)
                if is_current(fd, self._path):
                    self._fd = fd
                    return
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # the holder before us removed the file when it left: lock the new one

    def release(self) -> None:
        """Give the lock up and remove the file. Harmless when repeated."""
        if self._fd is None:
            return
        with contextlib.suppress(OSError):  # Windows: it goes with the slot
            self._path.unlink()
        os.close(self._fd)
        self._fd = None


def _lock(fd: int, deadline: float) -> None:
    """Wait for the lock. Raises SlotLocked, BoincError."""
    waits = False
    while True:
        try:
            if try_lock(fd, record=True):
                return
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return
            raise BoincError(f"boinc_init: the slot cannot be locked: {error.strerror}") from error
        left = deadline - time.monotonic()
        if left <= 0:
            raise SlotLocked("Another process still works in this slot directory (boinc_lockfile is locked)")
        if not waits:
            log.info("another process works in this slot directory; waiting at most %.0f s for its end", left)
            waits = True
        time.sleep(min(LOOK_AGAIN_S, left))  # nobody tells of a lock that becomes free
