"""A TCP proxy that does what networks do: cuts connections, changes bytes, swallows them. For tests of the link."""

from dataclasses import dataclass, field
from typing import Any

from twisted.internet.protocol import ClientFactory, Factory, Protocol


@dataclass
class Trouble:
    """What happens to one direction, counted over all connections. Each number is taken off when it has happened."""

    cut_after: list[int] = field(default_factory=list)
    """Bytes after which the connection is cut; the next number counts from there."""
    flip_at: list[int] = field(default_factory=list)
    """Positions (in all bytes of the direction) of bytes that change."""
    seen: int = 0
    since_cut: int = 0

    def apply(self, data: bytes) -> tuple[bytes, bool]:
        start = self.seen
        for position in list(self.flip_at):
            if start <= position < start + len(data):
                changed = bytearray(data)
                changed[position - start] ^= 1
                data = bytes(changed)
                self.flip_at.remove(position)
        cut = bool(self.cut_after) and self.since_cut + len(data) >= self.cut_after[0]
        if cut:
            data = data[: self.cut_after.pop(0) - self.since_cut]
        self.since_cut = 0 if cut else self.since_cut + len(data)
        self.seen += len(data)
        return data, cut


class _End(Protocol):
    transport: Any = None
    other: Any = None

    def __init__(self, trouble: Trouble) -> None:
        self.trouble = trouble

    def dataReceived(self, data: bytes) -> None:
        data, cut = self.trouble.apply(data)
        if self.other is None:
            return
        self.other.transport.write(data)
        if cut:
            self.other.finish()
            self.transport.abortConnection()

    def connectionLost(self, reason: object = None) -> None:
        if self.other is not None:
            self.other.finish()

    def finish(self) -> None:
        """Send what is written, then close. A producer that is gone would keep Twisted from closing."""
        self.transport.unregisterProducer()
        self.transport.loseConnection()


class Proxy:
    """Listens on a free port of loopback and leads to `target`; `refuse`: close at once, as a port forward does."""

    def __init__(self, reactor: Any, target: tuple[str, int]) -> None:
        self.reactor = reactor
        self.target = target
        self.to_guest = Trouble()
        self.to_host = Trouble()
        self.refuse = False
        self.mute = False
        self.accepted = 0
        self._ends: list[_End] = []
        factory: Any = Factory()
        factory.buildProtocol = self._accept
        self._listener = reactor.listenTCP(0, factory, interface="127.0.0.1")
        self.address = ("127.0.0.1", self._listener.getHost().port)

    def _accept(self, _address: object) -> Protocol:
        self.accepted += 1
        near = _End(self.to_guest)
        near.connectionMade = lambda: self._connect(near)  # type: ignore[method-assign]
        self._ends.append(near)
        return near

    def _connect(self, near: _End) -> None:
        if self.refuse:
            near.transport.abortConnection()
            return
        if self.mute:
            return  # accepted, and never anything else
        near.transport.pauseProducing()
        far = _End(self.to_host)
        self._ends.append(far)

        def made() -> None:
            near.other, far.other = far, near
            near.transport.registerProducer(far.transport, True)
            far.transport.registerProducer(near.transport, True)
            near.transport.resumeProducing()

        far.connectionMade = made  # type: ignore[method-assign]
        factory: Any = ClientFactory()
        factory.buildProtocol = lambda _: far
        factory.clientConnectionFailed = lambda *_: near.transport.abortConnection()
        self.reactor.connectTCP(*self.target, factory)

    def cut_all(self) -> None:
        for end in self._ends:
            if end.transport is not None:
                end.transport.abortConnection()
        self._ends.clear()

    async def close(self) -> None:
        self.cut_all()
        await self._listener.stopListening()
