"""The agent's way to the broker: two kinds of link with one interface. Words in and out; what they mean is the agent's.

- DialledLink (default): the host dials the guest. With each dialled-in connection it offers login and passcode of its
  broker; the STOMP client then connects to the guest's own loopback, where LinkServer joins it to that connection. The
  next try is the host's to begin, so there is no reconnecting here.
- BrokerLink (link of protocol 1): dials the broker named in VMConfig.cfg, and again for ever with a bounded back-off.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

from twisted.internet.defer import Deferred

from guest.agent.config import BrokerAddress
from vmcontrol.protocol.messages import REQUESTS, StompMessage
from vmcontrol.stomp.client import StompClient

log = logging.getLogger(__name__)


class Receiver(Protocol):
    """The agent, as its link sees it. Called on the reactor."""

    def link_up(self) -> None: ...
    def link_down(self) -> None: ...
    def receive(self, headers: Mapping[str, str], body: str) -> None: ...


class Link(Protocol):
    """What the agent uses."""

    @property
    def up(self) -> bool: ...
    def send(self, message: StompMessage) -> Deferred[None]:
        """Fires when handed to the socket; errback if there is no connection or too much waits."""

    def close(self) -> Deferred[None]:
        """For good; what was queued is sent first, within limits."""


class _StompLink:
    """What both have in common."""

    def __init__(self, reactor: Any, receiver: Receiver, *, reconnect: bool) -> None:
        self._receiver = receiver
        self._client = StompClient(
            reactor,
            name="agent",
            reconnect=reconnect,
            on_connected=receiver.link_up,
            on_disconnected=self._disconnected,
        )
        self._client.subscribe(REQUESTS, receiver.receive)

    @property
    def up(self) -> bool:
        return self._client.connected

    def send(self, message: StompMessage) -> Deferred[None]:
        return self._client.send(message)

    def close(self) -> Deferred[None]:
        return self._client.close()

    def _disconnected(self, _reason: str) -> None:
        self._receiver.link_down()


class BrokerLink(_StompLink):
    """The link of protocol 1."""

    def __init__(self, reactor: Any, receiver: Receiver, address: BrokerAddress) -> None:
        super().__init__(reactor, receiver, reconnect=True)
        self._address = address

    def open(self) -> None:
        """Start trying."""
        broker = self._address
        self._client.connect(broker.host, broker.port, broker.username, broker.password)


class DialledLink(_StompLink):
    """The default link. `port`: where LinkServer listens for the STOMP client on the guest's loopback."""

    def __init__(self, reactor: Any, receiver: Receiver, port: int) -> None:
        super().__init__(reactor, receiver, reconnect=False)
        self._port = port
        self._trying = False
        self._next: tuple[str, str] | None = None

    def offered(self, login: str, passcode: str) -> None:
        """A dialled-in connection is there; it replaces the one before, whatever became of that."""
        if self._trying:  # the old session must be gone first: it belongs to a connection that is dead
            self._next = (login, passcode)
            self._client.disconnect()
        else:
            self._connect(login, passcode)

    def _connect(self, login: str, passcode: str) -> None:
        self._trying = True
        self._client.connect("127.0.0.1", self._port, login, passcode)

    def _disconnected(self, reason: str) -> None:
        self._trying = False
        super()._disconnected(reason)
        if self._next is not None:
            (login, passcode), self._next = self._next, None
            self._connect(login, passcode)
