"""A copy of one file to a guest by HTTP: small ones whole, larger ones from where the guest has them on."""

from __future__ import annotations

import contextlib
import secrets

from twisted.internet.defer import CancelledError

from vmcontrol.common import eventloop
from vmcontrol.common.filestream import ALGORITHMS, CHUNK, FileSender, RunningHash, read_at
from vmcontrol.common.httpclient import BytesBody
from vmcontrol.common.threads import defer_to_thread
from vmcontrol.link.dialler import GuestLink
from vmcontrol.link.errors import GuestRefused, LinkDown
from vmcontrol.transfer import tries
from vmcontrol.transfer.interface import Progress, TransferFailed
from vmcontrol.transfer.tries import (
    ASK_LIMIT_S,
    SYNC_RATE,
    Broken,
    Damaged,
    Stall,
    Tries,
    known_algorithm,
)

SMALL = CHUNK
"""Bytes up to which a file goes to the guest in one request."""


class HttpPut:
    """One copy to the guest."""

    def __init__(self, link: GuestLink, fd: int, remote: str, *, size: int, mode: int, progress: Progress) -> None:
        self._link = link
        self._fd = fd
        self._size = size
        self._remote = remote
        self._mode = f"{mode & 0o777:o}"
        self._progress = progress
        self._tries = Tries(link.clock, f"{remote} to {link.name}")
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
                    "PUT", "/v1/files", query=query, body=BytesBody(content), limit=tries.STALL_LIMIT_S
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
            except (LinkDown, Broken) as error:
                await self._tries.after_break(error, have)
            except Damaged as error:
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
        self._algorithm = known_algorithm(answer.get("digest", "sha256"), self._remote)
        self._digest.also(self._algorithm)
        if have:
            await defer_to_thread(self._link.reactor, self._digest.catch_up, self._fd, have)
        return have

    async def _send(self, transfer: str, first: int) -> int:
        """Send the bytes from `first` on; Broken when it stalls. The guest may know fewer than were sent."""
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
        stall = Stall(self._link.clock, sending.cancel)
        try:
            response = await sending
            answer = await http.answer(response, f"PUT {self._remote}", limit=ASK_LIMIT_S)
        except LinkDown as error:
            raise Broken(f"no byte moved for {tries.STALL_LIMIT_S:g} s" if stall.stalled else str(error)) from error
        except CancelledError as error:
            if stall.stalled:
                raise Broken(f"no byte moved for {tries.STALL_LIMIT_S:g} s") from error
            raise
        finally:
            stall.end()
            await sender.when_idle()
        if answer.get("have") != self._size:
            raise Broken("the guest has not got everything")
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
                raise Damaged(str(error)) from error
            raise
        if answer.get(self._algorithm) != ours:
            raise TransferFailed(f"{self._remote}: the guest confirmed another {ALGORITHMS[self._algorithm]}")
        return self._digest.hexdigest()
