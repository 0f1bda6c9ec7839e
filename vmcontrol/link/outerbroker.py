"""A broker outside of this process, as the links to guests see it: where an agent's STOMP session is carried to."""

from __future__ import annotations

import threading
from typing import Any

from twisted.internet.endpoints import HostnameEndpoint, connectProtocol

from vmcontrol.common.ownbroker import JobsPrograms
from vmcontrol.common.threads import defer_to_thread
from vmcontrol.link.streams import RelayEnd, keep_alive

BROKER_CONNECT_LIMIT_S = 5.0


class OuterBroker:
    """A broker at an address. It does not tell guests apart; the embedded one does (vmcontrol.broker.rights)."""

    def __init__(
        self,
        reactor: Any,
        host: str,
        port: int,
        login: str,
        passcode: str,
        *,
        programs: JobsPrograms | None = None,
    ) -> None:
        """programs: whose broker it has to be."""
        self.login, self.passcode = login, passcode
        self._reactor = reactor
        self._host, self._port = host, port
        self._programs = programs

    async def carry(self, carrier: RelayEnd, name: str, guest: str = "") -> None:  # noqa: ARG002 (see below)
        """Join the carrier, whose agent has begun to speak, to a new connection there. Raises what connecting does."""
        to_broker = RelayEnd(self._reactor)
        await connectProtocol(
            HostnameEndpoint(self._reactor, self._host, self._port, timeout=BROKER_CONNECT_LIMIT_S), to_broker
        )
        keep_alive(to_broker.transport)
        try:
            await self._look_whose(to_broker)
        except BaseException:
            to_broker.abort()
            raise
        if carrier.is_lost:
            to_broker.abort()
        else:
            carrier.join(to_broker)

    async def _look_whose(self, to_broker: RelayEnd) -> None:
        """Raises NotOurBroker; nothing was said to it then."""
        if self._programs is None:
            return
        here, there = to_broker.transport.getHost(), to_broker.transport.getPeer()
        stop = threading.Event()
        try:
            look = self._programs.wait_in_thread
            await defer_to_thread(self._reactor, look, (here.host, here.port), (there.host, there.port), stop)
        finally:
            stop.set()
