"""Fraction done, as a program writes it into a file: the last number counts, as in BOINC's wrapper. Reads only."""

from __future__ import annotations

import math
import os

TAIL_BYTES = 4096
"""Read from the file's end; a program that appends a line a second makes a big file in a long run."""

_SEPARATORS = bytes.maketrans(b",;:=", b"    ")


def last_fraction(text: bytes) -> float | None:
    """The last word of `text` that is a number, held to 0..1; None if there is none."""
    for word in reversed(text.translate(_SEPARATORS).split()):
        if b"_" in word:
            continue
        try:
            value = float(word)
        except ValueError:
            continue
        if math.isfinite(value):
            return min(1.0, max(0.0, value))
    return None


def read_fraction(path: str) -> float | None:
    """The fraction done that the file says now; None if it cannot be read or says none. Never blocks on a FIFO."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        size = os.fstat(fd).st_size
        start = max(0, size - TAIL_BYTES)
        text = os.pread(fd, TAIL_BYTES, start)
    except OSError:
        return None
    finally:
        os.close(fd)
    if start > 0:  # the first word may be the rest of a longer one
        text = text.partition(b"\n")[2] or text.partition(b" ")[2]
    return last_fraction(text)
