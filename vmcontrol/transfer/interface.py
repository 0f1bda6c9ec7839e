"""Copying files between this computer and a guest, by whatever way: HTTP (http.py) or Chirp (chirp.py).

Guarantees of every way: any size, streamed; the copy is complete and confirmed by a digest of both ends (HTTP: SHA-256,
Chirp: MD5), or an error is raised; a local target is written beside its place, fsynced, renamed, and its folder is
fsynced. No name that comes from a guest is ever used on this computer. Under the wrapper no link of the slot is
followed: the wrapper names files by where they are. By HTTP a target in the guest is replaced whole or not at all.

    TransferError
    +-- LocalFileMissing    the file to send is not there, or cannot be read
    +-- FileMissing         the guest has no such file; what it has in that folder is said with it
    +-- TransferFailed      everything else, after a bounded number of tries
        +-- FileUnusable    what the guest has under that name is no file that can be read; no further try helps

By HTTP also LinkEnded, when the VM is not live any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vmcontrol.link.listing import Entry

Progress = Callable[[int, int], None]
"""Called with bytes that are over and bytes in all; goes back when a copy has to begin again."""


class TransferError(Exception):
    """A file could not be copied."""

    program_result: tuple[str, str, int] | None = None
    """stdout, stderr and exit status of the program that failed, where one copies (Chirp)."""


class LocalFileMissing(TransferError):  # noqa: N818
    """The file to send is not there, or cannot be read."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path


class FileMissing(TransferError):  # noqa: N818
    """The guest has no such file. `listing` is what is in `folder`, the nearest folder on the way that exists."""

    def __init__(self, path: str, folder: str, listing: Sequence[Entry]) -> None:
        names = ", ".join(entry.name + ("/" if entry.folder else "") for entry in listing[:40]) or "nothing"
        more = ", ..." if len(listing) > 40 else ""
        super().__init__(f"{path}: no such file in the guest; {folder} has: {names}{more}")
        self.path = path
        self.folder = folder
        self.listing = tuple(listing)


class TransferFailed(TransferError):  # noqa: N818
    """The copy failed for good; `str` says why."""


class FileUnusable(TransferFailed):
    """The guest has something of that name, and it is no regular file (a folder, a pipe), or may not be read."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason} (in the guest)")
        self.path = path
        self.reason = reason

    @classmethod
    def too_large(cls, path: str, size: int, most: int) -> FileUnusable:
        return cls(path, f"has {size} bytes, more than the {most} that are taken")


@dataclass(frozen=True, slots=True)
class TransferResult:
    """A copy that is complete and confirmed."""

    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal."""
    seconds: float
    tries: int = 1
    """1: without a break."""


class FileTransfer(Protocol):
    """A way of copying files to and from one guest."""

    async def put(
        self, local: Path, remote: str, *, mode: int | None = None, progress: Progress | None = None
    ) -> TransferResult:
        """Copy to the guest. `remote`: absolute there, or relative to the agent's base folder; its folders are made.

        mode: permission bits; None: those of the local file, as far as they make it executable.
        """

    async def get(
        self, remote: str, local: Path, *, progress: Progress | None = None, most: int | None = None
    ) -> TransferResult:
        """Copy from the guest. The folder of `local` must exist. `local` gets mode 0644.

        most: bytes; of a larger file nothing is copied (FileUnusable).
        """
