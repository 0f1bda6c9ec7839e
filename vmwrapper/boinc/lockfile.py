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
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from vmcontrol.common import slotfiles
from vmcontrol.common.filelock import open_lock_file
from vmwrapper.boinc.runtime import BoincError, SlotLocked

WAIT_S = 35.0
"""LOCKFILE_TIMEOUT_PERIOD: a former occupant that lost its client needs 30 s to notice it."""
WINDOWS_RETRY_S = 0.5

_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP)
"""A file system without locks: BOINC then goes on without, and so do we."""


log = logging.getLogger(__name__)


class _Expired(Exception):  # noqa: N818
    pass


class SlotLock:
    """The lock of one slot."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / slotfiles.LOCK_FILE
        self._fd: int | None = None

    def acquire(self, wait_s: float = WAIT_S) -> None:
        """Take the lock, waiting for its holder at most `wait_s`. Main thread only (it uses SIGALRM).

        Raises SlotLocked, and BoincError when the file cannot be made.
        """
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fd = open_lock_file(self._path, mode=0o660)  # lib/filesys.cpp, FILE_LOCK::lock
            except OSError as error:
                raise BoincError(f"boinc_init: {self._path.name} cannot be opened: {error.strerror}") from error
            try:
                _lock(fd, deadline - time.monotonic())
                if self._is_current(fd):
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

    def _is_current(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), self._path.stat())
        except FileNotFoundError:
            return False


def _locked() -> SlotLocked:
    return SlotLocked("Another process still works in this slot directory (boinc_lockfile is locked)")


if sys.platform == "win32":
    import msvcrt

    def _lock(fd: int, wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise _locked() from error
                time.sleep(WINDOWS_RETRY_S)  # Windows tells nobody of a lock that becomes free
            else:
                return

else:
    import fcntl

    def _lock(fd: int, wait_s: float) -> None:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise BoincError(f"boinc_init: the slot cannot be locked: {error.strerror}") from error
        else:
            return
        _wait_for_lock(fd, wait_s)

    def _wait_for_lock(fd: int, wait_s: float) -> None:
        def expire(_signal: int, _frame: FrameType | None) -> None:
            raise _Expired

        if wait_s <= 0:
            raise _locked()
        log.info("another process works in this slot directory; waiting at most %.0f s for its end", wait_s)
        previous = signal.signal(signal.SIGALRM, expire)
        signal.setitimer(signal.ITIMER_REAL, wait_s)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX)
        except _Expired:
            raise _locked() from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
