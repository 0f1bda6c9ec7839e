"""One HostMain a slot: a second one would take the first one's VMs for those of a HostMain that died, and end them.

Owns <slot>/vm/.hostmain.lock while it is held. The lock goes with the process, so that a HostMain that was killed can
be started again at once; the file goes at an orderly end, or with the folder when the job ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from vmcontrol.common.filelock import is_current, open_lock_file, try_lock
from vmcontrol.common.slotfiles import HOSTMAIN_LOCK

log = logging.getLogger(__name__)


class SlotTaken(Exception):  # noqa: N818
    """Another HostMain lives in this slot."""


@contextlib.contextmanager
def slot_lock(folder: Path) -> Iterator[None]:
    """Hold the lock. folder: <slot>/vm, made if it is missing. Raises SlotTaken, OSError."""
    fd = _take(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / HOSTMAIN_LOCK).unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing else is in it
        os.close(fd)


def _take(folder: Path) -> int:
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / HOSTMAIN_LOCK
        fd = open_lock_file(path)
        try:
            if not try_lock(fd):
                os.close(fd)
                raise SlotTaken(f"another HostMain is running in {folder.parent}; end it first")
        except OSError as error:
            log.warning("%s cannot be locked (%s): a second HostMain in this slot would not be noticed", folder, error)
        if is_current(fd, path):
            return fd
        os.close(fd)  # the one that had it has just removed it
