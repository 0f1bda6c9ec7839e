"""The embedded STOMP broker of HostMain: topics, without Java.

Owns the sessions of its clients, and the listening port if there is one. HostMain itself joins in the process
(broker.inprocess), the agents that it dials come over their links (`carry`); a port is only for those that dial the
broker: agents of protocol 1 and tools. Knows STOMP 1.0 to 1.2 and topics with exact names; it keeps
no message (who is not subscribed when a message comes does not get it) and has no queues, selectors or transactions.
What a client may cost is bounded (session.BrokerLimits), and a client that exceeds it is dropped with a line in the
log, without harm to others.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Mapping
from typing import Any

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory

from vmcontrol.broker.rights import GuestRights
from vmcontrol.broker.session import BrokerLimits, Session
from vmcontrol.broker.topics import Listener, Message, Topics
from vmcontrol.common import admission
from vmcontrol.common.eventloop import Clock, Event, start
from vmcontrol.common.logthrottle import LogThrottle
from vmcontrol.link.streams import RelayEnd

__all__ = ["BrokerLimits", "EmbeddedBroker"]

log = logging.getLogger(__name__)

BACKLOG = 256
"""Guests of one host may all come back at the same moment."""


class EmbeddedBroker:
    """`listen` if it is to have a port, use, `close`."""

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
        self.topics: Topics[Listener] = Topics()
        self.login, self.passcode = login, passcode
        self.complaints = LogThrottle(log, self.clock.seconds)
        self._reactor = reactor
        self._host, self._port = host, port
        self._credentials = login.encode(), passcode.encode()
        self._sessions: set[Session] = set()
        self._admitted: set[Session] = set()
        self._newcomers: admission.Newcomers[Session] = admission.Newcomers(
            reactor, most=self.limits.newcomers, limit_s=self.limits.connect_s, drop=self._refuse_newcomer
        )
        self._memory = 0
        self._ids = itertools.count(1)
        self._empty = Event()
        self._listening: Any = None

    def listen(self) -> int:
        """Open the port and return it. Raises twisted.internet.error.CannotListenError.

        What agents are told over their links does not open it: root in a guest could use it to speak for others.
        """
        self.login, self.passcode = f"link-{secrets.token_hex(4)}", secrets.token_hex(32)
        self._listening = admission.listen(
            self._reactor, self._port, self.factory(), backlog=BACKLOG, interface=self._host
        )
        port = int(self._listening.getHost().port)
        log.info("the embedded broker listens on %s:%d", self._host, port)
        return port

    def close(self) -> Deferred[None]:
        """Stop listening and end all sessions; fires when the last is gone (a client gets `limits.close_s`)."""
        return start(self._close())

    async def carry(self, carrier: RelayEnd, name: str, guest: str = "") -> None:
        """Serve the agent at the other end of a carrier, which has begun to speak. name: in the log.

        guest: the id of whom alone it may speak for.
        """
        carrier.hand_to(Session(self, name=name, rights=GuestRights(guest) if guest else None))

    def publish(self, destination: str, headers: Mapping[str, str], body: bytes) -> None:
        """Give a message to all subscribers of its topic."""
        message = Message(destination, headers, body, str(next(self._ids)))
        for subscription in self.topics.subscribers(destination):
            subscription.session.deliver(message, subscription)

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

    def credentials(self, *, carried: bool) -> tuple[bytes, bytes]:
        return (self.login.encode(), self.passcode.encode()) if carried else self._credentials

    def connected(self, session: Session) -> None:
        self._sessions.add(session)
        if session.is_carried:
            return
        if admission.descriptors_are_short(session.transport.fileno()):
            session.drop("the file descriptors of HostMain run out")
        else:
            self._newcomers.add(session)

    def admit(self, session: Session) -> bool:
        self._newcomers.discard(session)
        if len(self._admitted) >= self.limits.clients:
            return False
        self._admitted.add(session)
        return True

    def gone(self, session: Session) -> None:
        self._newcomers.discard(session)
        self._admitted.discard(session)
        self._sessions.discard(session)
        if not self._sessions:
            self._empty.set()

    def held(self, session: Session, change: int) -> None:  # noqa: ARG002 (the interface names who)
        self._memory += change
        if change > 0 and self._memory > self.limits.memory_bytes:
            largest = max(self._sessions, key=lambda candidate: candidate.held, default=None)
            if largest is not None:
                largest.drop(f"the broker's memory is used up, and it holds {largest.held} bytes of it")

    @staticmethod
    def _refuse_newcomer(session: Session, why: str) -> None:
        session.refuse(why)


class _SessionFactory(Factory):
    noisy = False

    def __init__(self, broker: EmbeddedBroker) -> None:
        self._broker = broker

    def buildProtocol(self, addr: IAddress | None) -> Session:  # noqa: N802, ARG002
        return Session(self._broker)
