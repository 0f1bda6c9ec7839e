"""Our own standard streams: always open, and what is said there never an error. Imports little: every start pays.

A client, a cron job or a shell may start us with some of them closed, on a full disk, or with nobody who reads. None of
that has to do with the job, so none of it may decide how we end.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO

from vmcontrol.common.slotfiles import INIT_DATA, STDERR


def begin() -> None:
    """First thing in the program: /dev/null for what is closed of fds 0 to 2.

    Else the next file that is opened would get such a number, and a program of the job would have it as a stream. Under
    a client (init_data.xml is there) fd 2 leads to stderr.txt, as with libboinc, which opens it itself.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            _put(os.open(os.devnull, os.O_RDWR), fd)
    if os.path.exists(INIT_DATA) and not _can_be_read_by_the_client(2):  # noqa: PTH110 (imports little)
        with contextlib.suppress(OSError):  # a slot that cannot be written: there is nowhere to say it
            _put(os.open(STDERR, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    # Python has none for an fd that it found closed.
    if sys.stdout is None:
        sys.stdout = _text(1)
    if sys.stderr is None:
        sys.stderr = _text(2)


def _put(opened: int, fd: int) -> None:
    """Give an open file this number, for us and for programs that we start."""
    if opened == fd:
        os.set_inheritable(fd, True)  # as a stream is
    else:
        os.dup2(opened, fd)
        os.close(opened)


def _can_be_read_by_the_client(fd: int) -> bool:
    """Not when what is written there is gone: /dev/null, or what was opened for reading."""
    if os.name != "posix":
        return True
    import fcntl

    found, null = os.fstat(fd), os.stat(os.devnull)  # noqa: PTH116 (imports little)
    is_null = (found.st_mode, found.st_rdev) == (null.st_mode, null.st_rdev)
    return not is_null and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def be_utf8() -> None:
    """Begin again in Python's UTF-8 mode where the locale has another encoding: a job file's names of files are UTF-8.

    Under the same pid, which the client knows. By an option, not by a variable, which the job's programs would inherit.
    Returns when there is nothing to do: UTF-8 already, no POSIX, or frozen (which knows no options of Python's).
    """
    if os.name != "posix" or getattr(sys, "frozen", False) or sys.getfilesystemencoding() == "utf-8":
        return
    if sys.executable and not sys.flags.utf8_mode:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606 (no shell)


def _text(fd: int) -> TextIO:
    return open(fd, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def say(line: str, stream: TextIO) -> None:
    """One line, whatever the stream's encoding: names in a job file can be of any script. Raises nothing.

    A stream that takes no more leads to /dev/null from then on: Python's own last flush would fail there, and with it
    our exit status.
    """
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
