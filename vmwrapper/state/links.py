"""The links of a slot as they were before any guest ran: their list, written and read back, and the search for them.

Pure, but for `read_soft_link`, `find_link` and those that scan, which look at files.

Links have two forms, and BOINC follows both: a file whose first line holds `<soft_link>PATH</soft_link>`, and a
symbolic link. A file with several names (hard links) is noted too: it looks like any other file, so the ones that were
there can be told from later ones by their number alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath

from vmcontrol.common import jsonfile
from vmcontrol.common.jsonfile import Damaged
from vmcontrol.common.slotfiles import VM_FOLDER
from vmwrapper.job.names import is_kept_by_us

VERSION = 1
SIZE_LIMIT = 16 << 20
"""Bytes of the list; a link takes some 200."""
ENTRIES_LIMIT = 20_000
"""Files of a slot that are looked at, those of the slot itself first. What the job file names is looked at in any
case."""
ENTITIES = (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&apos;", "'"), ("&amp;", "&"))
"""xml.sax.saxutils has them too, and imports urllib, email and ssl: a twelfth of the time to a job's first task."""

FIRST_LINE_BYTES = 511
_INNER_FILE_BYTES = 8192
"""In folders of the slot: a file that is larger is no link that the client has made."""
_SOFT_LINK = re.compile(rb"<soft_link>([^<]*)")


class Kind(StrEnum):
    SOFT_LINK = "soft link"
    """BOINC's: a small text file."""
    SYMLINK = "symbolic link"
    HARD_LINK = "file with several names"


@dataclass(frozen=True, slots=True)
class Link:
    """One name in the slot that stands for something else."""

    name: str
    """Relative to the slot, with / between folders."""
    kind: Kind
    target: str
    """As it stands in the link; "" of a file with several names."""
    device: int
    inode: int
    """Of the link itself."""


@dataclass(frozen=True, slots=True)
class SlotLinks:
    """The list as it is on disk."""

    established: bool = False
    """These are all links that there are: a guest may have run since."""
    links: tuple[Link, ...] = ()
    unpacked: tuple[str, ...] = ()
    """Files that look like soft links and came out of an archive, so that they are none."""


def to_bytes(known: SlotLinks) -> bytes:
    """The file's content."""
    content = asdict(known)
    value = {"version": VERSION, "sha256": _digest(content), "content": content}
    return (json.dumps(value, indent=0) + "\n").encode()


@dataclass(frozen=True, slots=True)
class _File:
    version: jsonfile.Count
    sha256: str
    content: SlotLinks


def from_bytes(content: bytes) -> SlotLinks:
    """Read strictly: every field there, of its type, nothing else, and the checksum right. Raises Damaged."""
    if len(content) > SIZE_LIMIT:
        raise Damaged(f"more than {SIZE_LIMIT} bytes")
    value = jsonfile.parse(content)
    file = jsonfile.typed(_File, value, exact=True)
    if file.version != VERSION:
        raise Damaged(f"version {file.version}; this program reads {VERSION}")
    if file.sha256 != _digest(value["content"]):
        raise Damaged("its checksum is wrong")
    known = file.content
    for link in known.links:
        if bool(link.target) is (link.kind is Kind.HARD_LINK) or "\0" in link.target:
            raise Damaged(f"{link.name!r:.80}: kind and target do not go together")
    names = [link.name for link in known.links]
    if len(set(names)) != len(names) or not all(_is_plain(name) for name in (*known.unpacked, *names)):
        raise Damaged("a name is none, or stands twice")
    return known


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_plain(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and str(path) == name


# --- looking ---------------------------------------------------------------------------------------------------------


def looks_like_soft_link(beginning: bytes) -> bool:
    """Whether BOINC would take a file that begins so for a link."""
    return _SOFT_LINK.search(_first_line(beginning)) is not None


def _first_line(beginning: bytes) -> bytes:
    return beginning[:FIRST_LINE_BYTES].partition(b"\n")[0]


def read_soft_link(path: Path) -> str | None:
    """boinc_resolve_filename (lib/app_ipc.cpp): what a file of BOINC's form leads to; None for every other file.

    A symbolic link, a file that is no link and a name that does not exist stand for themselves: the system follows the
    first.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # a pipe would make us wait for ever
            return None
        with path.open("rb") as file:
            found = _SOFT_LINK.search(_first_line(file.readline(FIRST_LINE_BYTES)))
    except (OSError, ValueError):
        return None
    if found is None:
        return None
    target = os.fsdecode(found[1]).strip(" \t\r\n")
    for entity, letter in ENTITIES:
        target = target.replace(entity, letter)
    return target


def find_link(folder: Path, name: str) -> Link | None:
    """The link that has this name now; None when it is none. Raises nothing."""
    path = folder / name
    try:
        status = path.lstat()
        kind, target = Kind.HARD_LINK, ""
        if stat.S_ISLNK(status.st_mode):
            kind, target = Kind.SYMLINK, os.fspath(path.readlink())
        elif not stat.S_ISREG(status.st_mode):
            return None
        elif soft := read_soft_link(path):
            kind, target = Kind.SOFT_LINK, soft
        elif status.st_nlink < 2:
            return None
    except (OSError, ValueError):
        return None
    return Link(name, kind, target, status.st_dev, status.st_ino)


def scan_links(folder: Path, wanted: Iterable[str]) -> tuple[dict[str, Link], bool]:
    """The links of a slot by their names, and whether all of it was looked at. wanted: names of the job file, each of
    them looked at, with the folders on its way."""
    found: dict[str, Link] = {}
    for name in wanted:
        for step in (*reversed(PurePosixPath(name).parents), PurePosixPath(name)):
            if step.name and (link := find_link(folder, str(step))) is not None:
                found[link.name] = link
    left = ENTRIES_LIMIT
    folders = deque([""])
    while folders:
        inside = folders.popleft()
        try:
            entries = sorted(os.scandir(folder / inside), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            name = f"{inside}/{entry.name}" if inside else entry.name
            if not inside and (is_kept_by_us(name) or name == VM_FOLDER):
                continue
            if not left:
                return found, False
            left -= 1
            if entry.is_dir(follow_symlinks=False):
                folders.append(name)
            elif _may_be_link(entry, inside) and (link := find_link(folder, name)) is not None:
                found[name] = link
    return found, True


def top_links(folder: Path) -> list[str]:
    """Names of the slot itself that are links now."""
    try:
        return [entry.name for entry in os.scandir(folder) if find_link(folder, entry.name) is not None]
    except OSError:
        return []


def _may_be_link(entry: os.DirEntry[str], inside: str) -> bool:
    if not inside or entry.is_symlink():
        return True
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError:
        return False
    return status.st_nlink > 1 or status.st_size <= _INNER_FILE_BYTES
