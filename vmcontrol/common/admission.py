"""Who may stay connected to a TCP port that everybody on the computer can reach.

Whoever has not shown yet who he is waits in a small pool, for a short time, and the oldest goes when another one comes;
who has shown it is not counted there. Descriptors are kept back for those and for our own work: a connection that
would take one of the last is closed at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from twisted.internet import tcp

from vmcontrol.common.eventloop import Clock, TimerHandle

C = TypeVar("C")

ACCEPTS_AT_ONCE = 16
"""Between two looks at what those that are connected have said: one that speaks at once is heard in a pool of 32."""
ACCEPT_AGAIN_S = 0.2
"""After a try that gave no connection (no descriptor, no memory): the port stays readable, and we would try at once."""
DESCRIPTORS_KEPT_BACK = 64
"""For the wrapper's calls, for files, and for the hypervisor's processes: a few for each VM."""


class Newcomers(Generic[C]):
    """Connections that have not shown who they are: at most `most`, each for at most `limit_s`.

    Nor do they take more than a quarter of the descriptors.
    """

    def __init__(self, clock: Clock, *, most: int, limit_s: float, drop: Callable[[C, str], None]) -> None:
        """drop: ends a connection; gets a reason."""
        self._clock = clock
        self._most = most
        self._limit_s = limit_s
        self._drop = drop
        self._timers: dict[C, TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._timers)

    def add(self, connection: C) -> None:
        """It has just been accepted."""
        most = min(self._most, max(1, _descriptors() // 4))
        while len(self._timers) >= most:
            self._end(next(iter(self._timers)), f"{most} others that have not shown a secret came after it")
        why = f"it has not shown the secret within {self._limit_s:g} s"
        self._timers[connection] = self._clock.callLater(self._limit_s, self._end, connection, why)

    def discard(self, connection: C) -> None:
        """It has shown who it is, or is gone. Harmless for others."""
        timer = self._timers.pop(connection, None)
        if timer is not None and timer.active():
            timer.cancel()

    def drop_all(self, why: str) -> None:
        """The port is closed."""
        while self._timers:
            self._end(next(iter(self._timers)), why)

    def _end(self, connection: C, why: str) -> None:
        self.discard(connection)
        self._drop(connection, why)


class Port(tcp.Port):
    """A listening port that leaves descriptors to others, and is patient when there are none."""

    def doRead(self) -> None:  # noqa: N802
        self.numberAccepts = min(self.numberAccepts, ACCEPTS_AT_ONCE)
        before = self.sessionno
        super().doRead()  # type: ignore[no-untyped-call]
        if self.sessionno == before and self.connected:
            self.stopReading()  # type: ignore[no-untyped-call]
            self.reactor.callLater(ACCEPT_AGAIN_S, self._go_on)

    def _go_on(self) -> None:
        if self.connected and not self.disconnecting:
            self.startReading()  # type: ignore[no-untyped-call]


def listen(reactor: Any, port: int, factory: Any, *, interface: str, backlog: int = 50) -> Any:
    """As reactor.listenTCP. Raises twisted.internet.error.CannotListenError."""
    listening = Port(port, factory, backlog, interface, reactor)
    listening.startListening()
    return listening


def descriptors_are_short(fd: int) -> bool:
    """Whether this new descriptor is one of the last: the system gives the lowest number that is free."""
    limit = _descriptors()
    return fd >= max(limit - DESCRIPTORS_KEPT_BACK, limit // 2)


def _descriptors() -> int:
    """How many this process may have."""
    if sys.platform == "win32":
        return sys.maxsize
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit
