"""stderr.txt: the log of a run in lines with time stamps, versions first.

Under a client fd 2 is that file. Standalone the lines go to fd 2 and, appended, to stderr.txt. Lines that come from a
guest or from another program are marked as theirs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Iterable
from io import TextIOWrapper
from pathlib import Path

from vmcontrol.common.loglines import readable
from vmcontrol.common.logthrottle import LAST, LogLimit
from vmcontrol.common.slotfiles import CHECKPOINT, STDERR, STORY
from vmwrapper import __version__
from vmwrapper.display import Display
from vmwrapper.log_budget import Kept, StoryBudget, Worth

_FORMAT = "%(asctime)s (%(process)d): %(message)s"
_FORMAT_PROBLEM = "%(asctime)s (%(process)d): %(levelname)s: %(message)s"
_CLIENTS_WORD = "ERR_CPU_VM_EXTENSIONS_DISABLED"
"""In stderr.txt it makes the client ask for no more work in VMs (client/app_control.cpp): not for others to say."""

_STAMP = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(\d+\): ")
_LONG_STORY, _LONG_LINE = 32 * 1024 * 1024, 64 * 1024
"""Bytes: what is read of a long story, and at a time."""

OUTCOME = {**LAST, "outcome": True}
"""extra of the line that says how the job ends: it is always written."""

log = logging.getLogger("vmwrapper")


class _Lines(logging.Formatter):
    def __init__(self) -> None:
        super().__init__(_FORMAT, "%Y-%m-%d %H:%M:%S")
        self._problem = logging.Formatter(_FORMAT_PROBLEM, "%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        text = self._problem.format(record) if record.levelno >= logging.WARNING else super().format(record)
        return readable(text)


class _Terminal(logging.StreamHandler):  # type: ignore[type-arg]
    def __init__(self, display: Display) -> None:
        super().__init__(sys.stderr)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        self._display.above(lambda: super(_Terminal, self).emit(record))


class _Story:
    """The lines of stderr.txt: finds the worth of each, and writes those for which there is a budget."""

    def __init__(self, folder: Path, story: Path, *, anew: bool) -> None:
        """anew: nothing is known of this slot's job yet."""
        self._kept = Kept(folder / STORY)
        budget = None if anew else self._kept.load()
        if budget is None:
            budget = StoryBudget(0 if anew else _own_bytes(story))
        self._budget = budget

    def admit(self, text: str, record: logging.LogRecord) -> str | None:
        worth = Worth.LAST if getattr(record, "outcome", False) else Worth.ORDINARY
        if worth is Worth.ORDINARY and getattr(record, "last", False):
            worth = Worth.END
        admitted = self._budget.admit(text, worth, time.monotonic())
        if admitted is not None:
            self._kept.save(self._budget)
        return admitted


class _Budgeted(logging.Formatter):
    """Formatter and filter of the handler that writes stderr.txt: the text that was admitted is what is written."""

    def __init__(self, story: _Story) -> None:
        super().__init__()
        self._lines = _Lines()
        self._story = story

    def filter(self, record: logging.LogRecord) -> bool:
        """As a filter of that handler: decides, and keeps the text for `format`."""
        text = self._story.admit(self._lines.format(record), record)
        record.story_text = text
        return text is not None

    def format(self, record: logging.LogRecord) -> str:
        return str(getattr(record, "story_text", ""))


class _StoryFile(logging.FileHandler):
    """stderr.txt itself: a link in its place is not followed."""

    def _open(self) -> TextIOWrapper:
        opened = os.fdopen(open_unlinked(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab")
        return TextIOWrapper(opened, encoding=self.encoding, errors=self.errors, line_buffering=True)


def open_unlinked(path: str, flags: int) -> int:
    """An opener for `open` that takes no link for the file. Raises OSError."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0), 0o644)


def set_up(stderr_file: Path | None, display: Display) -> Path | None:
    """Begin the story. stderr_file: also append there (standalone), unless fd 2 is that file already.

    Returns that file when it is there that lines go besides fd 2.
    """
    terminal = _Terminal(display)
    handlers: list[logging.Handler] = [terminal]
    story: logging.Handler = terminal
    if stderr_file is not None and not _is_fd_2(stderr_file):
        with contextlib.suppress(OSError):  # a read-only slot: the lines on fd 2 say so soon enough
            story = _StoryFile(stderr_file, encoding="utf-8", errors="backslashreplace")
            handlers.append(story)
        terminal.setFormatter(_Lines())
        terminal.addFilter(LogLimit())
    if story is not terminal or stderr_file is None or _is_fd_2(stderr_file):
        path = stderr_file or Path.cwd() / STDERR
        # Standalone a folder is used again and again; under a client a slot has one job, also before its checkpoint.
        anew = stderr_file is not None and not (path.parent / CHECKPOINT).exists()
        budgeted = _Budgeted(_Story(path.parent, path, anew=anew))
        story.setFormatter(budgeted)
        story.addFilter(budgeted.filter)
    logging.raiseExceptions = False  # a line that a full disk does not take is lost, and no traceback in its place
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    from twisted.python.log import PythonLoggingObserver

    PythonLoggingObserver().start()  # errors that nobody took care of
    logging.getLogger("twisted").setLevel(logging.WARNING)
    return stderr_file if len(handlers) > 1 else None


def versions(runtime: str) -> None:
    """The first line."""
    log.info(
        "vmwrapper %s, Python %s, %s %s; %s",
        __version__, platform.python_version(), platform.system(), platform.release(), runtime,
        extra=LAST,
    )  # fmt: skip


def quote(source: str, lines: Iterable[str], *, at_the_end: bool = False) -> None:
    """Lines of another program or of the guest, marked as theirs. at_the_end: they tell why the job ends."""
    extra = LAST if at_the_end else {}
    for line in lines:
        text = line.rstrip().replace(_CLIENTS_WORD, _CLIENTS_WORD.replace("_", " "))
        log.info("[%s] %s", source, text, extra=extra)


def tail_of_file(path: Path, lines: int = 20, size: int = 4096, *, since: int = 0) -> list[str]:
    """The last lines of a text file; nothing when it cannot be read. since: bytes at its beginning to leave out."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(since if since <= end else 0, end - size))
            return file.read().decode("utf-8", "backslashreplace").splitlines()[-lines:]
    except OSError:
        return []


def size_of(path: Path | None) -> int:
    """Bytes of a file that others append to; 0 when there is none."""
    try:
        return path.stat().st_size if path is not None else 0
    except OSError:
        return 0


def _own_bytes(path: Path) -> int:
    """Of our lines in a story that began in earlier runs; the programs of the job may have written there, too."""
    own, is_ours = 0, False
    with contextlib.suppress(OSError), path.open("rb") as file:
        while (line := file.readline(_LONG_LINE)) and file.tell() < _LONG_STORY:
            is_ours = _STAMP.match(line) is not None or (is_ours and line.startswith(b"    "))
            own += len(line) if is_ours else 0
    return own


def flush() -> None:
    """Everything written, before a process ends without Python's own clean-up."""
    for handler in logging.getLogger().handlers:
        with contextlib.suppress(OSError, ValueError):
            handler.flush()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _is_fd_2(path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(2), path.stat())
    except OSError:
        return False
