"""One HostMain a slot: a second one would take the first one's VMs for those of a HostMain that died, and end them.

Owns <slot>/vm/.hostmain.lock while it is held. The lock goes with the process, so that a HostMain that was killed can
be started again at once; the file goes at an orderly end, or with the folder when the job ends.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vmcontrol.common.filelock import lock, open_lock_file
from vmcontrol.common.slotfiles import HOSTMAIN_LOCK

log = logging.getLogger(__name__)

_TAKEN = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
"""What flock, and on Windows msvcrt.locking, says of a lock that another process has."""


class SlotTaken(Exception):  # noqa: N818
    """Another HostMain lives in this slot."""


@contextlib.contextmanager
def slot_lock(folder: Path) -> Iterator[None]:
    """Hold the lock. folder: <slot>/vm, made if it is missing. Raises SlotTaken, OSError."""
    file = _take(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / HOSTMAIN_LOCK).unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing else is in it
        file.close()


def _take(folder: Path) -> IO[str]:
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        file = os.fdopen(open_lock_file(folder / HOSTMAIN_LOCK), "a")
        try:
            lock(file)
        except OSError as error:
            if error.errno in _TAKEN:
                file.close()
                raise SlotTaken(f"another HostMain is running in {folder.parent}; end it first") from error
            log.warning("%s cannot be locked (%s): a second HostMain in this slot would not be noticed", folder, error)
        try:
            if os.path.samestat(os.fstat(file.fileno()), (folder / HOSTMAIN_LOCK).stat()):
                return file
        except FileNotFoundError:
            pass
        file.close()  # the one that had it has just removed it
