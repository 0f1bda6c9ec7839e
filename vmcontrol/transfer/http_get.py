"""A copy of one file from a guest by HTTP, into an open file. What the guest says of it is bounded and checked."""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone

from vmcontrol.common.filestream import ALGORITHMS, FileReceiver
from vmcontrol.link.dialler import GuestLink
from vmcontrol.link.errors import GuestRefused, LinkDown
from vmcontrol.link.listing import entries
from vmcontrol.transfer import tries
from vmcontrol.transfer.interface import FileMissing, FileUnusable, Progress, TransferFailed
from vmcontrol.transfer.tries import ASK_LIMIT_S, SYNC_RATE, Broken, Damaged, Stall, Tries, known_algorithm


class HttpGet:
    """One copy from the guest, into an open file."""

    def __init__(
        self,
        link: GuestLink,
        fd: int,
        remote: str,
        progress: Progress,
        announced: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:
        """announced: called with the size before anything is copied; what it raises ends the copy."""
        self._link = link
        self._announced = announced
        self._fd = fd
        self._remote = remote
        self._progress = progress
        self._tries = Tries(link.clock, f"{remote} from {link.name}")
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
            except (LinkDown, Broken) as error:
                await self._tries.after_break(error, self._receiver.position)
            except Damaged as error:
                self._tries.after_damage(error)
                await self._restart()
            except GuestRefused as error:
                if error.status == 412:
                    self._tries.after_damage(error)
                    await self._restart()
                elif error.status == 404:
                    raise _missing(self._remote, error) from error
                elif error.status in (403, 409):
                    raise _unusable(self._remote, error) from error
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
            "GET", "/v1/files", query={"path": self._remote}, headers=headers, limit=tries.STALL_LIMIT_S
        )
        if response.code not in (200, 206):
            await http.answer(response, f"GET {self._remote}", limit=ASK_LIMIT_S)
            raise LinkDown("the guest's answer makes no sense")
        total = _whole_size(response, position)
        if total is None or (self._etag and (total != self._total or _header(response, b"ETag") != self._etag)):
            await _drop(response)
            raise Damaged("the guest sends another part than the one asked for")
        if self._announced is not None and (not position or total != self._total):
            try:
                await self._announced(total)
            except Exception:
                await _drop(response)
                raise
        self._etag, self._total = _header(response, b"ETag"), total
        if not position:
            self._algorithm = known_algorithm(_header(response, b"X-Digest") or "sha256", self._remote)
            self._receiver.digest.also(self._algorithm)
        await self._take_body(response)
        if self._receiver.position != total:
            raise Broken("the connection broke")
        return _header(response, b"X-Sha256") or None

    async def _take_body(self, response: Any) -> None:
        done: Deferred[None] = Deferred()
        body = _FileBody(self._receiver, self._total, done)
        stall = Stall(self._link.clock, body.break_off)
        body.on_data = stall.moved
        self._receiver.on_written = lambda _: self._progress(self._receiver.position, self._total)
        response.deliverBody(body)
        try:
            await done
        except Broken as error:
            if stall.stalled:
                raise Broken(f"no byte moved for {tries.STALL_LIMIT_S:g} s") from error
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
            said = answer.get(self._algorithm)
            known = said if isinstance(said, str) else ""
        if ours != known:
            raise Damaged(f"the {ALGORITHMS[self._algorithm]} differs: bytes changed on the way")
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
            self._end(Broken("broken off"))
            self.transport.loseConnection()

    def connectionLost(self, reason: Failure | None = None) -> None:  # noqa: N802
        complete = reason is not None and reason.check(ResponseDone) is not None and self._left == 0
        self._end(None if complete else Broken("the connection broke"))

    def _end(self, error: Exception | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            if error is None:
                done.callback(None)
            else:
                done.errback(error)


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
    folder = error.body.get("folder")
    return FileMissing(
        remote, folder[:4096] if isinstance(folder, str) else "?", entries(error.body.get("listing"), 200)
    )


def _unusable(remote: str, error: GuestRefused) -> FileUnusable:
    """As above: the guest's reason is bounded, and for messages only."""
    said = error.body.get("error")
    reason = said[:500] if isinstance(said, str) and said else "cannot be read"
    return FileUnusable(remote, reason.removeprefix(f"{remote}: "))
