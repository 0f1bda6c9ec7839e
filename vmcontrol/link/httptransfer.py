"""Files to and from a guest by HTTP over its link. The agent's end is guest.fileserver; docs/file-transfer.md.

A transfer that breaks goes on where it stopped. It is given up after TRIES tries in a row that moved nothing, after
DAMAGED_TRIES copies whose SHA-256 differs, or when the guest says that it cannot be. A try that moves no byte for
STALL_LIMIT_S is broken off; that time, like all here, counts only while the link is not paused.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Protocol
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone

from vmcontrol import eventloop
from vmcontrol.atomicfile import fsync_folder
from vmcontrol.eventloop import Clock, TimerHandle
from vmcontrol.files import (
    Entry,
    FileMissing,
    LocalFileMissing,
    Progress,
    TransferFailed,
    TransferResult,
)
from vmcontrol.link.dialler import GuestLink
from vmcontrol.link.filestream import ALGORITHMS, CHUNK, FileReceiver, FileSender, RunningHash, read_at
from vmcontrol.link.guesthttp import BytesBody
from vmcontrol.link.linkerrors import GuestRefused, LinkDown

log = logging.getLogger(__name__)

TRIES = 10
"""Tries in a row that move no byte."""
ALL_TRIES = 200
"""Tries of one transfer in all."""
DAMAGED_TRIES = 3
"""Copies whose SHA-256 differs, or of a file that changes while it is copied."""
WAIT_S = 0.1
WAIT_MOST_S = 3.0
"""Seconds between tries: doubled each time, up to the latter."""
STALL_LIMIT_S = 60.0
ASK_LIMIT_S = 30.0
"""Seconds for a small answer."""
SYNC_RATE = 2 * 1024 * 1024
"""Bytes a second that the guest's disk is expected to sync at least, or to hash."""
SMALL = CHUNK
"""Bytes up to which a file goes to the guest in one request."""


class _Broken(Exception):  # noqa: N818
    """This try ended; the transfer goes on."""


class _Damaged(Exception):  # noqa: N818
    """What arrived is not what was sent: from the beginning."""


class _Stall:
    """Cancels `target` when nothing moved for STALL_LIMIT_S."""

    def __init__(self, clock: Clock, break_off: Callable[[], object]) -> None:
        self._clock = clock
        self._break_off = break_off
        self._moved = clock.seconds()
        self._timer: TimerHandle = clock.callLater(STALL_LIMIT_S, self._look)
        self.stalled = False

    def moved(self) -> None:
        self._moved = self._clock.seconds()

    def end(self) -> None:
        if self._timer.active():
            self._timer.cancel()

    def _look(self) -> None:
        left = self._moved + STALL_LIMIT_S - self._clock.seconds()
        if left > 0:
            self._timer = self._clock.callLater(left, self._look)
        else:
            self.stalled = True
            self._break_off()


class _Tries:
    """Counts what failed and waits between tries."""

    def __init__(self, clock: Clock, what: str) -> None:
        self._clock = clock
        self._what = what
        self._fruitless = 0
        self._damaged = 0
        self._position = -1
        self.count = 1

    async def after_break(self, error: Exception, position: int) -> None:
        """Wait for the next try. TransferFailed when there is none. `position`: bytes that are over by now."""
        self.count += 1
        self._fruitless = 0 if position > self._position else self._fruitless + 1
        self._position = position
        if self._fruitless >= TRIES or self.count > ALL_TRIES:
            raise TransferFailed(f"{self._what}: given up after {self.count - 1} tries: {error}") from error
        log.info("%s: broke at byte %d: %s; going on", self._what, position, error)
        await eventloop.sleep(self._clock, min(WAIT_MOST_S, WAIT_S * 2**self._fruitless))

    def after_damage(self, error: Exception) -> None:
        self.count += 1
        self._damaged += 1
        self._position = -1
        if self._damaged >= DAMAGED_TRIES:
            raise TransferFailed(f"{self._what}: given up after {self._damaged} copies: {error}") from error
        log.warning("%s: %s; from the beginning", self._what, error)


class HttpTransfer:
    """FileTransfer over a GuestLink. Any number of copies at a time."""

    def __init__(self, link: GuestLink) -> None:
        self._link = link
        self._clock = link.clock
        self._reactor = link.reactor

    async def put(
        self, local: Path, remote: str, *, mode: int | None = None, progress: Progress | None = None
    ) -> TransferResult:
        """See FileTransfer.put. LocalFileMissing, TransferFailed."""
        started = self._reactor.seconds()
        try:
            fd = os.open(local, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            raise LocalFileMissing(local, error.strerror or str(error)) from error
        try:
            status = os.fstat(fd)
            if not local.is_file():
                raise LocalFileMissing(local, "is no regular file")
            bits = mode if mode is not None else (0o755 if status.st_mode & 0o111 else 0o644)
            upload = _Put(self._link, fd, remote, size=status.st_size, mode=bits, progress=progress or _no_progress)
            sha256, tries = await (upload.run_small() if status.st_size <= SMALL else upload.run())
            if os.fstat(fd).st_size != status.st_size:
                raise TransferFailed(f"{local}: its size changed while it was copied")
        finally:
            os.close(fd)
        return TransferResult(status.st_size, sha256, self._reactor.seconds() - started, tries)

    async def get(self, remote: str, local: Path, *, progress: Progress | None = None) -> TransferResult:
        """See FileTransfer.get. FileMissing, TransferFailed."""
        started = self._reactor.seconds()
        try:
            fd, temporary = tempfile.mkstemp(prefix=f".{local.name[:100]}.", suffix=".part", dir=local.parent)
        except OSError as error:
            raise TransferFailed(f"{local}: {error.strerror or error}") from error
        try:
            download = _Get(self._link, fd, remote, progress or _no_progress)
            try:
                sha256, size, tries = await download.run()
                await _in_thread(self._reactor, _put_in_place, fd, Path(temporary), local)
            finally:
                os.close(fd)
        except BaseException as error:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            if isinstance(error, OSError):
                raise TransferFailed(f"{local}: {error.strerror or error}") from error
            raise
        return TransferResult(size, sha256, self._reactor.seconds() - started, tries)


def _no_progress(_done: int, _total: int) -> None:
    """When nobody wants to know."""


class _Put:
    """One copy to the guest."""

    def __init__(self, link: GuestLink, fd: int, remote: str, *, size: int, mode: int, progress: Progress) -> None:
        self._link = link
        self._fd = fd
        self._size = size
        self._remote = remote
        self._mode = f"{mode & 0o777:o}"
        self._progress = progress
        self._tries = _Tries(link.clock, f"{remote} to {link.name}")
        self._digest = RunningHash()
        self._algorithm = "sha256"
        """What the guest wants the copy confirmed by."""

    async def run_small(self) -> tuple[str, int]:
        """The whole file in one request."""
        content = b""
        while len(content) < self._size:
            piece = read_at(self._fd, self._size - len(content), len(content))
            if not piece:
                raise TransferFailed(f"{self._remote}: the file became shorter while it was copied")
            content += piece
        self._digest.feed(0, content)
        sha256 = self._digest.hexdigest()
        query = {"path": self._remote, "sha256": sha256, "mode": self._mode}
        while True:
            try:
                http = self._link.requests
                response = await http.send(
                    "PUT", "/v1/files", query=query, body=BytesBody(content), limit=STALL_LIMIT_S
                )
                await http.answer(response, f"PUT {self._remote}", limit=ASK_LIMIT_S)
            except LinkDown as error:
                await self._tries.after_break(error, -1)
            except GuestRefused as error:
                if error.status != 422:
                    raise TransferFailed(str(error)) from error
                self._tries.after_damage(error)
            else:
                self._progress(self._size, self._size)
                return sha256, self._tries.count

    async def run(self) -> tuple[str, int]:
        transfer = secrets.token_hex(8)
        while True:
            have = 0
            try:
                have = await self._begin(transfer)
                if have < self._size:
                    have = await self._send(transfer, have)
                return await self._commit(transfer), self._tries.count
            except (LinkDown, _Broken) as error:
                await self._tries.after_break(error, have)
            except _Damaged as error:
                self._tries.after_damage(error)
                transfer = secrets.token_hex(8)
                self._digest = RunningHash()
            except GuestRefused as error:
                if error.status not in (404, 409) or "have" not in error.body:
                    await self._give_up(transfer)
                    raise TransferFailed(str(error)) from error
                await self._tries.after_break(error, have)
            except TransferFailed:
                await self._give_up(transfer)
                raise

    async def _give_up(self, transfer: str) -> None:
        """What is in the guest of it need not stay."""
        with contextlib.suppress(LinkDown, GuestRefused):
            await self._link.http("DELETE", f"/v1/transfers/{transfer}", limit=ASK_LIMIT_S)

    async def _begin(self, transfer: str) -> int:
        query = {"path": self._remote, "total": str(self._size), "mode": self._mode}
        answer = await self._link.http("POST", f"/v1/transfers/{transfer}", query=query, limit=ASK_LIMIT_S)
        have = answer.get("have")
        if not isinstance(have, int) or not 0 <= have <= self._size:
            raise TransferFailed(f"{self._remote}: the guest's answer makes no sense")
        self._algorithm = _algorithm(answer.get("digest", "sha256"), self._remote)
        self._digest.also(self._algorithm)
        if have:
            await _in_thread(self._link.reactor, self._digest.catch_up, self._fd, have)
        return have

    async def _send(self, transfer: str, first: int) -> int:
        """Send the bytes from `first` on; _Broken when it stalls. The guest may know fewer than were sent."""
        done = first

        def moved(count: int) -> None:
            nonlocal done
            done += count
            stall.moved()
            self._progress(done, self._size)

        http = self._link.requests
        sender = FileSender(self._link.reactor, self._fd, first, self._size, digest=self._digest, progress=moved)
        headers = {"Transfer-Id": transfer, "Content-Range": f"bytes {first}-{self._size - 1}/{self._size}"}
        sending = eventloop.start(
            http.send("PUT", f"/v1/transfers/{transfer}", headers=headers, body=sender, limit=None)
        )
        stall = _Stall(self._link.clock, sending.cancel)
        try:
            response = await sending
            answer = await http.answer(response, f"PUT {self._remote}", limit=ASK_LIMIT_S)
        except LinkDown as error:
            raise _Broken(f"no byte moved for {STALL_LIMIT_S:g} s" if stall.stalled else str(error)) from error
        except CancelledError as error:
            if stall.stalled:
                raise _Broken(f"no byte moved for {STALL_LIMIT_S:g} s") from error
            raise
        finally:
            stall.end()
            await sender.when_idle()
        if answer.get("have") != self._size:
            raise _Broken("the guest has not got everything")
        return self._size

    async def _commit(self, transfer: str) -> str:
        ours = self._digest.hexdigest(self._algorithm)
        limit = ASK_LIMIT_S + self._size / SYNC_RATE
        try:
            answer = await self._link.http(
                "POST", f"/v1/transfers/{transfer}/commit", query={self._algorithm: ours}, limit=limit
            )
        except GuestRefused as error:
            if error.status == 422:
                raise _Damaged(str(error)) from error
            raise
        if answer.get(self._algorithm) != ours:
            raise TransferFailed(f"{self._remote}: the guest confirmed another {ALGORITHMS[self._algorithm]}")
        return self._digest.hexdigest()


class _Get:
    """One copy from the guest, into an open file."""

    def __init__(self, link: GuestLink, fd: int, remote: str, progress: Progress) -> None:
        self._link = link
        self._fd = fd
        self._remote = remote
        self._progress = progress
        self._tries = _Tries(link.clock, f"{remote} from {link.name}")
        self._receiver = FileReceiver(link.reactor, fd)
        self._etag = ""
        self._total = 0
        self._algorithm = "sha256"
        """What the guest confirms the copy by."""

    async def run(self) -> tuple[str, int, int]:
        while True:
            try:
                known = await self._receive()
                sha256 = await self._confirm(known)
            except (LinkDown, _Broken) as error:
                await self._tries.after_break(error, self._receiver.position)
            except _Damaged as error:
                self._tries.after_damage(error)
                await self._restart()
            except GuestRefused as error:
                if error.status == 412:
                    self._tries.after_damage(error)
                    await self._restart()
                elif error.status == 404:
                    raise _missing(self._remote, error) from error
                else:
                    raise TransferFailed(str(error)) from error
            else:
                return sha256, self._total, self._tries.count

    async def _receive(self) -> str | None:
        """Fetch what is missing. Returns the SHA-256 if the guest said it with the file."""
        http = self._link.requests
        position = self._receiver.position
        headers = {"Range": f"bytes={position}-"} if position else {}
        if self._etag:
            if position == self._total:
                return None  # only the confirmation was missing
            headers["If-Match"] = self._etag
        response = await http.send(
            "GET", "/v1/files", query={"path": self._remote}, headers=headers, limit=STALL_LIMIT_S
        )
        if response.code not in (200, 206):
            await http.answer(response, f"GET {self._remote}", limit=ASK_LIMIT_S)
            raise LinkDown("the guest's answer makes no sense")
        total = _whole_size(response, position)
        if total is None or (self._etag and (total != self._total or _header(response, b"ETag") != self._etag)):
            await _drop(response)
            raise _Damaged("the guest sends another part than the one asked for")
        self._etag, self._total = _header(response, b"ETag"), total
        if not position:
            self._algorithm = _algorithm(_header(response, b"X-Digest") or "sha256", self._remote)
            self._receiver.digest.also(self._algorithm)
        await self._take_body(response)
        if self._receiver.position != total:
            raise _Broken("the connection broke")
        return _header(response, b"X-Sha256") or None

    async def _take_body(self, response: Any) -> None:
        done: Deferred[None] = Deferred()
        body = _FileBody(self._receiver, self._total, done)
        stall = _Stall(self._link.clock, body.break_off)
        body.on_data = stall.moved
        self._receiver.on_written = lambda _: self._progress(self._receiver.position, self._total)
        response.deliverBody(body)
        try:
            await done
        except _Broken as error:
            if stall.stalled:
                raise _Broken(f"no byte moved for {STALL_LIMIT_S:g} s") from error
            raise
        finally:
            stall.end()
            body.break_off()
            self._receiver.set_producer(None)
            await self._receiver.drain()
            self._receiver.on_written = None
            if self._receiver.error is not None:
                raise self._receiver.error  # our disk: no further try helps

    async def _confirm(self, known: str | None) -> str:
        digest = self._receiver.digest
        ours = digest.hexdigest()
        if known is None:
            ours = digest.hexdigest(self._algorithm)
            answer = await self._link.http(
                "GET",
                "/v1/digest",
                query={"path": self._remote, "etag": self._etag},
                limit=ASK_LIMIT_S + self._total / SYNC_RATE,
            )
            known = str(answer.get(self._algorithm))
        if ours != known:
            raise _Damaged(f"the {ALGORITHMS[self._algorithm]} differs: bytes changed on the way")
        return digest.hexdigest()

    async def _restart(self) -> None:
        await self._receiver.drain()
        os.ftruncate(self._fd, 0)
        self._receiver = FileReceiver(self._link.reactor, self._fd)
        self._etag = ""


class _FileBody(Protocol):
    """A response's body on its way to a file. Not more than the announced size is taken."""

    transport: Any = None

    def __init__(self, receiver: FileReceiver, total: int, done: Deferred[None]) -> None:
        self._receiver = receiver
        self._left = total - receiver.position
        self._done: Deferred[None] | None = done
        self.on_data: Callable[[], None] = lambda: None

    def connectionMade(self) -> None:  # noqa: N802
        self._receiver.set_producer(self.transport)

    def dataReceived(self, data: bytes) -> None:  # noqa: N802
        if self._done is None:
            return
        self._left -= len(data)
        self.on_data()
        self._receiver.write(data)
        if self._receiver.error is not None or self._left < 0:
            self.break_off()

    def break_off(self) -> None:
        """End it; nothing happens when it has ended."""
        if self._done is not None:
            self._end(_Broken("broken off"))
            self.transport.loseConnection()

    def connectionLost(self, reason: Failure | None = None) -> None:  # noqa: N802
        complete = reason is not None and reason.check(ResponseDone) is not None and self._left == 0
        self._end(None if complete else _Broken("the connection broke"))

    def _end(self, error: Exception | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            if error is None:
                done.callback(None)
            else:
                done.errback(error)


def _algorithm(name: object, what: str) -> str:
    """The digest that a guest asks for."""
    if name not in ALGORITHMS:
        raise TransferFailed(f"{what}: the guest confirms copies by {name!r:.40}, which this HostMain does not know")
    return str(name)


def _header(response: Any, name: bytes) -> str:
    values = response.headers.getRawHeaders(name) or [b""]
    return bytes(values[0]).decode("ascii", "replace")[:200]


_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})\Z")


def _whole_size(response: Any, position: int) -> int | None:
    """The size of the whole file, if the response begins at `position`."""
    if response.code == 200:
        return int(response.length) if position == 0 and isinstance(response.length, int) else None
    match = _RANGE.match(_header(response, b"Content-Range"))
    if match is None or int(match[1]) != position or int(match[2]) + 1 != int(match[3]):
        return None
    return int(match[3])


async def _drop(response: Any) -> None:
    """Close the connection of a response whose body nobody wants."""
    done: Deferred[None] = Deferred()
    done.addErrback(lambda _: None)

    class _Nothing(Protocol):
        transport: Any = None

        def connectionMade(self) -> None:  # noqa: N802
            self.transport.loseConnection()

    response.deliverBody(_Nothing())


def _missing(remote: str, error: GuestRefused) -> FileMissing:
    """A guest's listing is its own words: of bounded size, and used in messages only."""
    entries: list[Entry] = []
    listing = error.body.get("listing")
    for item in listing[:200] if isinstance(listing, list) else []:
        if isinstance(item, dict) and isinstance(item.get("name"), str):
            size = item.get("size")
            entries.append(Entry(item["name"][:255], size if isinstance(size, int) else 0, item.get("folder") is True))
    return FileMissing(remote, str(error.body.get("folder", "?"))[:4096], entries)


def _put_in_place(fd: int, temporary: Path, local: Path) -> None:
    os.fsync(fd)
    if os.name != "nt":
        temporary.chmod(0o644)
    temporary.replace(local)
    fsync_folder(local.parent)


async def _in_thread(reactor: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    return await deferToThreadPool(reactor, reactor.getThreadPool(), function, *arguments)
