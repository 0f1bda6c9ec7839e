"""Starts a program on the host and sees its end when it happens.

On POSIX by fork and exec of our own, because Twisted's cannot do what is needed between the two: a process group of its
own (a signal to a group misses none that is just being forked), a priority, and the request to the kernel to KILL the
program when we die (so that one that a killed wrapper left does not run on beside the one that its restart starts). On
Windows by Twisted.

What fails in the child comes back over a pipe that exec closes; waiting for that takes a millisecond.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twisted.internet import process as twisted_process

from vmwrapper.process import descriptors
from vmwrapper.process.program import (
    CannotStart,
    Ended,
    Running,
    Streams,
    close_all,
    open_streams,
    start_program,
)

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
"""Loaded before any fork: a child must not load libraries."""
_HAS_WAITID: bool = hasattr(os, "waitid")
_HANDLERS: dict[int, Any] = twisted_process.reapProcessHandlers
"""Children whose end Twisted tells of."""
_FIRST_OTHER_FD = 3
_HIGHEST_FD = 65536


@dataclass(frozen=True, slots=True)
class Program:
    """What is to be started."""

    path: str
    """As exec gets it; relative to `folder`."""
    arguments: Sequence[str]
    """argv, with the program's name."""
    folder: Path
    environment: tuple[str, ...]
    """NAME=VALUE, passed on as it stands: also what comes twice, and what has no `=`."""
    streams: Streams = field(default_factory=Streams)
    niceness: int | None = None
    """nice value; None: ours. One that is not allowed is not an error, as with BOINC's wrapper."""
    umask: int | None = None
    """None: ours."""


def spawn(reactor: Any, program: Program) -> Running:
    """Start it. Raises StreamError, CannotStart."""
    if sys.platform == "win32":
        command = [program.path, *program.arguments[1:]]
        environment = dict(one.split("=", 1) for one in program.environment if "=" in one)
        return start_program(reactor, command, folder=program.folder, environment=environment, streams=program.streams)
    running = _HostRunning(program.path)
    fds = open_streams(program.streams)
    arguments = [os.fsencode(argument) for argument in program.arguments]
    variables = [os.fsencode(variable) for variable in program.environment]
    trouble, tell = os.pipe()
    parent = os.getpid()
    try:
        try:
            pid = os.fork()
        except OSError as error:
            os.close(trouble)
            raise CannotStart(f"{program.path} cannot be started: {error.strerror}") from error
        if pid == 0:
            _become(program, fds, arguments, variables, tell, parent)
    finally:
        os.close(tell)
        close_all(fds.values())
    with os.fdopen(trouble, "rb") as pipe:  # the child's exec, or its end, closes the other end
        text = pipe.read().decode("utf-8", "replace")
    if text:
        os.waitpid(pid, 0)
        raise CannotStart(text)
    running.pid = pid
    # Not by registerReapProcessHandler, which collects a child that has ended already.
    _HANDLERS[pid] = running
    running.reapProcess()
    return running


def _become(  # noqa: PLR0917 (of one caller)
    program: Program,
    fds: Mapping[int, int],
    arguments: Sequence[bytes],
    variables: Sequence[bytes],
    tell: int,
    parent: int,
) -> None:
    """The child: never returns. Nothing here may take a lock."""
    what = program.path
    try:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(127)
        _close_all_but({*fds.values(), tell})  # also for room: there may be few descriptors
        # An own copy first: a stream's fd may be one of those that the others go to.
        copies = {number: os.dup(fd) for number, fd in fds.items()}
        tell = os.dup(tell) if tell < _FIRST_OTHER_FD else tell
        for number, fd in copies.items():
            os.dup2(fd, number)
        _close_all_but({tell})
        descriptors.give_back()
        for number in (signal.SIGPIPE, getattr(signal, "SIGXFSZ", signal.SIGPIPE), signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)  # Python ignores some, and that would be inherited
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.setpgid(0, 0)
        if program.umask is not None:
            os.umask(program.umask)
        if program.niceness is not None:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, 0, program.niceness)
        what = f"the folder {program.folder}"
        os.chdir(program.folder)
        what = program.path
        _execute(program.path, arguments, variables)
    except OSError as error:
        verb = "cannot be started" if what == program.path else "cannot be entered"
        os.write(tell, f"{what} {verb}: {error.strerror}".encode("utf-8", "replace"))
    finally:
        os._exit(127)


def _close_all_but(wanted: set[int]) -> None:
    """Streams stay open too."""
    first = _FIRST_OTHER_FD
    for fd in sorted(fd for fd in wanted if fd >= _FIRST_OTHER_FD):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, _HIGHEST_FD)


def _execute(path: str, arguments: Sequence[bytes], variables: Sequence[bytes]) -> None:
    """execve. Returns never; raises OSError. Python's own takes a mapping, which knows each name once."""
    if _LIBC is not None:
        _LIBC.execve(os.fsencode(path), _strings(arguments), _strings(variables))
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    pairs = (variable.partition(b"=") for variable in variables)
    os.execve(path, list(arguments), {name: value for name, equals, value in pairs if name and equals})  # noqa: S606


def _strings(texts: Sequence[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * (len(texts) + 1))(*texts, None)


class _HostRunning(Running):
    """A program of ours. Its end is seen when it happens; its zombie stays until `release`.

    So its pid, which is the number of its process group too, is nobody else's as long as anybody may signal it.
    """

    def reapProcess(self) -> None:  # noqa: N802 (Twisted calls this when a child has ended)
        if not _HAS_WAITID:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                del _HANDLERS[pid]
                self.cpu_time_s = usage.ru_utime + usage.ru_stime
                self._note(os.waitstatus_to_exitcode(status))
        elif self.ended is None:
            found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is not None:
                self._note(found.si_status if found.si_code == os.CLD_EXITED else -found.si_status)

    def _note(self, code: int) -> None:
        self.has_ended(Ended(code) if code >= 0 else Ended(None, -code))

    def release(self) -> None:
        if _HANDLERS.get(self.pid) is self and self.ended is not None:
            del _HANDLERS[self.pid]
            _, _, usage = os.wait4(self.pid, os.WNOHANG)
            self.cpu_time_s = usage.ru_utime + usage.ru_stime
