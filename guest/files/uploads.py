"""Uploads from the host: written beside their place until they are complete and confirmed, then renamed.

Owns the partial files (`.<name>.<transfer>.part`) and the table of transfers, which lives in memory: a restored
snapshot brings it back together with the disk it speaks of. An interrupted transfer goes on where it stopped.

`Refusal` is the only error that leaves this module: an HTTP status and what to say.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmcontrol.common.atomicfile import name_prefix, put_in_place
from vmcontrol.common.eventloop import Event, start_logged
from vmcontrol.common.filestream import ALGORITHMS, FileReceiver, RunningHash
from vmcontrol.common.threads import defer_to_thread

log = logging.getLogger(__name__)

UNFINISHED_LIMIT = 16
"""Transfers that are not complete; beyond it the one that was touched longest ago is given up."""
FINISHED_LIMIT = 64
"""Confirmed transfers that are remembered, for a host that did not hear the answer."""
ID = re.compile(r"[0-9A-Za-z-]{1,64}\Z")
DIGESTS = {"sha256": re.compile(r"[0-9a-f]{64}\Z"), "sha512": re.compile(r"[0-9a-f]{128}\Z")}
SHA256 = DIGESTS["sha256"]

_NO_ROOM = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_WRONG_PATH = frozenset({errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG})


class Refusal(Exception):  # noqa: N818
    """A request that is answered by an HTTP status of 400 or more."""

    def __init__(self, status: int, error: str, **more: object) -> None:
        super().__init__(error)
        self.status = status
        self.body: dict[str, object] = {"error": error, **more}


def refusal_of(error: OSError, path: str) -> Refusal:
    """An operating system's error as an answer."""
    text = f"{path}: {error.strerror or error}"
    if error.errno in _NO_ROOM:
        return Refusal(507, text)
    if error.errno in _FORBIDDEN:
        return Refusal(403, text)
    if error.errno in _WRONG_PATH:
        return Refusal(409, text)
    return Refusal(500, text)


def check_path(base: Path, text: str) -> Path:
    """The path that a request names, made absolute."""
    if not text or "\0" in text:
        raise Refusal(400, "no path, or one with a NUL")
    return base / text


@dataclass(frozen=True, slots=True)
class Finished:
    """A transfer that is confirmed and in its place."""

    path: str
    size: int
    algorithm: str
    digest: str

    def as_json(self) -> dict[str, object]:
        body: dict[str, object] = {"have": self.size, "path": self.path, "size": self.size, "complete": True}
        return body | {"digest": self.algorithm, self.algorithm: self.digest}


class Upload:
    """One file on its way. Bytes go to `receiver`; `source` is the connection they come from now."""

    def __init__(self, reactor: Any, path: Path, transfer: str, *, total: int, mode: int, algorithm: str) -> None:
        self.path = path
        self.total = total
        self.mode = mode
        self.source: Any = None
        self.partial = path.parent / f".{name_prefix(path.name)}.{transfer}.part"
        self.fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self.algorithm = algorithm
        self.receiver = FileReceiver(reactor, self.fd, digest=RunningHash(algorithm))
        self.placing: Event | None = None
        """While a thread brings it to its place; set when that has ended, in whatever way."""

    def take_over(self, source: Any) -> None:
        """Bytes come from `source` from now on; who sent before is cut off (a restored guest has dead connections)."""
        old, self.source = self.source, source
        if old is not None and old is not source:
            self.receiver.set_producer(None)
            old.abortConnection()

    async def settled(self) -> None:
        """Everything that came is written; raises Refusal if that failed."""
        await self.receiver.drain()
        if self.receiver.error is not None:
            raise refusal_of(self.receiver.error, str(self.path))

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Uploads:
    """All files on their way."""

    def __init__(self, reactor: Any, base: Path, algorithm: str = "sha256") -> None:
        """algorithm: the digest that copies are confirmed by."""
        self._reactor = reactor
        self._base = base
        self._algorithm = algorithm
        self._unfinished: OrderedDict[str, Upload] = OrderedDict()
        self._finished: OrderedDict[str, Finished] = OrderedDict()

    async def begin(self, transfer: str, path_text: str, total: int, mode: int) -> dict[str, object]:
        """Start a transfer, or go on with one: answers how many bytes of it are there."""
        if not ID.match(transfer) or total < 0:
            raise Refusal(400, "bad transfer or total")
        path = check_path(self._base, path_text)
        while True:
            upload = await self._left_alone(transfer)
            finished = self._finished.get(transfer)
            if finished is not None:
                return finished.as_json()
            if upload is None:
                try:
                    upload = self._create(transfer, path, total, mode & 0o777)
                except OSError as error:
                    raise refusal_of(error, path_text) from error
            elif (upload.path, upload.total) != (path, total):
                raise Refusal(409, "this transfer is of another file")
            upload.take_over(None)
            await self._settle(transfer, upload)
            if self._unfinished.get(transfer) is upload:
                return {"have": upload.receiver.position, "digest": upload.algorithm}

    def _create(self, transfer: str, path: Path, total: int, mode: int) -> Upload:
        if path.is_dir():
            raise Refusal(409, f"{path}: is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        disk = os.statvfs(path.parent)
        room = disk.f_bavail * disk.f_frsize
        if total > room:
            raise Refusal(507, f"{path}: no room: {total} bytes to come, {room} are free")
        upload = Upload(self._reactor, path, transfer, total=total, mode=mode, algorithm=self._algorithm)
        self._unfinished[transfer] = upload
        # One that is brought to its place is as good as finished, and cannot be given up any more.
        waiting = [old for old, other in self._unfinished.items() if other.placing is None]
        for oldest in waiting[: max(0, len(waiting) - UNFINISHED_LIMIT)]:
            log.warning("too many unfinished transfers; that of %s is given up", self._unfinished[oldest].path)
            self._spawn_discard(oldest)
        return upload

    def state(self, transfer: str) -> dict[str, object]:
        """How much of a transfer is there."""
        finished = self._finished.get(transfer)
        if finished is not None:
            return finished.as_json()
        return {"have": self._known(transfer).receiver.position}

    def receive(self, transfer: str, start: int, total: int, source: Any) -> Upload:
        """A body begins whose first byte is the file's byte `start`."""
        upload = self._known(transfer)
        if upload.total != total:
            raise Refusal(409, "this transfer has another size")
        if upload.source not in (None, source) or upload.receiver.busy or upload.receiver.position != start:
            raise Refusal(409, "the transfer goes on at another place", have=upload.receiver.position)
        upload.take_over(source)
        upload.receiver.set_producer(source)
        self._unfinished.move_to_end(transfer)
        return upload

    async def body_done(self, transfer: str, upload: Upload) -> dict[str, object]:
        """A body has come to its end."""
        upload.receiver.set_producer(None)
        upload.source = None
        await self._settle(transfer, upload)
        return {"have": upload.receiver.position}

    async def commit(self, transfer: str, digests: Mapping[str, str]) -> dict[str, object]:
        """Confirm: with the right digest the file gets its mode and its name, durably. Harmless when repeated."""
        while True:
            await self._left_alone(transfer)
            finished = self._finished.get(transfer)
            if finished is not None:
                if finished.digest != _digest(digests, finished.algorithm):
                    raise Refusal(422, f"the {ALGORITHMS[finished.algorithm]} differs")
                return finished.as_json()
            upload = self._known(transfer)
            await self._settle(transfer, upload)
            if self._unfinished.get(transfer) is upload and upload.placing is None:
                break  # else somebody else was faster meanwhile: what came of that counts
        if upload.receiver.position != upload.total:
            raise Refusal(409, "not complete", have=upload.receiver.position)
        said = _digest(digests, upload.algorithm)
        if upload.receiver.digest.hexdigest(upload.algorithm) != said:
            await self._discard(transfer)
            raise Refusal(422, f"the {ALGORITHMS[upload.algorithm]} differs: bytes changed on the way")
        return (await self._put_in_place(transfer, upload, said)).as_json()

    async def discard(self, transfer: str) -> dict[str, object]:
        """Give a transfer up and remove what is there of it. Harmless when it is unknown."""
        await self._discard(transfer)
        return {"have": 0}

    def close(self) -> None:
        """The agent ends: nothing partial stays."""
        for upload in self._unfinished.values():
            if upload.placing is None:  # else its thread keeps the descriptor until the process ends
                upload.close()
            with contextlib.suppress(OSError):
                upload.partial.unlink()
        self._unfinished.clear()

    def _known(self, transfer: str) -> Upload:
        upload = self._unfinished.get(transfer)
        if upload is None:
            raise Refusal(404, "no such transfer", have=0)  # the host begins it anew
        return upload

    async def _left_alone(self, transfer: str) -> Upload | None:
        """The unfinished transfer, once nobody brings it to its place; None: there is none (any more).

        The host confirms anew when its connection broke, while the first request still syncs: two threads with one
        descriptor would close it for each other.
        """
        while True:
            upload = self._unfinished.get(transfer)
            if upload is None or upload.placing is None:
                return upload
            await upload.placing.wait()

    async def _settle(self, transfer: str, upload: Upload) -> None:
        try:
            await upload.settled()
        except Refusal:
            if self._unfinished.get(transfer) is upload:
                await self._discard(transfer)
            raise

    async def _put_in_place(self, transfer: str, upload: Upload, digest: str) -> Finished:
        placing = upload.placing = Event()
        try:
            await defer_to_thread(
                self._reactor, put_in_place, upload.partial, upload.path, fd=upload.fd, mode=upload.mode
            )
        except OSError as error:
            upload.placing = None  # or giving it up would wait for us
            await self._discard(transfer)
            raise refusal_of(error, str(upload.path)) from error
        else:
            self._unfinished.pop(transfer, None)
            upload.close()
            finished = Finished(str(upload.path), upload.total, upload.algorithm, digest)
            self._finished[transfer] = finished
            if len(self._finished) > FINISHED_LIMIT:
                self._finished.popitem(last=False)
            return finished
        finally:
            upload.placing = None
            placing.set()

    def _spawn_discard(self, transfer: str) -> None:
        start_logged(self._discard(transfer), "giving up a transfer")

    async def _discard(self, transfer: str) -> None:
        await self._left_alone(transfer)
        upload = self._unfinished.pop(transfer, None)
        if upload is None:
            return
        with contextlib.suppress(OSError):
            upload.partial.unlink()  # before any wait: the same transfer may begin anew meanwhile, with this name
        upload.take_over(None)
        await upload.receiver.drain()
        upload.close()


def _digest(digests: Mapping[str, str], algorithm: str) -> str:
    """The one of this algorithm, in a request's fields."""
    found = digests.get(algorithm, "")
    if not DIGESTS[algorithm].match(found):
        raise Refusal(400, f"no {ALGORITHMS[algorithm]}")
    return found
