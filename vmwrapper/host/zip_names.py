"""Names in zip archives: which bytes they are, and where a file of such a name may go. Pure.

An archive has names in UTF-8 (flag 0x800, or the field 0x7075 of Info-ZIP), or in what its writer took for right. Those
are guessed as libzip does, which BOINC's wrapper uses (its zip_utf-8.c): what looks like UTF-8 is UTF-8, else it is
cp437.

    Unplaced     a member that goes nowhere; `str` says why
"""

from __future__ import annotations

import os
import re
import struct
import sys
import zipfile
import zlib
from pathlib import PurePosixPath

from vmcontrol.common import slotfiles
from vmwrapper.job import names

_IS_UTF8 = 0x800
"""zipfile.ZipInfo.flag_bits."""
_UNICODE_PATH = 0x7075
_GUESSED_UTF8 = re.compile(
    rb"(?:[\t\n\r -\x7f]|[\xc0-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf7][\x80-\xbf]{3})*"
)
_CONTROLS = str.maketrans(dict(zip(range(1, 32), "☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼", strict=True)) | {127: "⌂"})
"""What cp437 has where Python's codec gives control characters."""
_FOLDS_CASE = sys.platform in ("win32", "darwin")
_DRIVE = re.compile(r"[A-Za-z]:")


class Unplaced(Exception):  # noqa: N818
    """Nothing is made of this member."""


class RawName(zipfile.ZipInfo):
    """A member to be written whose name may be any bytes: one that is not UTF-8 gets no flag that says so."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802 (zipfile's, in Python 3.11 to 3.14)
        raw = self.filename.encode("utf-8", "surrogateescape")
        try:
            raw.decode("ascii")
        except UnicodeDecodeError:
            flag = _IS_UTF8 if _is_utf8(raw) else 0
            return raw, (self.flag_bits & ~_IS_UTF8) | flag
        return raw, self.flag_bits


def name_of(member: zipfile.ZipInfo) -> str:
    """The name as libzip gives it, bytes that are not UTF-8 as os.fsdecode does."""
    is_told = bool(member.flag_bits & _IS_UTF8)
    raw = member.orig_filename.encode("utf-8" if is_told else "cp437")
    told = _unicode_path(member.extra, raw)
    if told is None and not is_told and not _GUESSED_UTF8.fullmatch(raw):
        return raw.decode("cp437").partition("\0")[0].translate(_CONTROLS)
    return (raw if told is None else told).decode("utf-8", "surrogateescape").partition("\0")[0]


def _unicode_path(extra: bytes, raw: bytes) -> bytes | None:
    """The name in Info-ZIP's field, if it belongs to this name."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _UNICODE_PATH and len(field) >= 5:
            version, checksum = struct.unpack_from("<BI", field)
            return field[5:] if version == 1 and checksum == zlib.crc32(raw) and _is_utf8(field[5:]) else None
    return None


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def place_of(name: str, *, windows: bool = os.name == "nt") -> PurePosixPath:
    """Where a member goes, relative to the slot. An absolute name counts below the slot, as with BOINC's wrapper.

    Raises Unplaced: it would leave the slot, has no name, or is a file of the client or ours.
    """
    plain = name.replace("\\", "/") if windows else name
    parts: list[str] = []
    for part in plain.split("/"):
        if part == ".." and not parts:
            raise Unplaced("would be outside the slot")
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    if not parts:
        raise Unplaced("has no name")
    if windows and any(_DRIVE.match(part) or ":" in part for part in parts):
        raise Unplaced("has a name that this system does not know")
    first = parts[0].casefold() if _FOLDS_CASE or windows else parts[0]
    if names.is_kept_by_us(first) or first in (slotfiles.STDERR, slotfiles.JOB_FILE):
        raise Unplaced("is a file that the BOINC client or vmwrapper uses itself")
    return PurePosixPath(*parts)


def is_folder(name: str) -> bool:
    """Whether the entry is a folder and no file (zip/boinc_zip.cpp)."""
    return name.endswith(("/", "\\"))
