"""A broker outside of this process, as the links to guests see it: where an agent's STOMP session is carried to."""

from __future__ import annotations

from typing import Any

from twisted.internet.endpoints import HostnameEndpoint, connectProtocol

from vmcontrol.link.streams import RelayEnd, keep_alive

BROKER_CONNECT_LIMIT_S = 5.0


class OuterBroker:
    """A broker at an address."""

    def __init__(self, reactor: Any, host: str, port: int, login: str, passcode: str) -> None:
        self.login, self.passcode = login, passcode
        self._reactor = reactor
        self._host, self._port = host, port

    async def carry(self, carrier: RelayEnd, name: str) -> None:  # noqa: ARG002 (the embedded broker logs it)
        """Join the carrier, whose agent has begun to speak, to a new connection there. Raises what connecting does."""
        to_broker = RelayEnd(self._reactor)
        await connectProtocol(
            HostnameEndpoint(self._reactor, self._host, self._port, timeout=BROKER_CONNECT_LIMIT_S), to_broker
        )
        keep_alive(to_broker.transport)
        if carrier.is_lost:
            to_broker.abort()
        else:
            carrier.join(to_broker)
