"""Files to and from a guest by Chirp, as in 2009: the guest runs chirp_server, this computer chirp_put and chirp_get.

Owns the client programs it started, for as long as they run. The file that is fetched is opened here and chirp_get
writes to its standard output: given a name it would copy a whole folder, with names that the guest chooses.

A copy is confirmed by the MD5 that the server tells (Chirp knows MD5 and SHA-1). What Chirp lacks against HTTP: a
target in the guest is written in its place, a break begins the copy anew (within chirp's own -t), and whoever has an
address that the server's rights name may read and write. docs/internals/transfer.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import posixpath
import shutil
import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vmcontrol.common.clock import PausableClock
from vmcontrol.common.eventloop import LimitReached
from vmcontrol.common.threads import defer_to_thread
from vmcontrol.hypervisors.common.tool import ToolMissing, ToolResult, run
from vmcontrol.link.listing import Entry
from vmcontrol.transfer.diskroom import DiskRoom
from vmcontrol.transfer.interface import (
    FileMissing,
    FileUnusable,
    Progress,
    TransferFailed,
    TransferResult,
)
from vmcontrol.transfer.parts import opened, part_of, put_in_place

log = logging.getLogger(__name__)

CHIRP_PORT = 9094
"""Chirp's own default, and the original's."""
ANSWER_LIMIT_S = 10
"""Seconds for requests without content, the connection included; the original's -t for everything."""
COPY_LIMIT_S, SLOWEST_BYTES_PER_S = 60, 256 * 1024
"""A copy may take so many seconds, and one more for each of these bytes. An emulated guest takes 7 MB/s and more."""
TRIES = 3
"""Copies whose MD5 differs."""
EXTRA_S = 10.0
"""Seconds that a program gets on top of its own -t before it is killed."""
LISTED = 200

_MISSING, _REFUSED = "No such file or directory", "Permission denied"


class ChirpFailed(TransferFailed):
    """A chirp program failed; what it said and its exit status are `stdout`, `stderr`, `status`."""

    def __init__(self, what: str, result: ToolResult) -> None:
        super().__init__(f"{what}: {result.text or f'exit status {result.status}'}")
        self.program_result = (result.stdout, result.stderr, result.status)


@dataclass(frozen=True, slots=True)
class ChirpPrograms:
    """chirp, chirp_put and chirp_get. `place`: their folder, or the path of one of them; empty: they are on PATH."""

    place: str = ""

    def path(self, name: str) -> str:
        """Raises TransferFailed if it is not there."""
        folder = None
        if self.place:
            folder = self.place if Path(self.place).is_dir() else str(Path(self.place).parent)
        found = shutil.which(name, path=folder)
        if found is None:
            where = f"in {folder}" if folder else "on this computer"
            raise TransferFailed(f"{name} is not {where}; it is in Debian's package coop-computing-tools")
        return found


class ChirpTransfer:
    """FileTransfer to one guest's chirp_server.

    address: where it answers. clock: stands still while the VM is paused. base: asks for the folder that the guest
    serves, "" if nobody knows: absolute names in it are understood. All other names begin in that folder.
    slot: no link below it is followed.
    """

    def __init__(
        self,
        reactor: Any,
        clock: PausableClock,
        *,
        address: tuple[str, int],
        programs: ChirpPrograms,
        base: Callable[[], Awaitable[str]],
        slot: Path | None = None,
        room: DiskRoom | None = None,
    ) -> None:
        self._reactor = reactor
        self._room = room or DiskRoom(Path.cwd())
        self._clock = clock
        self._server = f"{address[0]}:{address[1]}"
        self._programs = programs
        self._base = base
        self._slot = slot

    async def put(
        self, local: Path, remote: str, *, mode: int | None = None, progress: Progress | None = None
    ) -> TransferResult:
        """See FileTransfer.put. The target is written in its place; it is executable if `local` is (mode: as given).

        LocalFileMissing, TransferFailed.
        """
        with opened(local, self._slot) as (fd, status):
            by_fd = Path(f"/proc/{os.getpid()}/fd/{fd}")  # this very file, whatever has its name by now
            source = by_fd if by_fd.exists() else local.absolute()
            return await self._put(source, status, local, remote, mode, progress)

    async def _put(  # noqa: PLR0917 (of one caller)
        self,
        source: Path,
        status: os.stat_result,
        local: Path,
        remote: str,
        mode: int | None,
        progress: Progress | None,
    ) -> TransferResult:
        began = self._reactor.seconds()
        path = await self._served(remote)
        folder = posixpath.dirname(path)
        # asked in any case: a server that is not there is found out soon, not after the time that a copy may take
        await self._ask("mkdir", "-p", folder) if folder != "/" else await self._ask("whoami")
        bits = 0o755 if mode is None and status.st_mode & 0o111 else mode  # a file that is there keeps its own else
        for attempt in range(1, TRIES + 1):
            words = (self._programs.path("chirp_put"), str(source), self._server, path)
            await self._copy(words, _copy_limit(status.st_size), f"{local} to {remote}")
            if bits is not None:
                await self._ask("chmod", f"{bits:o}", path)
            sha256, md5, size = await defer_to_thread(self._reactor, _digests, source)
            if size != status.st_size:
                raise TransferFailed(f"{local}: its size changed while it was copied")
            if await self._md5(path, size) == md5:
                if progress is not None:
                    progress(size, size)
                return TransferResult(size, sha256, self._reactor.seconds() - began, attempt)
            log.warning("%s to %s: the copy differs; again", local, remote)
        raise TransferFailed(f"{local} to {remote}: given up after {TRIES} copies: their MD5 differs")

    async def get(
        self, remote: str, local: Path, *, progress: Progress | None = None, most: int | None = None
    ) -> TransferResult:
        """See FileTransfer.get. FileMissing, TransferFailed."""
        began = self._reactor.seconds()
        path = await self._served(remote)
        try:
            with part_of(local, self._slot) as (fd, part):
                sha256, size, tries = await self._fetch(path, remote, fd, part, local, most)
                await defer_to_thread(self._reactor, put_in_place, fd, part, local)
        except OSError as error:
            raise TransferFailed(f"{local}: {error.strerror or error}") from error
        if progress is not None:
            progress(size, size)
        return TransferResult(size, sha256, self._reactor.seconds() - began, tries)

    async def _fetch(  # noqa: PLR0917 (of one caller)
        self, path: str, remote: str, fd: int, temporary: Path, local: Path, most: int | None
    ) -> tuple[str, int, int]:
        """SHA-256, size, tries."""
        for tries in range(1, TRIES + 1):
            size = await self._size(path, remote)
            if most is not None and size > most:
                raise FileUnusable.too_large(remote, size, most)
            await defer_to_thread(self._reactor, self._room.check, size, remote, local)
            words = (self._programs.path("chirp_get"), self._server, path, "-")
            await self._copy(words, _copy_limit(size), remote, output=fd, output_bytes=size)
            sha256, md5, size = await defer_to_thread(self._reactor, _digests, temporary)
            if await self._md5(path, size) == md5:
                return sha256, size, tries
            log.warning("%s: the copy differs; again", remote)
        raise TransferFailed(f"{remote}: given up after {TRIES} copies: their MD5 differs")

    async def _served(self, remote: str) -> str:
        """The path in the served folder, from its root. Raises TransferFailed for one that leads out of it."""
        if not (remote.isascii() and remote.isprintable()):
            # chirp 9.9 makes the same byte of all that are not ASCII: two such names would be one file
            raise TransferFailed(f"{remote!r}: Chirp cannot carry this name, only printable ASCII")
        if remote.startswith("/"):
            base = posixpath.normpath(await self._base() or "/")
            if base != "/" and remote.startswith(f"{base}/"):
                remote = remote[len(base) :]
        depth = 0
        for part in remote.split("/"):
            depth += {"": 0, ".": 0, "..": -1}.get(part, 1)
            if depth < 0:
                raise TransferFailed(f"{remote}: outside of the folder that the guest serves")
        path = posixpath.normpath("/" + remote.lstrip("/"))
        if path == "/":
            raise TransferFailed(f"{remote or 'an empty name'}: is no file")
        return path

    # Asking the server

    async def _size(self, path: str, remote: str) -> int:
        """Bytes of a regular file."""
        try:
            said = await self._ask("stat", path)
        except ChirpFailed as error:
            if _MISSING in str(error):
                raise await self._missing(path, remote) from error
            raise
        fields = dict(line.split(":", 1) for line in said.splitlines() if ":" in line)
        try:
            mode, size = int(fields["mode"]), int(fields["size"])
        except (KeyError, ValueError) as error:
            raise TransferFailed(f"{remote}: the server's answer is not understood") from error
        if not stat.S_ISREG(mode):
            raise FileUnusable(remote, "is no regular file")
        return size

    async def _missing(self, path: str, remote: str) -> FileMissing:
        folder = path
        while folder != "/":
            folder = posixpath.dirname(folder)
            with contextlib.suppress(ChirpFailed):
                return FileMissing(remote, folder, _entries(await self._ask("ls", "-la", folder)))
        return FileMissing(remote, "/", ())

    async def _md5(self, path: str, size: int) -> str:
        """As the server has it. chirp 9.9 sends this request's path as it is and the server decodes it."""
        candidates = dict.fromkeys((quote(path, safe="/"), path))
        failure: ChirpFailed | None = None
        for candidate in candidates:
            try:
                said = await self._ask("md5", candidate, limit_s=_copy_limit(size))
                return said.split(maxsplit=1)[0].lower() if said.strip() else ""
            except ChirpFailed as error:
                failure = failure or error
        assert failure is not None  # noqa: S101 (there is a candidate)
        raise failure

    async def _ask(self, *words: str, limit_s: int | None = None) -> str:
        """What `chirp` prints for one of its commands. Raises ChirpFailed."""
        result = await self._run((self._programs.path("chirp"), self._server, *words), limit_s or ANSWER_LIMIT_S)
        if result.status != 0:
            raise ChirpFailed(f"chirp {' '.join(words)} at {self._server}", result)
        return result.stdout

    async def _copy(
        self, words: Sequence[str], limit_s: int, what: str, *, output: int | None = None, output_bytes: int = 0
    ) -> None:
        """Run to the end. Raises ChirpFailed."""
        result = await self._run(words, limit_s, output=output, output_bytes=output_bytes)
        if result.status != 0:
            raise ChirpFailed(what, result)

    async def _run(
        self, words: Sequence[str], limit_s: int, *, output: int | None = None, output_bytes: int = 0
    ) -> ToolResult:
        """One program with its limit. They know no pauses: one that failed over a pause is run again after it."""
        while True:
            if output is not None:
                os.lseek(output, 0, os.SEEK_SET)
                os.ftruncate(output, 0)
            stood = self._clock.stood()
            command = [words[0], "-t", str(limit_s), "-a", "address", *words[1:]]
            try:
                result = await run(
                    self._reactor,
                    command,
                    limit_s=limit_s + EXTRA_S,
                    clock=self._clock,
                    output=output,
                    output_bytes=output_bytes,
                    dies_with_us=limit_s > ANSWER_LIMIT_S,
                )
            except ToolMissing as error:
                raise TransferFailed(f"{error} cannot be started") from error
            except LimitReached as error:
                raise TransferFailed(str(error)) from error
            if result.status == 0 or (self._clock.stood() == stood and not self._clock.paused):
                return result
            log.info("%s: failed over a pause of the VM; again", Path(words[0]).name)
            await self._clock.running()


def _copy_limit(size: int) -> int:
    return COPY_LIMIT_S + size // SLOWEST_BYTES_PER_S


def _digests(path: Path) -> tuple[str, str, int]:
    """SHA-256, MD5, size."""
    sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            sha256.update(data)
            md5.update(data)
            size += len(data)
    return sha256.hexdigest(), md5.hexdigest(), size


def _entries(listing: str) -> list[Entry]:
    """Of `ls -la`: mode, links, uid, gid, size, three or four words of a date, name."""
    entries = []
    for line in listing.splitlines()[:LISTED]:
        words = line.split(None, 8)
        if len(words) == 9 and words[4].isdigit() and words[8] not in {".", ".."}:
            entries.append(Entry(words[8], int(words[4]), words[0].startswith("d")))
    return sorted(entries, key=lambda entry: entry.name)
