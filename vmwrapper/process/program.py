"""Programs that the wrapper starts: their streams, their start, and how they end. Owns nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from vmcontrol.common import birth
from vmcontrol.common.beneath import open_file
from vmcontrol.common.eventloop import Event


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended: with an exit status or by a signal."""

    status: int | None
    signal: int | None = None

    @property
    def good(self) -> bool:
        return self.status == 0

    def __str__(self) -> str:
        if self.signal is not None:
            with contextlib.suppress(ValueError):
                return f"ended by signal {self.signal} ({signal.Signals(self.signal).name})"
            return f"ended by signal {self.signal}"
        return f"ended with exit status {self.status}"


@dataclass(frozen=True, slots=True)
class Streams:
    """Where a program's streams go. None: stdin is empty, stdout and stderr are ours."""

    stdin: Path | None = None
    stdout: Path | None = None
    stderr: Path | None = None
    stderr_fd: int = 2
    """What stderr is when it has no file."""
    base: Path | None = None
    """Below this folder no link is followed."""


class StreamError(Exception):
    """A stream's file cannot be opened; `str` names it and says why."""

    def __init__(self, stream: str, path: object, error: OSError) -> None:
        super().__init__(f"{stream} file {path} cannot be opened: {error.strerror}")
        self.element = f"{stream}_filename"
        """Of the job file."""
        self.is_missing = isinstance(error, FileNotFoundError)


class CannotStart(Exception):  # noqa: N818
    """The system refused to start the program; `str` says why."""


class Running(ProcessProtocol):
    """A started program."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pid = 0
        self.began = birth.UNKNOWN
        self.ended: Ended | None = None
        self.cpu_time_s = 0.0
        """Its own and that of children that it has waited for; known when it is released."""
        self._over = Event()
        self.transport: Any = None

    def processExited(self, reason: Failure) -> None:  # noqa: N802 (Twisted's name)
        value: Any = reason.value
        ended = Ended(getattr(value, "exitCode", None), getattr(value, "signal", None))
        if ended.status is None and ended.signal is None:  # ProcessDone
            ended = Ended(0)
        self.has_ended(ended)

    def has_ended(self, ended: Ended) -> None:
        """The program itself is no more."""
        self.ended = ended
        self._over.set()

    def release(self) -> None:
        """Nobody needs its pid any more. Until then no other process and no process group can have it."""

    async def wait(self) -> Ended:
        """Until the program itself has ended; what it started may still run."""
        await self._over.wait()
        return self.ended or Ended(None)

    def close_pipe(self, fd: int) -> None:
        """Close our end of a pipe that was given as child fd."""
        with contextlib.suppress(KeyError):
            self.transport.closeChildFD(fd)


def open_streams(streams: Streams) -> dict[int, int]:
    """File descriptors 0, 1 and 2 for a program; stdout and stderr append. Raises StreamError, leaving none open."""
    fds: dict[int, int] = {}
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    try:
        for number, path, flags in ((0, streams.stdin, os.O_RDONLY), (1, streams.stdout, append),
                                    (2, streams.stderr, append)):  # fmt: skip
            if path is None and number:
                fds[number] = os.dup(streams.stderr_fd if number == 2 else number)
            else:
                fds[number] = _open_stream(path or Path(os.devnull), flags, streams.base)
    except OSError as error:
        close_all(fds.values())
        raise StreamError(("stdin", "stdout", "stderr")[len(fds)], error.filename, error) from error
    return fds


def _open_stream(path: Path, flags: int, base: Path | None) -> int:
    """Raises OSError, also for what would make us wait (a pipe without its other end) or is none (a folder)."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if stat.S_ISFIFO(mode):
            raise OSError(errno.EINVAL, "it is a named pipe", str(path))
    return open_file(path, base, flags)


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def start_program(
    reactor: Any,
    command: Sequence[str | Path],
    *,
    folder: Path,
    environment: Mapping[str, str],
    streams: Streams,
    pipes: Mapping[int, str | int] | None = None,
    protocol: Running | None = None,
) -> Running:
    """Start a program; `command[0]` is its path. Raises StreamError, CannotStart.

    pipes: further fds of the child, "r" (we read what it writes), "w" (we write what it reads; it sees the end of file
    when we are gone), or a descriptor of ours that it inherits. `protocol` gets what is read.
    """
    running = protocol or Running(str(command[0]))
    fds = open_streams(streams)
    arguments = [os.fsencode(argument) for argument in command]
    try:
        reactor.spawnProcess(
            running,
            arguments[0],
            arguments,
            env={os.fsencode(name): os.fsencode(value) for name, value in environment.items()},
            path=os.fsencode(folder),
            childFDs={**fds, **(pipes or {})},
        )
    except OSError as error:
        raise CannotStart(f"{command[0]} cannot be started: {error.strerror or error}") from error
    finally:
        close_all(fds.values())
    running.pid = running.transport.pid or 0
    running.began = birth.of(running.pid)
    return running
