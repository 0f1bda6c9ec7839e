"""Files to and from a guest by HTTP over its link. The agent's end is guest.fileserver; docs/internals/transfer.md.

A transfer that breaks goes on where it stopped. It is given up after TRIES tries in a row that moved nothing, after
DAMAGED_TRIES copies whose SHA-256 differs, or when the guest says that it cannot be. A try that moves no byte for
STALL_LIMIT_S is broken off; that time, like all here, counts only while the link is not paused.
"""

from __future__ import annotations

import os
from pathlib import Path

from vmcontrol.common.threads import defer_to_thread
from vmcontrol.link.dialler import GuestLink
from vmcontrol.transfer.diskroom import DiskRoom
from vmcontrol.transfer.http_get import HttpGet
from vmcontrol.transfer.http_put import SMALL, HttpPut
from vmcontrol.transfer.interface import (
    FileUnusable,
    Progress,
    TransferFailed,
    TransferResult,
)
from vmcontrol.transfer.parts import opened, part_of, put_in_place


class HttpTransfer:
    """FileTransfer over a GuestLink. Of any number of copies a few go at a time; the others wait, however long."""

    def __init__(self, link: GuestLink, slot: Path | None = None, room: DiskRoom | None = None) -> None:
        """slot: no link below it is followed. room: what files from the guest may take."""
        self._link = link
        self._room = room or DiskRoom(Path.cwd())
        self._slot = slot
        self._clock = link.clock
        self._reactor = link.reactor

    async def put(
        self, local: Path, remote: str, *, mode: int | None = None, progress: Progress | None = None
    ) -> TransferResult:
        """See FileTransfer.put. LocalFileMissing, TransferFailed, LinkEnded."""
        async with self._link.copies:
            return await self._put(local, remote, mode, progress or _no_progress)

    async def _put(self, local: Path, remote: str, mode: int | None, progress: Progress) -> TransferResult:
        started = self._reactor.seconds()
        with opened(local, self._slot) as (fd, status):
            bits = mode if mode is not None else (0o755 if status.st_mode & 0o111 else 0o644)
            upload = HttpPut(self._link, fd, remote, size=status.st_size, mode=bits, progress=progress)
            sha256, tries = await (upload.run_small() if status.st_size <= SMALL else upload.run())
            if os.fstat(fd).st_size != status.st_size:
                raise TransferFailed(f"{local}: its size changed while it was copied")
        return TransferResult(status.st_size, sha256, self._reactor.seconds() - started, tries)

    async def get(
        self, remote: str, local: Path, *, progress: Progress | None = None, most: int | None = None
    ) -> TransferResult:
        """See FileTransfer.get. FileMissing, TransferFailed, LinkEnded."""
        async with self._link.copies:
            return await self._get(remote, local, progress or _no_progress, most)

    async def _get(self, remote: str, local: Path, progress: Progress, most: int | None) -> TransferResult:
        started = self._reactor.seconds()
        promised = 0

        async def announced(size: int) -> None:
            nonlocal promised
            if most is not None and size > most:
                raise FileUnusable.too_large(remote, size, most)
            self._room.release(promised)
            promised = 0
            await defer_to_thread(self._reactor, self._room.check, size, remote, local)
            self._room.claim(size)
            promised = size

        try:
            with part_of(local, self._slot) as (fd, part):
                download = HttpGet(self._link, fd, remote, progress, announced)
                sha256, size, tries = await download.run()
                await defer_to_thread(self._reactor, put_in_place, fd, part, local)
        except OSError as error:
            raise TransferFailed(f"{local}: {error.strerror or error}") from error
        finally:
            self._room.release(promised)
        return TransferResult(size, sha256, self._reactor.seconds() - started, tries)


def _no_progress(_done: int, _total: int) -> None:
    """When nobody wants to know."""
