"""What waits to be read by one client of the embedded broker: bounded, and without copies of large bodies.

Owns the queue between the broker and one transport. It is the transport's producer, so Twisted's own buffer stays at
about 64 KiB and everything else waits here, where it is counted. Never decides what happens to a client that does not
read; it tells its owner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from twisted.internet.interfaces import IPushProducer
from zope.interface import implementer

CHUNK_BYTES = 64 * 1024
"""Written to the transport in one go: what Twisted buffers before it asks for a pause (FileDescriptor.bufferSize)."""


@implementer(IPushProducer)
class Outbox:
    """Pieces of bytes on their way to one client."""

    def __init__(self, transport: Any, *, changed: Callable[[int], None], progressed: Callable[[], None]) -> None:
        """`changed` gets every change of `waiting` in bytes; `progressed`: the client has read something."""
        self.waiting = 0
        """Bytes in the queue."""
        self._transport = transport
        self._changed = changed
        self._progressed = progressed
        self._queue: deque[bytes | memoryview] = deque()
        self._paused = False
        self._stopped = False
        transport.registerProducer(self, True)

    def send(self, pieces: Iterable[bytes]) -> None:
        """Queue them, and write what the transport takes now."""
        if self._stopped:
            return
        before = self.waiting
        for piece in pieces:
            self._queue.append(memoryview(piece) if len(piece) > CHUNK_BYTES else piece)
            self.waiting += len(piece)
        self._pump()
        if self.waiting != before:
            self._changed(self.waiting - before)

    def clear(self) -> None:
        """Forget what waits; nothing is sent any more."""
        self._stopped = True
        self._queue.clear()
        waiting, self.waiting = self.waiting, 0
        if waiting:
            self._changed(-waiting)

    def _pump(self) -> None:
        while self._queue and not self._paused:
            piece = self._queue.popleft()
            if len(piece) > CHUNK_BYTES:
                self._queue.appendleft(piece[CHUNK_BYTES:])
                piece = piece[:CHUNK_BYTES]
            self.waiting -= len(piece)
            self._transport.write(bytes(piece))

    # IPushProducer, called by the transport
    def pauseProducing(self) -> None:  # noqa: N802
        self._paused = True

    def resumeProducing(self) -> None:  # noqa: N802
        self._paused = False
        if self._stopped:
            return
        before = self.waiting
        self._pump()
        if self.waiting != before:
            self._changed(self.waiting - before)
        self._progressed()

    def stopProducing(self) -> None:  # noqa: N802
        self.clear()
