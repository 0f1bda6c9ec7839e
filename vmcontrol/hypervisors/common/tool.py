"""Run a hypervisor's command line tool to its end: with a time limit, its output bounded and kept apart.

Owns the processes it started, for as long as they run: cancelling the wait kills them. Parses nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from twisted.internet import defer, error, protocol
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from vmcontrol.common import launch
from vmcontrol.common.eventloop import Clock, with_limit

log = logging.getLogger(__name__)

OUTPUT_LIMIT = 4 * 1024 * 1024
"""Bytes kept of each stream; the rest is read and dropped."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """status: exit status; negative: the signal that ended it. Output is decoded as UTF-8, with replacements."""

    status: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        """Everything it said, stderr first: what an error message quotes."""
        return "\n".join(filter(None, (self.stderr.strip(), self.stdout.strip())))


class ToolMissing(Exception):  # noqa: N818
    """The program is not there or cannot be executed."""


class _Run(protocol.ProcessProtocol):
    transport: Any

    def __init__(self, until: bytes | None) -> None:
        self.streams = {1: bytearray(), 2: bytearray()}
        self._until = until
        self.ended: Deferred[int] = Deferred(self._cancelled)

    def childDataReceived(self, childFD: int, data: bytes) -> None:  # noqa: N802, N803 (Twisted's names)
        stream = self.streams[childFD]
        stream += data[: max(0, OUTPUT_LIMIT - len(stream))]
        if self._until is not None and self._until in self.streams[1]:
            self._kill()

    def processEnded(self, reason: Failure) -> None:  # noqa: N802
        ended, self.ended = self.ended, defer.succeed(0)
        if not ended.called:
            ended.callback(exit_status(reason))

    def _cancelled(self, _: Deferred[int]) -> None:
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(error.ProcessExitedAlready):
            self.transport.signalProcess("KILL")


def exit_status(reason: Failure) -> int:
    """Exit status of a process as Twisted has it; negative: the signal that ended it."""
    value = reason.value
    if isinstance(value, error.ProcessTerminated):
        return value.exitCode if value.exitCode is not None else -(value.signal or 0)
    return 0


async def run(
    reactor: Any,
    arguments: Sequence[str],
    *,
    limit_s: float,
    until: bytes | None = None,
    dies_with_us: bool = False,
    clock: Clock | None = None,
    output: int | None = None,
    output_bytes: int = 0,
) -> ToolResult:
    """Run to the end. Raises ToolMissing, or eventloop.LimitReached after killing it. Any exit status is a result.

    until: kill it as soon as this stands in its stdout. dies_with_us: for what may run long (launch.py).
    clock: for the limit, in place of the reactor's. output: the file that its stdout goes to, and the bytes that it is
    to have: a program that writes more is ended, where the system can do that (Linux).
    """
    program = shutil.which(arguments[0])
    if program is None:
        raise ToolMissing(arguments[0])
    running = _Run(until)
    argv, variables = launch.command([program, *arguments[1:]]) if dies_with_us else (list(arguments), {})
    environment = os.environ | {"LC_ALL": "C.UTF-8"} | variables  # errors are recognized by their text
    try:
        reactor.spawnProcess(
            running,
            argv[0] if dies_with_us else program,
            argv,
            environment,
            childFDs={0: _nothing(), 1: "r" if output is None else output, 2: "r"},
        )
    except OSError as problem:
        raise ToolMissing(f"{program}: {problem.strerror}") from problem
    if output is not None and sys.platform == "linux":
        import resource  # there is none on Windows

        with contextlib.suppress(OSError):  # it has ended already
            resource.prlimit(running.transport.pid, resource.RLIMIT_FSIZE, (output_bytes, output_bytes))
    status = await with_limit(clock or reactor, limit_s, " ".join(arguments[:2]), running.ended)
    result = ToolResult(status, *(running.streams[fd].decode("utf-8", "replace") for fd in (1, 2)))
    log.debug("%s: status %d", arguments, status)
    return result


_null: list[int] = []


def _nothing() -> int:
    """A file descriptor that is at its end: /dev/null, opened once."""
    if not _null:
        _null.append(os.open(os.devnull, os.O_RDONLY))
    return _null[0]
