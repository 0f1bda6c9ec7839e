"""The agent's end of the supervisor of one command."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any, Protocol

from twisted.internet.error import ProcessExitedAlready
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from guest.commands.supervisor import pack, unpack
from vmcontrol.common import eventloop
from vmcontrol.protocol.messages import CommandRun

log = logging.getLogger(__name__)


class Owner(Protocol):
    """Who hears of it: the runner."""

    def supervisor_said(self, supervisor: SupervisedCommand, message: Mapping[str, Any]) -> None: ...
    def supervisor_ended(self, supervisor: SupervisedCommand, last: Mapping[str, Any] | None) -> None: ...


class SupervisedCommand(ProcessProtocol):
    """The agent's end of one supervisor."""

    transport: Any = None

    def __init__(self, runner: Owner) -> None:
        self.run: CommandRun | None = None
        """None: it waits for one."""
        self.alone = True
        """No other command ran at any time while this one did."""
        self.gone = eventloop.Event()
        self.pid: int | None = None
        self._runner = runner
        self._buffer = b""
        self._last: Mapping[str, Any] | None = None
        self._limit: eventloop.TimerHandle | None = None
        self._end_by = 0.0

    def connectionMade(self) -> None:  # noqa: N802
        self.pid = self.transport.pid

    def say(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(AttributeError, KeyError):  # it is not there (any more)
            self.transport.writeToChild(0, pack(message))

    def let_go(self) -> None:
        """End of file: the supervisor kills its command and goes."""
        with contextlib.suppress(AttributeError, KeyError):
            self.transport.closeChildFD(0)

    def kill(self) -> None:
        """For one that does not obey; its command then is an orphan, which the runner kills."""
        log.error("a supervisor does not obey, and is killed")
        with contextlib.suppress(AttributeError, ProcessExitedAlready):
            self.transport.signalProcess("KILL")

    def end_by(self, clock: eventloop.Clock, when: float | None) -> None:
        """Kill it at this time of the clock, if no earlier one is set; None: it has ended."""
        limit = self._limit
        if limit is not None and limit.active():
            if when is not None and when >= self._end_by:
                return
            limit.cancel()
        if when is not None:
            self._end_by = when
            self._limit = clock.callLater(max(0.0, when - clock.seconds()), self.kill)

    def childDataReceived(self, childFD: int, data: bytes) -> None:  # noqa: N802, N803, ARG002
        self._buffer += data
        while True:
            message, self._buffer = unpack(self._buffer)
            if message is None:
                return
            if "ended" in message or "failed" in message:
                self._last = message
            else:
                self._runner.supervisor_said(self, message)

    def processEnded(self, reason: Failure) -> None:  # noqa: N802, ARG002
        self._runner.supervisor_ended(self, self._last)
