"""QEMU Machine Protocol, the client's side: JSON lines over a socket. (QEMU docs/interop/qmp-spec.txt)

Owns one connection. Every command has a time limit. Knows nothing of virtual machines; that is the driver's business.

    QmpError
    +-- CommandFailed       QEMU said no; str is its description
    +-- ConnectionGone      QEMU went away: the outcome of what was asked is unknown
    +-- NoAnswer            the limit was reached: the outcome is unknown
    +-- BadMessage          that was no QMP
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet import protocol
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from vmcontrol.common.eventloop import Clock, Event, LimitReached, with_limit

log = logging.getLogger(__name__)

LINE_LIMIT = 8 * 1024 * 1024
"""Bytes. The longest answer of QEMU 7.2, query-qmp-schema, has 0.2 MB."""
COMMAND_LIMIT_S = 10.0
"""A healthy QEMU answers in milliseconds; on a computer that swaps it takes seconds."""

Json = dict[str, Any]
EventHandler = Callable[[str, Mapping[str, Any]], None]


class QmpError(Exception):
    """Something between us and QEMU's monitor."""


class CommandFailed(QmpError):  # noqa: N818
    """QEMU refused a command. `command` and QEMU's own words."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(f"{command}: {description}")
        self.command = command
        self.description = description


class ConnectionGone(QmpError):  # noqa: N818
    """QEMU went away."""


class NoAnswer(QmpError):  # noqa: N818
    """QEMU did not answer in time."""


class BadMessage(QmpError):  # noqa: N818
    """The other side does not speak QMP."""


class Decoder:
    """Bytes in, in any portions; JSON objects out, one a line. Pure."""

    def __init__(self, line_limit: int = LINE_LIMIT) -> None:
        self._line_limit = line_limit
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[Json]:
        """The objects that are complete now. Raises BadMessage; the stream is then of no more use."""
        searched = len(self._rest)
        self._rest += data
        if self._rest.find(b"\n", searched) < 0:
            if len(self._rest) > self._line_limit:
                raise BadMessage(f"a line of more than {self._line_limit} bytes")
            return []
        *lines, self._rest = self._rest.split(b"\n")
        return [self._object(line) for line in lines if line.strip()]

    @staticmethod
    def _object(line: bytes | bytearray) -> Json:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadMessage(f"no JSON: {bytes(line[:80])!r}") from error
        if not isinstance(value, dict):
            raise BadMessage(f"no JSON object: {bytes(line[:80])!r}")
        return value


class QmpClient(protocol.Protocol):
    """One connection. `on_event` gets every event; `connect` first, then `execute`."""

    transport: Any

    def __init__(self, clock: Clock, on_event: EventHandler) -> None:
        self._clock = clock
        self._on_event = on_event
        self._decoder = Decoder()
        self._ids = itertools.count(1)
        self._waiting: dict[int, tuple[str, Deferred[Any]]] = {}
        self._gone: QmpError | None = None
        self._greeted = Event()

    async def connect(self, limit_s: float = COMMAND_LIMIT_S) -> None:
        """Wait for QEMU's greeting and leave its negotiation mode. Raises QmpError."""
        try:
            await with_limit(self._clock, limit_s, "QEMU's greeting", self._greeted.wait())
        except LimitReached as error:
            raise NoAnswer(str(error)) from error
        await self.execute("qmp_capabilities", limit_s=limit_s)

    async def execute(
        self, command: str, *, limit_s: float = COMMAND_LIMIT_S, pass_fd: int | None = None, **arguments: Any
    ) -> Any:
        """Run one command and return its result. `pass_fd` goes along (SCM_RIGHTS, for getfd).

        Names in `arguments` are written with `_` for `-`. Raises QmpError.
        """
        if self._gone is not None:
            raise self._gone
        number = next(self._ids)
        request = {"execute": command, "id": number}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        answer: Deferred[Any] = Deferred()
        self._waiting[number] = (command, answer)
        if pass_fd is not None:
            self.transport.sendFileDescriptor(pass_fd)
        self.transport.write(json.dumps(request).encode() + b"\n")
        try:
            return await with_limit(self._clock, limit_s, f"QEMU, {command}", answer)
        except LimitReached as error:
            raise NoAnswer(str(error)) from error
        finally:
            self._waiting.pop(number, None)

    def dataReceived(self, data: bytes) -> None:  # noqa: N802 (Twisted's name)
        try:
            for message in self._decoder.feed(data):
                self._received(message)
        except BadMessage as error:
            self._end(error)
            self.transport.loseConnection()

    def connectionLost(self, reason: Failure = protocol.connectionDone) -> None:  # noqa: N802
        self._end(ConnectionGone(f"QEMU closed its monitor ({reason.getErrorMessage()})"))

    def _received(self, message: Json) -> None:
        if "event" in message:
            data = message.get("data")
            self._on_event(str(message["event"]), data if isinstance(data, dict) else {})
        elif "QMP" in message:
            self._greeted.set()
        else:
            self._answered(message)

    def _answered(self, message: Json) -> None:
        number = message.get("id")
        command, answer = self._waiting.pop(number, ("", None)) if isinstance(number, int) else ("", None)
        if answer is None:  # its limit was reached before
            log.info("QEMU answered late: %.200s", message)
        elif "error" in message:
            error = message["error"]
            text = error.get("desc", error) if isinstance(error, dict) else error
            answer.errback(CommandFailed(command, str(text)))
        else:
            answer.callback(message.get("return"))

    def _end(self, why: QmpError) -> None:
        if self._gone is not None:
            return
        self._gone = why
        waiting, self._waiting = self._waiting, {}
        for _, answer in waiting.values():
            if not answer.called:
                answer.errback(why)
        self._greeted.set()


class OneConnection(protocol.Factory):
    """Hands a ready-made client to the one connection that is adopted."""

    def __init__(self, client: QmpClient) -> None:
        self.client = client
        self.noisy = False

    def buildProtocol(self, addr: object) -> QmpClient:  # noqa: ARG002, N802
        return self.client
