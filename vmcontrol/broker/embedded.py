"""The embedded STOMP broker of HostMain: topics on loopback, without Java.

Owns the listening port and the sessions of its clients. Knows STOMP 1.0 to 1.2 and topics with exact names; it keeps
no message (who is not subscribed when a message comes does not get it) and has no queues, selectors or transactions.
What a client may cost is bounded (session.BrokerLimits), and a client that exceeds it is dropped with a line in the
log, without harm to others.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory

from vmcontrol.broker.session import BrokerLimits, Session
from vmcontrol.broker.topics import Topics
from vmcontrol.eventloop import Clock, Event, start
from vmcontrol.flapping import Complaints

__all__ = ["BrokerLimits", "EmbeddedBroker"]

log = logging.getLogger(__name__)

BACKLOG = 256
"""Guests of one host may all come back at the same moment."""


class EmbeddedBroker:
    """`listen`, use, `close`."""

    def __init__(
        self,
        reactor: Any,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        login: str,
        passcode: str,
        limits: BrokerLimits | None = None,
    ) -> None:
        """`port` 0: a free one. A client must show exactly `login` and `passcode`."""
        self.clock: Clock = reactor
        self.limits = limits or BrokerLimits()
        self.topics: Topics[Session] = Topics()
        self.complaints = Complaints(log, self.clock.seconds)
        self._reactor = reactor
        self._host, self._port = host, port
        self._credentials = login.encode(), passcode.encode()
        self._sessions: set[Session] = set()
        self._memory = 0
        self._ids = itertools.count(1)
        self._empty = Event()
        self._listening: Any = None

    def listen(self) -> int:
        """Open the port and return it. Raises twisted.internet.error.CannotListenError."""
        self._listening = self._reactor.listenTCP(self._port, self.factory(), backlog=BACKLOG, interface=self._host)
        port = int(self._listening.getHost().port)
        log.info("the embedded broker listens on %s:%d", self._host, port)
        return port

    def close(self) -> Deferred[None]:
        """Stop listening and end all sessions; fires when the last is gone (a client gets `limits.close_s`)."""
        return start(self._close())

    @property
    def clients(self) -> int:
        """Connections, the ones that have not said CONNECT included."""
        return len(self._sessions)

    @property
    def memory(self) -> int:
        """Bytes of unfinished frames and unread messages."""
        return self._memory

    def factory(self) -> Factory:
        """Makes a session for each connection."""
        return _SessionFactory(self)

    async def _close(self) -> None:
        listening, self._listening = self._listening, None
        if listening is not None:
            await maybeDeferred(listening.stopListening)
        for session in list(self._sessions):
            session.end("the broker ends")
        while self._sessions:
            self._empty.clear()
            await self._empty.wait()

    # for sessions

    def credentials(self) -> tuple[bytes, bytes]:
        return self._credentials

    def admit(self, session: Session) -> bool:
        self._sessions.add(session)
        return len(self._sessions) <= self.limits.clients

    def gone(self, session: Session) -> None:
        self._sessions.discard(session)
        if not self._sessions:
            self._empty.set()

    def held(self, session: Session, change: int) -> None:  # noqa: ARG002 (the interface names who)
        self._memory += change
        if change > 0 and self._memory > self.limits.memory_bytes:
            largest = max(self._sessions, key=lambda candidate: candidate.held, default=None)
            if largest is not None:
                largest.drop(f"the broker's memory is used up, and it holds {largest.held} bytes of it")

    def message_id(self) -> str:
        return str(next(self._ids))


class _SessionFactory(Factory):
    noisy = False

    def __init__(self, broker: EmbeddedBroker) -> None:
        self._broker = broker

    def buildProtocol(self, addr: IAddress | None) -> Session:  # noqa: N802, ARG002
        return Session(self._broker)
