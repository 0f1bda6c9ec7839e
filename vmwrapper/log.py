"""stderr.txt: the story of a run in lines with time stamps, versions first.

Under a client fd 2 is that file. By hand the lines go to fd 2 and, appended, to stderr.txt. Lines that come from a
guest or from another program are marked as theirs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from vmcontrol.loglines import readable
from vmcontrol.throttle import LogThrottle
from vmwrapper import __version__
from vmwrapper.progress import Display
from vmwrapper.slot import STDERR

_FORMAT = "%(asctime)s (%(process)d): %(message)s"
_FORMAT_PROBLEM = "%(asctime)s (%(process)d): %(levelname)s: %(message)s"
_CLIENTS_WORD = "ERR_CPU_VM_EXTENSIONS_DISABLED"
"""In stderr.txt it makes the client ask for no more work in VMs (client/app_control.cpp): not for others to say."""

_STAMP = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(\d+\): ")
_SMALL_STORY, _LONG_STORY, _LONG_LINE = 1024 * 1024, 32 * 1024 * 1024, 64 * 1024
"""Bytes: a story that is not looked into, what is read of a long one, and at a time."""

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


def set_up(stderr_file: Path | None, display: Display) -> Path | None:
    """Begin the story. stderr_file: also append there (by hand), unless fd 2 is that file already.

    Returns that file when it is there that lines go besides fd 2.
    """
    handlers: list[logging.Handler] = [_Terminal(display)]
    if stderr_file is not None and not _is_fd_2(stderr_file):
        with contextlib.suppress(OSError):  # a read-only slot: the lines on fd 2 say so soon enough
            handlers.append(logging.FileHandler(stderr_file, encoding="utf-8", errors="backslashreplace"))
    logging.raiseExceptions = False  # a line that a full disk does not take is lost, and no traceback in its place
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    throttle = LogThrottle(_own_bytes(Path.cwd() / STDERR if stderr_file is None else stderr_file))
    for handler in handlers:
        handler.setFormatter(_Lines())
        handler.addFilter(throttle)
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
    )  # fmt: skip


def quote(source: str, lines: Iterable[str]) -> None:
    """Lines of another program or of the guest, marked as theirs."""
    for line in lines:
        log.info("[%s] %s", source, line.rstrip().replace(_CLIENTS_WORD, _CLIENTS_WORD.replace("_", " ")))


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
        if os.fstat(file.fileno()).st_size <= _SMALL_STORY:
            return os.fstat(file.fileno()).st_size
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
