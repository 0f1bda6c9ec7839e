"""The progress bar of a job on a terminal. Under a client, and into a file, there is none: the log lines are all."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable
from typing import TextIO

BAR_WIDTH = 30


def bar(fraction: float, text: str, width: int) -> str:
    """One line: the bar, the percentage, and what is going on, cut to the terminal's width."""
    full = int(fraction * BAR_WIDTH)
    line = f"[{'#' * full}{'.' * (BAR_WIDTH - full)}] {100 * fraction:5.1f} %  {text}"
    return line[: max(0, width - 1)]


class Display:
    """The bar at the bottom of a terminal; log lines are written above it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._shown = ""
        try:
            self.active = self._stream.isatty()
        except ValueError:  # closed
            self.active = False

    def show(self, fraction: float, text: str) -> None:
        if self.active:
            self._write(bar(fraction, text, shutil.get_terminal_size().columns))

    def above(self, write: Callable[[], None]) -> None:
        """Write something else to the same terminal without leaving a torn bar."""
        shown = self._shown
        if shown:
            self._write("")
        write()
        if shown:
            self._write(shown)

    def end(self) -> None:
        if self._shown:
            self._write("")

    def _write(self, line: str) -> None:
        if line != self._shown:
            with contextlib.suppress(OSError):  # the terminal is gone, the job is not
                self._stream.write(f"\r\x1b[K{line}")
                self._stream.flush()
            self._shown = line
