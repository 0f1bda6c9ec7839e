"""Files to and from connections, hashed on the way, with bounded memory. Used by both ends of a transfer.

Disk and SHA-256 are worked on in a thread of the reactor's pool, one chunk at a time, while the connection is served:
hashing lets go of Python's lock. Back-pressure goes both ways: a sender stops when its consumer says so, a receiver
pauses its producer while the disk is behind. At most about 3 CHUNKs are in memory for each transfer.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from vmcontrol.common.threads import defer_to_thread

CHUNK = 512 * 1024
"""Bytes that are read, or written, and hashed at a time."""
FLUSH_EVERY = 32 * 1024 * 1024
"""Bytes after which what was written is pushed to the disk, so that the last fsync does not take all at once."""


def read_at(fd: int, size: int, offset: int) -> bytes:
    """os.pread, also where there is none (Windows). One thread at a time uses a descriptor here."""
    if hasattr(os, "pread"):
        return os.pread(fd, size, offset)
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, size)


def write_at(fd: int, data: memoryview, offset: int) -> int:
    """os.pwrite, also where there is none."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    os.lseek(fd, offset, os.SEEK_SET)
    return os.write(fd, data)


ALGORITHMS = {"sha256": "SHA-256", "sha512": "SHA-512"}
"""What a copy may be confirmed by: SHA-256, or SHA-512, which an emulated processor computes in half the time."""


class RunningHash:
    """Digests of the first `position` bytes of a file, fed in any order that does not leave a gap."""

    def __init__(self, algorithm: str = "sha256") -> None:
        self.position = 0
        self._hashes = {algorithm: hashlib.new(algorithm)}
        self._lock = threading.Lock()

    def also(self, algorithm: str) -> None:
        """Compute this digest too; nothing when it is computed already. ValueError after the first byte."""
        with self._lock:
            if algorithm not in self._hashes:
                if self.position:
                    raise ValueError(f"too late to begin with {algorithm}")
                self._hashes[algorithm] = hashlib.new(algorithm)

    def feed(self, offset: int, data: bytes | memoryview) -> None:
        """Bytes of the file at `offset`; what is known already is skipped, what comes after a gap is ignored."""
        with self._lock:  # a file may be on its way twice
            skip = self.position - offset
            if 0 <= skip < len(data):
                news = memoryview(data)[skip:] if skip else data
                for one in self._hashes.values():
                    one.update(news)
                self.position = offset + len(data)

    def catch_up(self, fd: int, until: int) -> None:
        """Read what is missing up to `until` from the file. EOFError: it is shorter. Blocks; for threads."""
        while self.position < until:
            offset = self.position
            data = read_at(fd, min(CHUNK, until - offset), offset)
            if not data:
                raise EOFError("the file became shorter")
            self.feed(offset, data)

    def hexdigest(self, algorithm: str = "sha256") -> str:
        return self._hashes[algorithm].hexdigest()


class FileSender:
    """Writes bytes [offset, end) of a file to a consumer. A push producer; also usable as a request body.

    The file descriptor stays the caller's. `start` returns a Deferred that fires with None when all is written to the
    consumer, and fails with OSError, EOFError (the file became shorter), or CancelledError.
    """

    def __init__(
        self,
        reactor: Any,
        fd: int,
        offset: int,
        end: int,
        *,
        digest: RunningHash | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._reactor = reactor
        self._fd = fd
        self._next = offset
        self._end = end
        self._digest = digest
        self._progress = progress
        self._paused = False
        self._stopped = False
        self._ready: bytes | None = None
        self._reading = False
        self._consumer: Any = None
        self._done: Deferred[None] = Deferred(lambda _: self._stop())
        self.idle: Deferred[None] | None = None
        self.length = end - offset

    def start(self, consumer: Any) -> Deferred[None]:
        self._consumer = consumer
        self._go_on()
        return self._done

    # IPushProducer, IBodyProducer

    def startProducing(self, consumer: Any) -> Deferred[None]:  # noqa: N802
        return self.start(consumer)

    def pauseProducing(self) -> None:  # noqa: N802
        self._paused = True

    def resumeProducing(self) -> None:  # noqa: N802
        self._paused = False
        self._go_on()

    def stopProducing(self) -> None:  # noqa: N802
        """The consumer is gone; Twisted's client does not want to hear from us any more."""
        self._stop()

    def cancel(self) -> None:
        """Stop: `start`'s Deferred fails with CancelledError."""
        self._done.cancel()

    def when_idle(self) -> Deferred[None]:
        """Fires when no thread uses the file any more."""
        idle: Deferred[None] = Deferred()
        if self._reading:
            self.idle = idle
        else:
            idle.callback(None)
        return idle

    def _stop(self) -> None:
        self._stopped = True
        self._ready = None

    def _go_on(self) -> None:
        """Write what is ready, and have the next chunk read meanwhile."""
        if self._stopped or self._consumer is None:
            return
        if self._ready is not None and not self._paused:
            data, self._ready = self._ready, None
            self._read_ahead()
            self._consumer.write(data)
            if self._progress is not None:
                self._progress(len(data))
        if self._next >= self._end and self._ready is None and not self._reading:
            if not self._stopped and not self._done.called:
                self._stopped = True
                self._done.callback(None)
            return
        self._read_ahead()

    def _read_ahead(self) -> None:
        if self._reading or self._ready is not None or self._stopped or self._next >= self._end:
            return
        self._reading = True
        size = min(CHUNK, self._end - self._next)
        reading = defer_to_thread(self._reactor, self._read, self._next, size)
        reading.addCallbacks(self._have, self._failed)

    def _read(self, offset: int, size: int) -> bytes:
        data = read_at(self._fd, size, offset)
        if not data:
            raise EOFError("the file became shorter")
        if self._digest is not None:
            self._digest.feed(offset, data)
        return data

    def _have(self, data: bytes) -> None:
        self._not_reading()
        if self._stopped:
            return
        self._next += len(data)
        self._ready = data
        self._go_on()

    def _failed(self, failure: Failure) -> None:
        self._not_reading()
        if not self._stopped:
            self._stopped = True
            self._done.errback(failure)

    def _not_reading(self) -> None:
        self._reading = False
        idle, self.idle = self.idle, None
        if idle is not None:
            idle.callback(None)


class FileReceiver:
    """Writes bytes that arrive to a file, from `position` on, and hashes them.

    `position` counts what is on its way to the disk safely (written, not synced). The descriptor stays the caller's
    and may be closed when `drain` has fired. An OSError is kept in `error` and what comes after it is dropped.
    """

    def __init__(self, reactor: Any, fd: int, *, position: int = 0, digest: RunningHash | None = None) -> None:
        self._reactor = reactor
        self._fd = fd
        self.position = position
        self.digest = digest or RunningHash()
        self.error: OSError | None = None
        self.on_written: Callable[[int], None] | None = None
        """Called with the number of bytes after each write."""
        self._pending: list[bytes] = []
        self._pending_size = 0
        self._writing = False
        self._flushed = position
        self._producer: Any = None
        self._producer_paused = False
        self._drained: list[Deferred[None]] = []

    def set_producer(self, producer: Any) -> None:
        """Who is paused while the disk is behind; None: nobody any more."""
        if producer is None:
            self._let_produce()
        self._producer = producer
        self._producer_paused = False

    @property
    def busy(self) -> bool:
        """Something that came is not written yet."""
        return self._writing or bool(self._pending)

    def write(self, data: bytes) -> None:
        if self.error is not None:
            return
        self._pending.append(data)
        self._pending_size += len(data)
        if self._pending_size >= CHUNK and not self._writing:
            self._write_pending()
        elif self._pending_size >= 2 * CHUNK and self._producer is not None and not self._producer_paused:
            self._producer_paused = True
            self._producer.pauseProducing()

    def drain(self) -> Deferred[None]:
        """Fires when everything that came is written, or failed (see `error`)."""
        done: Deferred[None] = Deferred()
        self._drained.append(done)
        if not self._writing:
            self._write_pending()
        return done

    def _write_pending(self) -> None:
        pending, self._pending = self._pending, []
        self._pending_size = 0
        if not pending:
            self._end_of_writing()
            return
        self._writing = True
        writing = defer_to_thread(self._reactor, self._write, pending, self.position)
        writing.addCallbacks(self._written, self._failed)

    def _write(self, pieces: list[bytes], offset: int) -> int:
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        view = memoryview(data)
        done = 0
        while done < len(data):
            done += write_at(self._fd, view[done:], offset + done)
        self.digest.feed(offset, data)
        if offset + done - self._flushed >= FLUSH_EVERY and hasattr(os, "fdatasync"):
            os.fdatasync(self._fd)
            self._flushed = offset + done
        return done

    def _written(self, count: int) -> None:
        self._writing = False
        self.position += count
        if self.on_written is not None:
            self.on_written(count)
        if self._pending_size >= CHUNK or self._drained:
            self._write_pending()
        self._let_produce()

    def _failed(self, failure: Failure) -> None:
        self._writing = False
        error = failure.value
        self.error = error if isinstance(error, OSError) else OSError(str(error))
        self._pending.clear()
        self._pending_size = 0
        self._let_produce()
        self._end_of_writing()

    def _let_produce(self) -> None:
        if self._producer_paused and self._producer is not None:
            self._producer_paused = False
            self._producer.resumeProducing()

    def _end_of_writing(self) -> None:
        drained, self._drained = self._drained, []
        for done in drained:
            done.callback(None)
