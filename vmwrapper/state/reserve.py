"""A little disk space kept back, so that a full disk can still be reported to the client.

Without its temporary-exit file an exit is a failed task: days of work lost for a disk that was full for a minute.
Owns `vmwrapper_reserve` in the slot. Never raises: where there is no space for it there is just no reserve.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable

from vmcontrol.common.atomicfile import write_atomically
from vmcontrol.common.slotfiles import RESERVE
from vmwrapper.paths import is_file
from vmwrapper.slot import Slot

BYTES = 16384
"""A block each for the file's content and its folder entry, with room for file systems with larger blocks."""

BLOCK = 4096

log = logging.getLogger(__name__)


def keep(slot: Slot) -> None:
    """Take the space, or what there is of it. Its content is no zeros: some file systems store those without taking
    space."""
    path = slot.file(RESERVE)
    for size in range(BYTES, 0, -BLOCK):
        with contextlib.suppress(OSError):
            if not is_file(path) or path.is_symlink() or path.stat().st_size != size:
                write_atomically(path, os.urandom(size))
            return


def give_up(slot: Slot) -> None:
    """Remove the reserve: at the end of the job, or to use its space."""
    with contextlib.suppress(OSError):
        slot.file(RESERVE).unlink(missing_ok=True)


def write_with(slot: Slot, write: Callable[[], None]) -> None:
    """Do a small write that matters; if the disk refuses, again with the reserve. Raises OSError of the second try."""
    try:
        write()
    except OSError as error:
        log.warning("%s; trying again with the space that was kept back", error)
        give_up(slot)
        write()
