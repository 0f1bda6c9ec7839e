"""Whether a file that a guest announces has room on this computer, asked before a byte of it is copied.

Two bounds: what the disk has free, MARGIN of which is left, and the disk bound of the job, which the
BOINC client holds by aborting it. Owns the sizes of the copies that are under way. `check` blocks: for threads.

    OSError (ENOSPC)    there is no room now: the computer's trouble, which passes
    FileUnusable        the job's disk bound does not allow it, which is what a program's own output is bounded by
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from vmcontrol.common.diskusage import disk_usage
from vmcontrol.transfer.interface import FileUnusable

MARGIN = 16 * 1024 * 1024
"""Bytes of the disk that stay free for what must be written still: checkpoints, how the job ends."""
SMALL = 64 * 1024
"""Bytes of a file for which nothing is counted."""


class DiskRoom:
    """Of one slot. bound: bytes of the job; 0: none."""

    def __init__(self, slot: Path, bound: int = 0) -> None:
        self._slot = slot
        self._bound = bound
        self._promised = 0

    def check(self, size: int, remote: str, local: Path) -> None:
        """Whether a file of this size has room at `local`. Blocks."""
        if size > SMALL:
            free = shutil.disk_usage(local.parent).free
            if size + self._promised > free - MARGIN:
                raise OSError(errno.ENOSPC, f"{size} bytes are to be copied, {free} are free", str(local))
            if self._bound > 0:
                left = max(0, self._bound - disk_usage(self._slot) - self._promised)
                if size > left:
                    raise FileUnusable(
                        remote,
                        f"has {size} bytes, and the job's disk bound of {self._bound} bytes (rsc_disk_bound), "
                        f"to which a program's own output counts, leaves {left}",
                    )

    def claim(self, size: int) -> None:
        """It is going to be copied; `release` when that is over."""
        self._promised += size

    def release(self, size: int) -> None:
        self._promised -= size
