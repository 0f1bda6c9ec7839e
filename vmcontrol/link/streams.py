"""Connections that change hands, and pairs of connections joined to one. Used by both ends of the link.

Back-pressure is TCP's own: each end of a pair is the producer of the other's transport, so what one side does not read
is not read from the other either. Nothing is buffered beyond what a transport had in hand when it was told to pause.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import Any

from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure

from vmcontrol.common.eventloop import Clock, TimerHandle

FLUSH_LIMIT_S = 5.0
"""Seconds that the other end of a broken pair gets to take what was written to it."""
KEEPALIVE_IDLE_S = 5
KEEPALIVE_COUNT = 3


def hand_over(transport: Any, protocol: Any, rest: bytes = b"") -> None:
    """From now on `transport` belongs to `protocol`; `rest` is what came already and is its to read."""
    transport.protocol = protocol
    protocol.makeConnection(transport)
    if rest:
        protocol.dataReceived(rest)


def keep_alive(transport: Any) -> None:
    """Small writes at once; and a peer that has vanished (a restored snapshot's) is noticed within 20 s."""
    transport.setTcpNoDelay(True)
    transport.setTcpKeepAlive(True)
    handle = transport.getHandle()
    for option, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_IDLE_S),
        ("TCP_KEEPCNT", KEEPALIVE_COUNT),
    ):
        number = getattr(socket, option, None)
        if number is not None:
            with contextlib.suppress(OSError):
                handle.setsockopt(socket.IPPROTO_TCP, number, value)


class RelayEnd(Protocol):
    """One end of a pair. Bytes that come before it is joined wait, and reading pauses: at most one read's worth.

    `first_bytes` is called once, when bytes are there and no other end is. `lost` is called once, at the end.
    """

    transport: Any = None

    def __init__(
        self,
        clock: Clock,
        *,
        first_bytes: Callable[[], None] | None = None,
        lost: Callable[[], None] | None = None,
    ) -> None:
        self._clock = clock
        self._first_bytes = first_bytes
        self._lost = lost
        self._early = b""
        self._other: RelayEnd | None = None
        self._inner: Any = None
        self.is_lost = False
        self._flush_limit: TimerHandle | None = None

    @property
    def joined(self) -> bool:
        return self._other is not None

    def dataReceived(self, data: bytes) -> None:  # noqa: N802
        if self._other is not None:
            self._other.write(data)
            return
        if self._inner is not None:
            self._inner.dataReceived(data)
            return
        self._early += data
        self.transport.pauseProducing()
        first_bytes, self._first_bytes = self._first_bytes, None
        if first_bytes is not None:
            first_bytes()

    def join(self, other: RelayEnd) -> None:
        """Make a pair of two ends that are connected both."""
        self._pair(other)
        other._pair(self)
        self._release_early()
        other._release_early()

    def hand_to(self, protocol: Any) -> None:
        """Let `protocol` have the transport and all that comes; `lost` is called all the same."""
        if self.is_lost:
            return
        early, self._early = self._early, b""
        self._inner = protocol
        protocol.makeConnection(self.transport)
        self.transport.resumeProducing()
        if early:
            protocol.dataReceived(early)

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    def abort(self) -> None:
        """Close at once, and the other end too."""
        other, self._other = self._other, None
        if not self.is_lost:
            self.transport.abortConnection()
        if other is not None:
            other.abort()

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: N802
        self.is_lost = True
        if self._inner is not None:
            self._inner.connectionLost(reason)
        if self._flush_limit is not None and self._flush_limit.active():
            self._flush_limit.cancel()
        other, self._other = self._other, None
        if other is not None:
            other._finish()
        lost, self._lost = self._lost, None
        if lost is not None:
            lost()

    def _pair(self, other: RelayEnd) -> None:
        self._other = other
        self.transport.registerProducer(other.transport, True)

    def _release_early(self) -> None:
        early, self._early = self._early, b""
        if self._other is None:
            return
        if early:
            self._other.write(early)
        self.transport.resumeProducing()

    def _finish(self) -> None:
        """The other end is gone: send what is written, then close; with a limit, as the peer may not read."""
        self._other = None
        if self.is_lost:
            return
        self.transport.unregisterProducer()
        self.transport.loseConnection()
        if not self.is_lost:
            self._flush_limit = self._clock.callLater(FLUSH_LIMIT_S, self.abort)
