"""The STOMP 1.2 client of HostMain and of the agent: when to connect, to whom messages go, when to try again.

Lives on the reactor thread and never blocks it; what does block (stomp.py, its threads) is session.py's, one
session for each try. Never decides what a message means, and keeps no message for a later connection: who sends
repeats until the other side has acknowledged (docs/reference/messages.md).

    StompError
    |-- NotConnected   there is no connection now, or it ended before the message was handed to the socket
    `-- QueueFull      too much waits to be sent; the broker does not read
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from twisted.internet.defer import Deferred, fail, succeed

from vmcontrol.common.eventloop import TimerHandle
from vmcontrol.common.ownbroker import JobsPrograms
from vmcontrol.protocol.messages import StompMessage
from vmcontrol.stomp.session import HEART_BEAT_MS, NotConnected, QueueFull, Session, StompError

__all__ = ["NotConnected", "QueueFull", "StompClient", "StompError"]

log = logging.getLogger(__name__)
BACK_OFF_FIRST_S = 0.1
BACK_OFF_MOST_S = 5.0
Handler: TypeAlias = Callable[[Mapping[str, str], str], None]
"""Called on the reactor thread with headers and body of a message."""


class StompClient:
    """All methods are called, and all callbacks come, on the reactor thread."""

    def __init__(
        self,
        reactor: Any,
        *,
        name: str,
        reconnect: bool = False,
        on_connected: Callable[[], None] | None = None,
        on_disconnected: Callable[[str], None] | None = None,
        heart_beat_ms: int = HEART_BEAT_MS,
        programs: JobsPrograms | None = None,
    ) -> None:
        """`name` stands in the log and in the names of the threads.

        `reconnect`: try again for ever, after 0.1 s and up to 5 s, whenever a connection cannot be made or ends.
        `on_connected`: CONNECTED has come; all subscriptions are on their way before anything sent from now on.
        `programs`: only a broker that is one of these is told login and passcode.
        `on_disconnected`: gets one clear sentence, once for each try that ends, whether it had been connected or not.
        """
        self.on_connected = on_connected
        self.on_disconnected = on_disconnected
        self._reactor = reactor
        self._name = name
        self._reconnect = reconnect
        self._heart_beat_ms = heart_beat_ms
        self._programs = programs
        self._handlers: dict[str, Handler] = {}
        self._session: Session | None = None
        self._connected = False
        self._target: tuple[str, int, str, str] | None = None
        self._retry: TimerHandle | None = None
        self._back_off_s = BACK_OFF_FIRST_S
        self._last_reason = ""
        self._begin_next = False
        """connect() was called while a session was there: its end begins the next."""
        self._closed = False
        self._closing: list[Deferred[None]] = []

    @property
    def connected(self) -> bool:
        """Whether messages can be sent now."""
        return self._connected

    def connect(self, host: str, port: int, login: str, passcode: str) -> None:
        """Start trying. A connection (or try) to somewhere else is ended first. Raises ValueError after `close`."""
        if self._closed:
            raise ValueError(f"{self._name}: connect after close")
        self._target = (host, port, login, passcode)
        self._back_off_s = BACK_OFF_FIRST_S
        self._cancel_retry()
        if self._session is None:
            self._begin()
        else:
            self._begin_next = True
            self._connected = False
            self._session.end()

    def subscribe(self, destination: str, handler: Handler) -> None:
        """Messages of this topic go to `handler`, on this connection and all later ones. One handler a topic."""
        new = destination not in self._handlers
        self._handlers[destination] = handler
        if new and self._connected and self._session is not None:
            self._session.subscribe(destination)

    def send(self, message: StompMessage) -> Deferred[None]:
        """Fires when the message was handed to the socket; that is no sign that anybody got it.

        Errback NotConnected or QueueFull. Nothing is kept for a later connection.
        """
        if not self._connected or self._session is None:
            return fail(NotConnected(f"{self._name}: there is no connection to the broker"))
        return self._session.send(message)

    def disconnect(self) -> None:
        """End the connection and stop trying, without waiting. `connect` may follow."""
        self._target = None
        self._begin_next = self._connected = False
        self._cancel_retry()
        if self._session is not None:
            self._session.end()

    def close(self) -> Deferred[None]:
        """End for good: what was queued is sent, within limits. Fires when no thread is left. No callback follows."""
        self._closed = True
        self.on_connected = self.on_disconnected = None
        self.disconnect()
        if self._session is None:
            return succeed(None)
        closed: Deferred[None] = Deferred()
        self._closing.append(closed)
        return closed

    def _begin(self) -> None:
        assert self._target is not None  # noqa: S101 (callers look)
        self._session = Session(
            self, self._reactor, self._name, self._target, self._heart_beat_ms, programs=self._programs
        )
        self._session.start()

    def _cancel_retry(self) -> None:
        retry, self._retry = self._retry, None
        if retry is not None and retry.active():
            retry.cancel()

    # handed over by the session, on the reactor thread

    def session_connected(self, session: Session) -> None:
        if session is not self._session or self._target is None or self._begin_next:
            return
        self._connected = True
        self._back_off_s = BACK_OFF_FIRST_S
        self._last_reason = ""
        log.info("%s: connected to the broker at %s:%d", self._name, *self._target[:2])
        for destination in self._handlers:
            session.subscribe(destination)
        if self.on_connected is not None:
            self.on_connected()

    def session_message(self, session: Session, destination: str, headers: Mapping[str, str], body: str) -> None:
        if session is not self._session:
            return
        handler = self._handlers.get(destination)
        if handler is None:
            return
        try:
            handler(headers, body)
        except Exception:
            log.exception("%s: a message on %s could not be handled", self._name, destination)

    def session_ended(self, reason: str) -> None:
        self._session = None
        self._connected = False
        if self._target is not None and not self._begin_next:
            level = logging.DEBUG if reason == self._last_reason else logging.WARNING
            log.log(level, "%s: %s", self._name, reason)
            self._last_reason = reason
        if self._begin_next:
            self._begin_next = False
            self._begin()
        elif self._target is not None and self._reconnect:
            self._retry = self._reactor.callLater(self._back_off_s, self._begin)
            self._back_off_s = min(self._back_off_s * 2, BACK_OFF_MOST_S)
        else:
            self._target = None
        if self.on_disconnected is not None:
            self.on_disconnected(reason)
        closing, self._closing = self._closing, []
        for deferred in closing:
            deferred.callback(None)
