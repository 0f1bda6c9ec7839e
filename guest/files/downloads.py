"""Files that the host fetches: opened carefully, told apart by an ETag, hashed while they are sent.

Owns a small table of running hashes, so that a file that was sent is not read a second time for its SHA-256, also when
it was sent in several pieces. Listings are bounded.
"""

from __future__ import annotations

import json
import os
import stat
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from guest.files.uploads import Refusal, check_path, refusal_of
from vmcontrol.common.filestream import RunningHash

HASHES_LIMIT = 32
"""Files whose running hash is remembered."""
LISTING_LIMIT = 10_000
"""Entries of a folder that are listed, and"""
LISTING_BYTES = 3 * 1024 * 1024
"""their bytes as JSON: the host takes 4 MiB of an answer (vmcontrol.link.guesthttp). A name can take 1.5 KiB."""
HINT_LIMIT = 200
"""Entries that are listed to say what there is instead of a missing file."""


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A regular file that is open for reading. Whoever got it closes `fd`."""

    fd: int
    size: int
    etag: str


def _etag(status: os.stat_result) -> str:
    return f'"{status.st_dev:x}-{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"'


def list_folder(folder: Path, limit: int) -> dict[str, object]:
    """Names and sizes of what is in a folder, for JSON. OSError. Blocks."""
    listing: list[dict[str, object]] = []
    truncated, room = False, LISTING_BYTES
    with os.scandir(folder) as entries:
        for entry in entries:
            if len(listing) >= limit or room <= 0:
                truncated = True
                break
            is_folder = entry.is_dir(follow_symlinks=False)
            try:
                size = 0 if is_folder else entry.stat(follow_symlinks=False).st_size
            except OSError:
                continue  # gone meanwhile
            known = {"name": entry.name, "size": size, "folder": is_folder}
            listing.append(known)
            room -= len(json.dumps(known)) + len(", ")
    listing.sort(key=lambda item: str(item["name"]))
    return {"folder": str(folder), "listing": listing, "truncated": truncated}


def missing(path: Path, text: str) -> Refusal:
    """The answer for a file that is not there: what is in the nearest folder on the way to it."""
    for folder in path.parents:
        try:
            found = list_folder(folder, HINT_LIMIT)
        except OSError:
            continue
        return Refusal(404, f"{text}: no such file", path=text, **found)
    return Refusal(404, f"{text}: no such file", path=text, folder="/", listing=[])


class Downloads:
    """Opening, and the hashes of what was sent."""

    def __init__(self, base: Path, algorithm: str = "sha256") -> None:
        """algorithm: the digest that copies are confirmed by."""
        self._base = base
        self.algorithm = algorithm
        self._hashes: OrderedDict[str, RunningHash] = OrderedDict()

    def listing(self, text: str) -> dict[str, object]:
        """What is in a folder; the base folder when no path is given. Blocks."""
        folder = check_path(self._base, text) if text else self._base
        try:
            return list_folder(folder, LISTING_LIMIT)
        except FileNotFoundError:
            raise missing(folder, text) from None
        except OSError as error:
            raise refusal_of(error, text) from error

    def open(self, text: str) -> OpenFile:
        """Open a regular file. A pipe or device is refused, without waiting for its other end."""
        path = check_path(self._base, text)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except (FileNotFoundError, NotADirectoryError):
            raise missing(path, text) from None
        except OSError as error:
            raise refusal_of(error, text) from error
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise Refusal(409, f"{text}: is no regular file")
        return OpenFile(fd, status.st_size, _etag(status))

    def running_hash(self, etag: str) -> RunningHash:
        """The hash of the file in this state, as far as it was sent."""
        known = self._hashes.pop(etag, None) or RunningHash(self.algorithm)
        self._hashes[etag] = known
        if len(self._hashes) > HASHES_LIMIT:
            self._hashes.popitem(last=False)
        return known

    def digest(self, text: str, etag: str) -> dict[str, object]:
        """The digest of a file, if it still is in the state of `etag`. What was not sent is read now. Blocks."""
        opened = self.open(text)
        try:
            if opened.etag != etag:
                raise Refusal(412, f"{text}: changed meanwhile")
            known = self.running_hash(etag)
            known.catch_up(opened.fd, opened.size)
        except EOFError:
            raise Refusal(412, f"{text}: changed meanwhile") from None
        finally:
            os.close(opened.fd)
        return {self.algorithm: known.hexdigest(self.algorithm), "size": opened.size}
