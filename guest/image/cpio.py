"""Writer of "newc" cpio archives, the format of an initramfs (Documentation/driver-api/early-userspace/buffer-format).

Pure: names, modes and contents in, the same bytes for the same input out.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass

MAGIC = b"070701"
TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file. name: relative path; mode: type and permissions; content: a link's target for links."""

    name: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def folder(name: str) -> Entry:
    return Entry(name, stat.S_IFDIR | 0o755)


def file(name: str, content: bytes, *, mode: int = 0o644) -> Entry:
    return Entry(name, stat.S_IFREG | mode, content)


def link(name: str, target: str) -> Entry:
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def character_device(name: str, major: int, minor: int) -> Entry:
    return Entry(name, stat.S_IFCHR | 0o600, device=(major, minor))


def archive(entries: Iterable[Entry], *, mtime: int) -> bytes:
    """The archive; all files belong to root and have `mtime` (seconds since 1970). Folders must precede their files."""
    parts = []
    number = 0
    for number, entry in enumerate(entries, 1):
        parts.append(_record(entry, number, mtime))
    parts.append(_record(Entry(TRAILER, 0), number + 1, 0))
    return b"".join(parts)


def _record(entry: Entry, number: int, mtime: int) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (number, entry.mode, 0, 0, links, mtime, len(entry.content), 0, 0, *entry.device, len(name), 0)
    header = MAGIC + b"".join(b"%08x" % field for field in fields) + name
    return header + bytes(-len(header) % 4) + entry.content + bytes(-len(entry.content) % 4)
