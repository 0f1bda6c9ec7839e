"""The wrapper's side of programs that hold a lifeline: HostMain itself, and others under a supervisor.

A lifeline is a pipe whose writing end is ours alone: the kernel closes it when we end, in whatever way. Status comes
back over a second pipe as JSON lines.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from socket import socket
from typing import Any

from vmwrapper.process.program import Running
from vmwrapper.process.selfstart import own_program
from vmwrapper.process.supervisor import LIFELINE_FD, STATUS_FD

DOOR_FD = 5
LINE_LIMIT = 64 * 1024
_LAST_LINES_S = 1.0

log = logging.getLogger(__name__)


class SupervisedProcess(Running):
    """A program with a lifeline. `on_event` gets its status lines, `on_end` is called at its end."""

    def __init__(
        self, reactor: Any, name: str, on_event: Callable[[Mapping[str, Any]], None], on_end: Callable[[], None]
    ) -> None:
        super().__init__(name)
        self._reactor = reactor
        self._on_event = on_event
        self._on_end = on_end
        self._buffer = b""

    def childDataReceived(self, childFD: int, data: bytes) -> None:  # noqa: N802, N803 (Twisted's names)
        if childFD != STATUS_FD:
            return
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > LINE_LIMIT:
            self._buffer = b""
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict) and "event" in event:
                self._on_event(event)
            elif line.strip():
                log.warning("%s says %r on its status pipe", self.name, line[:200])

    def processExited(self, reason: Any) -> None:  # noqa: N802 (Twisted's name)
        # What it said last may not have been read yet: processEnded comes after that, unless a child keeps the pipe.
        self._reactor.callLater(_LAST_LINES_S, self.processEnded, reason)

    def processEnded(self, reason: Any) -> None:  # noqa: N802 (Twisted's name)
        if self.ended is None:
            super().processExited(reason)
            self._on_end()

    def cut_lifeline(self) -> None:
        """Let it save what it can and end."""
        self.close_pipe(LIFELINE_FD)


def pipes(door: socket | None = None) -> dict[int, str | int]:
    """For `start_program`: a lifeline as fd 3, a status pipe as fd 4, and the socket `door` as fd 5."""
    return {LIFELINE_FD: "w", STATUS_FD: "r"} | ({} if door is None else {DOOR_FD: door.fileno()})


def supervised_command(
    program: Sequence[str], grace_s: float, environment: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The command that runs `program` under a supervisor, and the environment with what that needs added."""
    command, more = own_program("vmwrapper.process.supervisor", environment)
    return [*command, f"{grace_s:g}", *program], {**environment, **more}
