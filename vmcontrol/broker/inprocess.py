"""HostMain's own client of its embedded broker: in the same process, without a connection and without threads.

The same interface as the STOMP client for brokers elsewhere (vmcontrol.stomp.client): vmcontrol.guests.conversation
uses either. Nothing waits here: a message is handled while the broker passes it on, so who sends it is read no faster
than it is handled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed

from vmcontrol.broker.embedded import EmbeddedBroker
from vmcontrol.broker.topics import Message, Subscription
from vmcontrol.protocol.messages import StompMessage
from vmcontrol.protocol.text import text_of

log = logging.getLogger(__name__)

Handler = Callable[[Mapping[str, str], str], None]


class InProcessClient:
    """`join`, use, `close`. All on the reactor thread."""

    def __init__(self, broker: EmbeddedBroker, *, name: str) -> None:
        """name: in the log."""
        self.on_connected: Callable[[], None] | None = None
        self.on_disconnected: Callable[[str], None] | None = None
        """Called only when `close` was not: never, as the broker lives as long as we do."""
        self._broker = broker
        self._name = name
        self._handlers: dict[str, Handler] = {}
        self._joined = False

    @property
    def connected(self) -> bool:
        return self._joined

    def join(self) -> None:
        """Subscribe, and be connected from now on."""
        for destination in self._handlers:
            self._broker.topics.subscribe(Subscription(self, destination, None, "auto"))
        self._joined = True
        if self.on_connected is not None:
            self.on_connected()

    def subscribe(self, destination: str, handler: Handler) -> None:
        """Messages of this topic go to `handler`. One handler a topic."""
        self._handlers[destination] = handler
        if self._joined:
            self._broker.topics.subscribe(Subscription(self, destination, None, "auto"))

    def send(self, message: StompMessage) -> Deferred[None]:
        """Fires when it was passed on to the subscribers. Errback: not joined; or it is no text."""
        if not self._joined:
            return fail(ConnectionError(f"{self._name} has not joined the broker"))
        try:
            self._broker.publish(message.destination, message.headers, message.body.encode())
        except UnicodeEncodeError:
            return fail()
        return succeed(None)

    def close(self) -> Deferred[None]:
        """Leave for good. No callback follows."""
        self._joined = False
        self._broker.topics.drop(self)
        return succeed(None)

    # called by the broker

    def deliver(self, message: Message, subscription: Subscription[Any]) -> None:
        handler = self._handlers.get(subscription.destination)
        if handler is None:
            return
        text = text_of(message.body)
        if text is None:
            self._broker.complaints.warning(
                "%s: a message of %d bytes on %s was dropped",
                self._name, len(message.body), subscription.destination,
            )  # fmt: skip
            return
        try:
            handler(message.headers, text)
        except Exception:
            log.exception("%s: a message on %s could not be handled", self._name, subscription.destination)
