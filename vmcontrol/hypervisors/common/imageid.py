"""Which image a VM was made from, known by size and content: another one below its disk would be no disk any more.

Neither the name nor the time of change counts: an image keeps both when it is replaced by an unpacked one, and gets
another time when BOINC's data folder is copied. Read are the beginning, where the tables of partitions and of file
systems, the image's own UUID and its map of blocks are, the end, and pieces in between: some MiB, whatever its size.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from vmcontrol.hypervisors.interface import HostProblem

HEAD_BYTES = 4 * 1024 * 1024
TAIL_BYTES = 64 * 1024
PIECES, PIECE_BYTES = 16, 4096
_READ_BYTES = 256 * 1024


def identify(image: Path) -> str:
    """`<bytes>:<hex digits>`, the same for the same image wherever it lies. Takes 10 ms. Raises OSError."""
    fd = os.open(image, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(fd, "rb", buffering=0) as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is no file", str(image))
        size = status.st_size
        digest = hashlib.sha256()
        for at, length in _samples(size):
            file.seek(at)
            left = length
            while left > 0 and (piece := file.read(min(left, _READ_BYTES))):
                digest.update(piece)
                left -= len(piece)
    return f"{size}:{digest.hexdigest()[:32]}"


def _samples(size: int) -> list[tuple[int, int]]:
    """(offset, length) of what is read."""
    if size <= HEAD_BYTES + TAIL_BYTES + PIECES * PIECE_BYTES:
        return [(0, size)]
    between = size - HEAD_BYTES - TAIL_BYTES
    pieces = [(HEAD_BYTES + between * number // PIECES, PIECE_BYTES) for number in range(PIECES)]
    return [(0, HEAD_BYTES), *pieces, (size - TAIL_BYTES, TAIL_BYTES)]


def unusable(vm: str, image: Path, why: str) -> HostProblem:
    """For a VM of which nothing can be used any more. why: of `ImageCheck`, or of the driver about the VM's disk."""
    key = "image-damaged" if image.is_file() else "image-missing"
    return HostProblem(f"{vm} cannot be started: {why}", key=key, delay_s=None)


class ImageCheck:
    """Whether a file is still the disk that a VM was made with. Reads it again only when it was touched."""

    def __init__(self, what: str) -> None:
        """what: the file is to the VM, a word or two."""
        self._what = what
        self._seen: tuple[Path, tuple[int, int, int, int]] | None = None
        self._identity = ""

    def why_not(self, image: Path, made_from: str) -> str:
        """Why the VM's disk, saved state and snapshots are of no use: the end of a sentence; "": nothing is wrong.

        made_from: what `identify` said when the VM was made; "" by a version that did not ask.
        """
        try:
            now = self._now(image)
        except OSError as error:
            return f"its {self._what} {image} is not to be had ({error.strerror or error})"
        if not made_from or now == made_from:
            return ""
        if now.partition(":")[0] != made_from.partition(":")[0]:
            sizes = f"{made_from.partition(':')[0]} and now {now.partition(':')[0]} bytes"
            return f"its {self._what} {image.name} was replaced by another one ({sizes})"
        return f"its {self._what} {image.name} was replaced by another one of the same size"

    def _now(self, image: Path) -> str:
        status = image.stat()
        seen = (image, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
        if seen != self._seen:
            self._identity = identify(image)
            self._seen = seen
        return self._identity
