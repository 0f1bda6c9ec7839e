"""How much of stderr.txt our own lines may take: decided for each line when it is written. Pure but for `Kept`.

The client sends the last 63 KiB of stderr.txt to the project. What programs of the job write there is theirs and counts
for nothing here; our own lines take at most 32 KiB over the life of a job, all starts together. The first lines are all
written; then one a minute, which says how many were left out; the last 8 KiB are kept for what tells how it ended.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

LIMIT = 32 * 1024
"""Bytes."""
FOR_THE_END = 8 * 1024
"""Of them, kept back from ordinary lines."""
FOR_THE_LAST = 2 * 1024
"""Of these, for the last line of all."""
MANY_LINES = 200
PAUSE_S = 60.0
"""Between ordinary lines when there were many."""
_LEAST = 200
"""A line that is cut has at least so many bytes."""
_CUT = " [...]"


class Worth(IntEnum):
    """What a line is for."""

    ORDINARY = 0
    END = 1
    """It says how a start of ours begins or ends, or quotes why."""
    LAST = 2
    """It says how the job ends."""


_KEPT_BACK = {Worth.ORDINARY: FOR_THE_END, Worth.END: FOR_THE_LAST, Worth.LAST: 0}


@dataclass(slots=True)
class StoryBudget:
    """What was written and what was left out."""

    written: int = 0
    """Bytes, of all starts."""
    lines: int = 0
    left_out: int = 0
    """Lines since the last one that was written."""
    next_at: float = 0.0
    """When an ordinary line may come, if there were many."""

    def admit(self, text: str, worth: Worth, now: float) -> str | None:
        """The line as it is to be written, without its newline; None: it is left out. now: seconds, monotonic."""
        count = f" ({self.left_out} lines were left out before this one)" if self.left_out else ""
        room = LIMIT - _KEPT_BACK[worth] - self.written - 1
        needed = len(text.encode("utf-8", "backslashreplace")) + len(count)
        too_soon = self.lines >= MANY_LINES and now < self.next_at
        if worth is Worth.ORDINARY and (too_soon or needed > room):
            self.left_out += 1
            return None
        if needed > room:
            if room < _LEAST:
                self.left_out += 1
                return None
            text = _cut(text, room - len(count))
        text += count
        self.written += len(text.encode("utf-8", "backslashreplace")) + 1
        self.lines += 1
        self.left_out = 0
        self.next_at = now + PAUSE_S
        return text


def _cut(text: str, size: int) -> str:
    raw = text.encode("utf-8", "backslashreplace")[: size - len(_CUT)]
    return raw.decode("utf-8", "ignore") + _CUT


class Kept:
    """The sums in a small file of the slot, so that all starts share one budget.

    Not synced, for each line would wait for the disk. When lost or damaged, they are found again from stderr.txt.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> StoryBudget | None:
        """None: it is not there, or is none."""
        try:
            with self._path.open("rb") as file:
                written, lines = (int(word) for word in file.read(64).split())
        except (OSError, ValueError):
            return None
        if not (0 <= written <= 1 << 40 and 0 <= lines <= 1 << 40):
            return None
        return StoryBudget(written, lines)

    def save(self, budget: StoryBudget) -> None:
        """Write the sums in place: as many bytes each time. A disk that refuses loses no line."""
        with contextlib.suppress(OSError):
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
            try:
                os.write(fd, f"{budget.written:>13} {budget.lines:>13}\n".encode())
            finally:
                os.close(fd)
