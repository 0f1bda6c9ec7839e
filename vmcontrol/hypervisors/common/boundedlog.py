"""A log that is appended to and never grows beyond a bound: its newest part is kept. Owns no file.

For what others may make grow without end: a guest's console, the trace of VBoxManage.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

MODE = 0o640
"""People look at these files; no other account writes them, whatever the umask."""
CUT = b"[... what came before was cut: it had grown too long ...]\n"


def append(path: Path, data: bytes, limit: int, kept: int, *, mode: int = MODE) -> None:
    """Append; a file that would have more than `limit` bytes is replaced by its last `kept` ones, these among them.

    mode: of a new file. Raises OSError, and ValueError when a pipe or the like is in its place: the data is lost then,
    what was there is not.
    """
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _CAREFULLY, mode)
    with os.fdopen(fd, "r+b", buffering=0) as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path.name} is no file")
        if status.st_size + len(data) <= limit:
            _write(fd, data)
            return
        before = max(0, kept - len(data))
        file.seek(max(0, status.st_size - before))
        tail = file.read(before) if before else b""
    _replace(path, CUT + tail + data[-kept:], mode)


_CAREFULLY = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"))


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _replace(path: Path, content: bytes, mode: int) -> None:
    """A reader finds the old or the new one. Not synced: a log is no state."""
    fresh = path.with_name(f".{path.name}.cut")
    try:
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _CAREFULLY, mode)
        try:
            _write(fd, content)
        finally:
            os.close(fd)
        fresh.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
