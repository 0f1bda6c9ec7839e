"""A connection that was dialled to an agent, until its handshake has ended. Owns the connection as long."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure

from vmcontrol.link.streams import keep_alive
from vmcontrol.protocol.handshake import HostHandshake, Outcome

log = logging.getLogger(__name__)


class DialledTry(Protocol):
    """One dialled connection until its handshake ends."""

    transport: Any = None

    def __init__(
        self,
        handshake: HostHandshake,
        opened: Callable[[DialledTry, bytes], None],
        failed: Callable[[DialledTry], None],
        *,
        since: float,
        proved: Callable[[DialledTry], None] | None = None,
    ) -> None:
        """opened: gets the bytes that came after the handshake. proved: the agent has shown the secret. since: Clock
        seconds. Exactly one of `opened` and `failed` is called."""
        self._handshake = handshake
        self._opened = opened
        self._failed = failed
        self._proved = proved
        self.over = False
        self.since = since
        self.chosen = False
        self.connecting: Deferred[object] | None = None

    @property
    def by_token(self) -> bool:
        """The agent has shown the token: the secret is still to be given to it."""
        return self._handshake.by_token

    def connectionMade(self) -> None:  # noqa: N802
        if self.over:
            self.abort()
            return
        keep_alive(self.transport)
        self.transport.write(self._handshake.opening)

    def dataReceived(self, data: bytes) -> None:  # noqa: N802
        if self.over:
            return
        step = self._handshake.receive(data)
        if step.send:
            self.transport.write(step.send)
            if self._proved is not None:
                self._proved(self)
        if step.outcome is Outcome.OPEN:
            self.over = True
            self._opened(self, step.rest)
        elif step.outcome is Outcome.DENIED:
            log.debug("a handshake was denied")
            self.abort()

    def abort(self) -> None:
        """Give it up: `failed` is called, if it was not over."""
        if self.transport is not None:
            self.transport.abortConnection()
        elif self.connecting is not None:
            self.connecting.cancel()
        self._over()

    def connectionLost(self, reason: Failure | None = None) -> None:  # noqa: N802, ARG002
        self._over()

    def _over(self) -> None:
        if not self.over:
            self.over = True
            self._failed(self)
