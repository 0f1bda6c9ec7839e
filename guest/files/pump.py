"""Large bodies of the agent's HTTP service, carried between a connection and a file by one thread.

Twisted hands over what one `recv` gave, 64 KiB at most here, through some thirty Python calls; on an emulated processor
that costs as much as the whole of a plain copy. So once a large body has begun (or before it does), the reactor lets go
of the connection, and a thread moves a MiB at a time with blocking calls into one buffer: receive, write, hash. Files
are read and written past the page cache (O_DIRECT) where the file system allows it: that saves a copy, and a guest with
little memory keeps its cache. When the body is over the reactor takes the connection back.

A pump never closes what it was given, and its thread ends at once when `stop` cuts the connection.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from vmcontrol.common.filestream import RunningHash
from vmcontrol.common.threads import defer_to_thread

BUFFER = 1024 * 1024
"""Bytes that are moved at a time."""
BLOCK = 4096
"""What O_DIRECT wants positions and sizes to be multiples of: at least the block size of any usual disk."""
_STAND_IN = bytes(BUFFER)


class _Pump:
    """What both directions share: the connection on loan, the thread, the end."""

    def __init__(self, reactor: Any, transport: Any) -> None:
        self._reactor = reactor
        self._transport = transport
        self._socket: socket.socket = transport.getHandle().dup()
        self._buffer = memoryview(mmap.mmap(-1, BUFFER))
        self._over = False
        self._waiting: list[Deferred[None]] = []

    def _run(self, work: Callable[[], None]) -> None:
        self._transport.pauseProducing()
        self._socket.setblocking(True)  # of the connection itself, not of this descriptor only
        running = defer_to_thread(self._reactor, work)
        running.addBoth(self._ended)

    def stop(self) -> None:
        """Cut the connection. The thread ends soon; see `ended`."""
        if not self._over:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def ended(self) -> Deferred[None]:
        """Fires when no thread uses file and connection any more."""
        done: Deferred[None] = Deferred()
        if self._over:
            done.callback(None)
        else:
            self._waiting.append(done)
        return done

    def _ended(self, outcome: object) -> None:
        self._give_back()
        self._closing(outcome.value if isinstance(outcome, Failure) else None)
        waiting, self._waiting = self._waiting, []
        for done in waiting:
            done.callback(None)

    def _give_back(self) -> None:
        if self._over:
            return
        self._over = True
        with contextlib.suppress(OSError):
            self._socket.setblocking(False)
        self._socket.close()
        if self._transport.connected:
            self._transport.resumeProducing()

    def _closing(self, error: BaseException | None) -> None:
        raise NotImplementedError


class ReceivingPump(_Pump):
    """From a connection to a file: `count` bytes, to `position` and on.

    arrived(n): n more bytes are written. failed(error): the disk's error, after which nothing more comes. A connection
    that breaks is no error: it just ends, and what had come is written.
    """

    def __init__(
        self,
        reactor: Any,
        transport: Any,
        *,
        fd: int,
        position: int,
        count: int,
        digest: RunningHash,
        arrived: Callable[[int], None],
        failed: Callable[[OSError], None],
    ) -> None:
        super().__init__(reactor, transport)
        self._fd = fd
        self._position = position
        self._left = count
        self._digest = digest
        self._arrived = arrived
        self._failed = failed
        self._run(self._work)

    def _work(self) -> None:
        direct = _open_direct(self._fd, os.O_WRONLY)
        try:
            position, left = self._position, self._left
            while left:
                # The first piece ends at a multiple of BUFFER, so all others begin at one.
                view = self._buffer[: min(BUFFER - position % BUFFER, left)]
                got = self._receive(view)
                if got:
                    self._write(direct, view[:got], position)
                    self._digest.feed(position, view[:got])
                    position, left = position + got, left - got
                    self._reactor.callFromThread(self._tell, got, last=not left)
                if got < len(view):
                    return
        finally:
            if direct is not None:
                os.close(direct)

    def _receive(self, view: memoryview) -> int:
        got = 0
        with contextlib.suppress(OSError):
            while got < len(view) and (more := self._socket.recv_into(view[got:], 0, socket.MSG_WAITALL)):
                got += more
        return got

    def _write(self, direct: int | None, view: memoryview, position: int) -> None:
        done = 0
        if direct is not None and position % BLOCK == 0:
            whole = len(view) - len(view) % BLOCK
            if whole:
                with contextlib.suppress(OSError):  # whatever it was, the ordinary way says it better
                    done = os.pwrite(direct, view[:whole], position)
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], position + done)

    def _tell(self, count: int, *, last: bool) -> None:
        if last:
            self._give_back()  # before the request is complete, and answered
        self._arrived(count)

    def _closing(self, error: BaseException | None) -> None:
        if error is not None:
            self._failed(error if isinstance(error, OSError) else OSError(str(error)))


class SendingPump(_Pump):
    """From a file to a connection: `head`, then bytes [position, end). over(error): None when all is sent."""

    def __init__(
        self,
        reactor: Any,
        transport: Any,
        *,
        head: bytes,
        fd: int,
        position: int,
        end: int,
        digest: RunningHash,
        over: Callable[[BaseException | None], None],
    ) -> None:
        super().__init__(reactor, transport)
        self._head = head
        self._fd = fd
        self._position = position
        self._end = end
        self._digest = digest
        self._over_callback = over
        self._run(self._work)

    def _work(self) -> None:
        direct = _open_direct(self._fd, os.O_RDONLY)
        try:
            self._socket.sendall(self._head)
            position = self._position
            while position < self._end:
                # The first piece ends at a multiple of BUFFER, so all others begin at one.
                count = min(BUFFER - position % BUFFER, self._end - position)
                got = self._read(direct, position, count)
                if not got:
                    raise EOFError("the file became shorter")
                self._digest.feed(position, self._buffer[:got])
                self._socket.sendall(self._buffer[:got])
                position += got
        finally:
            if direct is not None:
                os.close(direct)

    def _read(self, direct: int | None, position: int, count: int) -> int:
        """Into the buffer; how much that was, 0 at the file's end."""
        if direct is not None and position % BLOCK == 0:
            whole = count + -count % BLOCK  # at the end of the file less comes
            with contextlib.suppress(OSError):  # whatever it was, the ordinary way says it better
                return min(count, os.preadv(direct, [self._buffer[:whole]], position))
        return os.preadv(self._fd, [self._buffer[:count]], position)

    def _closing(self, error: BaseException | None) -> None:
        self._over_callback(error)


def stand_in(count: int) -> bytes:
    """As many bytes as were moved, for a parser that counts them; at most BUFFER, and no copy of so many."""
    return _STAND_IN[:count]


def _open_direct(fd: int, mode: int) -> int | None:
    """The same file for reading or writing past the page cache; None where that cannot be."""
    try:
        return os.open(f"/proc/self/fd/{fd}", mode | os.O_DIRECT | os.O_CLOEXEC)
    except (OSError, AttributeError):  # a file system, or a system, without it
        return None
