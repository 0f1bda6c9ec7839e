"""The agent's end of the link: the host dials, the agent listens and shows that it knows the secret.

Owns the listener on AGENT_PORT, the listener on the guest's own loopback for the agent's STOMP client, and every
connection to them. It runs no commands and does not look into STOMP.

- Mode stomp: one carrier at a time; the newest that has shown the secret wins, and the older one (a restored guest
  remembers one that is dead) goes at once with the STOMP connection that it carried. The carrier's first line offers
  the broker's credentials; `on_broker_offer` hands them to the agent, whose STOMP client then connects to our loopback
  listener and is joined to the carrier. Without a carrier that waits, a connection there is closed at once.
- Mode http: handed to guest.files.server, which is imported at the first such connection (or by `warm_up`).

An unauthenticated peer costs at most LINE_LIMIT bytes for HANDSHAKE_LIMIT_S seconds, and there are never more than
UNAUTHENTICATED_LIMIT of them: the oldest goes.
"""

from __future__ import annotations

import logging
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twisted.internet.protocol import Factory, Protocol
from twisted.python.failure import Failure

from vmcontrol.common import jsonfile
from vmcontrol.common.admission import Newcomers
from vmcontrol.link.streams import RelayEnd, hand_over, keep_alive
from vmcontrol.protocol.handshake import (
    AGENT_PORT,
    GUEST_STOMP_PORT,
    HANDSHAKE_LIMIT_S,
    GuestHandshake,
    Mode,
    Outcome,
)

log = logging.getLogger(__name__)

UNAUTHENTICATED_LIMIT = 64
"""Connections that have not shown the secret. More than the host has tries under way at once."""
HTTP_LIMIT = 8
"""Authenticated connections for HTTP; the oldest goes."""
OFFER_LIMIT = 4096
"""Bytes of the line that offers the broker."""

OnBrokerOffer = Callable[[str, str], object]
"""login, passcode. Called on the reactor; connect the STOMP client to 127.0.0.1:LinkServer.stomp_port now."""
SetClock = Callable[[float], Any]
"""Unix time. Sets the guest's clock; may return a Deferred."""
Describe = Callable[[], Mapping[str, object]]
"""What /v1/status says besides the link's own: id, ip."""


class Secret(typing.Protocol):
    """What both ends of a connection must know; the host may replace it (a one-time token by the lasting one)."""

    current: bytes

    def replace(self, secret: bytes) -> None: ...


class _UnauthenticatedPeer(Protocol):
    """A connection that has not shown the secret yet."""

    transport: Any = None

    def __init__(self, server: LinkServer) -> None:
        self._server = server
        self._handshake = GuestHandshake(server.secret.current)

    def connectionMade(self) -> None:  # noqa: N802
        keep_alive(self.transport)
        self._server.unauthenticated.add(self)

    def dataReceived(self, data: bytes) -> None:  # noqa: N802
        step = self._handshake.receive(data)
        if step.send:
            self.transport.write(step.send)
        if step.outcome is Outcome.DENIED:
            log.warning("a connection to the agent's port was denied")
            self.transport.loseConnection()
        elif step.outcome is Outcome.OPEN:
            self._server.unauthenticated.discard(self)
            self._server.opened(self._handshake.mode, self.transport, step.rest)

    def connectionLost(self, reason: Failure | None = None) -> None:  # noqa: N802, ARG002
        self._server.unauthenticated.discard(self)


@dataclass(frozen=True, slots=True)
class _Offer:
    login: str
    passcode: str


class _OfferReader(Protocol):
    """A new carrier, until its first line is there. The host may take its time over that: it waits for its broker."""

    transport: Any = None

    def __init__(self, offered: Callable[[Any, str, str, bytes], None], lost: Callable[[], None]) -> None:
        self._offered = offered
        self._lost = lost
        self._buffer = b""

    def dataReceived(self, data: bytes) -> None:  # noqa: N802
        self._buffer += data
        line, end, rest = self._buffer.partition(b"\n")
        if not end:
            if len(self._buffer) > OFFER_LIMIT:
                self.abort()
            return
        try:
            offer = jsonfile.typed(_Offer, jsonfile.parse(line))
        except ValueError as error:
            log.warning("the host's offer of a broker cannot be read: %s", error)
            self.abort()
            return
        self._offered(self.transport, offer.login, offer.passcode, rest)

    def abort(self) -> None:
        self.transport.abortConnection()

    def connectionLost(self, reason: Failure | None = None) -> None:  # noqa: N802, ARG002
        self._lost()


class LinkServer:
    """Both listeners. `port` and `stomp_port` are constants but in tests (0: a free one; after `start` the real one).

    base_folder: what relative paths in requests are relative to.
    """

    def __init__(
        self,
        reactor: Any,
        secret: Secret,
        base_folder: Path,
        on_broker_offer: OnBrokerOffer,
        set_clock: SetClock,
        *,
        describe: Describe = dict,
        interface: str = "0.0.0.0",  # noqa: S104 (the guest's port; nothing is said there without the secret)
        port: int = AGENT_PORT,
        stomp_port: int = GUEST_STOMP_PORT,
    ) -> None:
        self.reactor = reactor
        self.secret = secret
        self.port = port
        self.stomp_port = stomp_port
        self._base_folder = base_folder
        self._on_broker_offer = on_broker_offer
        self._set_clock = set_clock
        self._describe = describe
        self._interface = interface
        self._listeners: list[Any] = []
        self.unauthenticated: Newcomers[_UnauthenticatedPeer] = Newcomers(
            reactor,
            most=UNAUTHENTICATED_LIMIT,
            limit_s=HANDSHAKE_LIMIT_S,
            drop=lambda peer, _why: peer.transport.abortConnection(),
        )
        self._http: list[Any] = []
        self._carrier: _OfferReader | RelayEnd | None = None
        self._files: Any = None

    def start(self) -> None:
        """Listen. Raises twisted.internet.error.CannotListenError."""
        agent = self.reactor.listenTCP(
            self.port, _factory(lambda: _UnauthenticatedPeer(self)), interface=self._interface
        )
        self._listeners.append(agent)
        try:
            stomp = self.reactor.listenTCP(self.stomp_port, _factory(self._local_end), interface="127.0.0.1")
        except BaseException:
            agent.stopListening()
            self._listeners.clear()
            raise
        self._listeners.append(stomp)
        self.port, self.stomp_port = agent.getHost().port, stomp.getHost().port

    async def stop(self) -> None:
        """Close listeners and connections. Unfinished uploads are removed."""
        listeners, self._listeners = self._listeners, []
        self.unauthenticated.drop_all("the agent ends")
        for transport in list(self._http):
            transport.abortConnection()
        if self._carrier is not None:
            self._carrier.abort()
        for listener in listeners:
            await listener.stopListening()
        if self._files is not None:
            self._files.close()

    def warm_up(self) -> None:
        """Load what the first HTTP connection needs. To be called when the agent has nothing better to do."""
        if self._files is None:
            from guest.files.server import FileServer  # late: the agent says hello first

            self._files = FileServer(
                self.reactor,
                self._base_folder,
                secret=self.secret,
                set_clock=self._set_clock,
                describe=self._describe,
            )

    # Called by our connections

    def opened(self, mode: Mode | None, transport: Any, rest: bytes) -> None:
        """A connection has shown the secret."""
        if mode is Mode.STOMP:
            old, self._carrier = self._carrier, None
            if old is not None:
                log.info("the host dialled anew; the older connection goes")
                old.abort()
            reader = _OfferReader(self._offered, lambda: self._carrier_lost(reader))
            self._carrier = reader
            hand_over(transport, reader, rest)
            return
        self.warm_up()
        self._http = [known for known in self._http if known.connected]
        self._http.append(transport)
        if len(self._http) > HTTP_LIMIT:
            self._http.pop(0).abortConnection()
        hand_over(transport, self._files.protocol(), rest)

    # The carrier

    def _offered(self, transport: Any, login: str, passcode: str, rest: bytes) -> None:
        carrier = RelayEnd(self.reactor, lost=lambda: self._carrier_lost(carrier))
        self._carrier = carrier
        hand_over(transport, carrier, rest)
        self._on_broker_offer(login, passcode)

    def _carrier_lost(self, carrier: object) -> None:
        if self._carrier is carrier:
            self._carrier = None

    def _local_end(self) -> RelayEnd:
        return _LocalEnd(self)

    def local_came(self, local: RelayEnd) -> None:
        """The agent's STOMP client has connected."""
        carrier = self._carrier
        if isinstance(carrier, RelayEnd) and not carrier.joined and not carrier.is_lost:
            carrier.join(local)
        else:
            local.abort()


class _LocalEnd(RelayEnd):
    """A connection of the agent's own STOMP client."""

    def __init__(self, server: LinkServer) -> None:
        super().__init__(server.reactor)
        self._server = server

    def connectionMade(self) -> None:  # noqa: N802
        self.transport.setTcpNoDelay(True)
        self._server.local_came(self)


def _factory(make: Callable[[], Protocol]) -> Any:
    factory: Any = Factory()
    factory.noisy = False
    factory.protocol = make
    return factory
