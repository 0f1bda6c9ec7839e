"""unzip_input and zip_output: archives of input files unpacked into the slot, and output files packed into one.

Pure file work in pieces, with a gate between them; no state of the job. What an archive holds may come from anywhere,
so nothing of it is written outside the slot or over the files by which the client and we live.

    BadArchive     the archive cannot be used; `str` says why
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path, PurePosixPath

from vmcontrol.atomicfile import fsync_folder
from vmwrapper.job import names
from vmwrapper.job.patterns import compile_pattern
from vmwrapper.links import looks_like_soft_link

PIECE = 1 << 20
"""Bytes between two gates."""
TEMPORARY_PREFIX = f"{names.TEMPORARY_PREFIX}zip."
_UNIX = 3
"""zipfile.ZipInfo.create_system."""

Gate = Callable[[], None]


class BadArchive(Exception):  # noqa: N818
    """An input archive that cannot be used."""


def unpack(archive: Path, folder: Path, gate: Gate, note: Callable[[str], None] = lambda _name: None) -> list[str]:
    """Unpack into `folder`; names of what is there now. Existing files are replaced; repeating it does no harm.

    note: called with the name of a file that looks like a link of BOINC's, before it is there. All names are checked
    before anything is written. Raises BadArchive, and OSError for the computer's trouble.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [(member, _place(member.filename)) for member in opened.infolist()]
            links: list[tuple[Path, str]] = []
            for member, place in members:
                gate()
                target = folder / place
                if member.is_dir():
                    _make_folder(target, folder)
                elif _is_link(member):
                    links.append((target, _link_text(opened, member, place)))
                else:
                    _make_folder(target.parent, folder)
                    _write_member(opened, member, target, gate, lambda place=place: note(place))  # type: ignore[misc]
            for target, text in links:  # last, so that nothing is written through one
                _make_link(target, text, folder)
            return [place for _, place in members]
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, RuntimeError, ValueError) as error:
        # RuntimeError: encrypted. NotImplementedError: a compression that Python does not know.
        raise BadArchive(str(error) or type(error).__name__) from error
    except OSError as error:
        if error.errno is None or isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
            raise BadArchive(f"cannot be read: {error.strerror or error}") from error
        raise
    except _ZLIB_ERROR as error:
        raise BadArchive(f"is damaged: {error}") from error


def pack(archive: Path, folder: Path, chosen: Iterable[str], gate: Gate) -> None:
    """Write an archive of files of `folder`, durable: under its name there is never a half one. Raises OSError."""
    for left in archive.parent.glob(f"{TEMPORARY_PREFIX}*"):
        left.unlink(missing_ok=True)
    fd, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=archive.parent)
    try:
        with os.fdopen(fd, "wb") as out:
            with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as opened:
                for name in chosen:
                    gate()
                    _add(opened, folder / name, name, gate)
            out.flush()
            os.fsync(out.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(archive)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
    fsync_folder(archive.parent)


def choose(folder: Path, patterns: Iterable[str], initial: Collection[str], archive: str) -> list[str]:
    """Names of the files that go into the output archive, sorted: those of the slot itself that were not there before
    the first task, whose name a pattern finds, without folders and without the files that client and wrapper keep."""
    compiled = [compile_pattern(pattern) for pattern in patterns]
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.name not in initial
        and entry.name != archive
        and not names.is_kept_by_us(entry.name)
        and entry.is_file()
        and _found(compiled, entry.name)
    )


def _found(patterns: Iterable[re.Pattern[bytes]], name: str) -> bool:
    encoded = os.fsencode(name)
    return any(pattern.search(encoded) for pattern in patterns)


def _place(name: str) -> str:
    """Where a member goes, relative to the slot. Raises BadArchive for one that would leave it."""
    plain = name.replace("\\", "/")
    path = PurePosixPath(plain)
    if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", plain) or "\0" in plain:
        raise BadArchive(f"holds {name[:200]!r}, which would be written outside the slot")
    if not path.parts:
        raise BadArchive(f"holds a file without a name ({name[:200]!r})")
    if names.is_kept_by_us(path.parts[0].casefold()) or path.parts[0].casefold() in ("stderr.txt", "job.xml"):
        raise BadArchive(f"holds {name[:200]!r}, a file that the BOINC client or vmwrapper uses itself")
    return str(path)


def _is_link(member: zipfile.ZipInfo) -> bool:
    return member.create_system == _UNIX and stat.S_ISLNK(member.external_attr >> 16)


def _link_text(opened: zipfile.ZipFile, member: zipfile.ZipInfo, place: str) -> str:
    text = opened.read(member).decode("utf-8", "surrogateescape") if member.file_size < PIECE else ""
    if not text or "\0" in text:
        raise BadArchive(f"holds the link {place[:200]!r}, which leads nowhere")
    return text


def _make_link(target: Path, text: str, folder: Path) -> None:
    _make_folder(target.parent, folder)
    if not _is_inside(target.parent / text, folder):
        raise BadArchive(f"holds the link {target.name[:200]!r}, which leads outside the slot")
    target.unlink(missing_ok=True)
    target.symlink_to(text)


def _is_inside(path: Path, folder: Path) -> bool:
    inside = os.path.realpath(folder)
    return os.path.commonpath([inside, os.path.realpath(path)]) == inside


def _make_folder(wanted: Path, slot: Path) -> None:
    """A folder in the slot. Raises BadArchive when a link on the way leads out of it."""
    if not _is_inside(wanted, slot):
        raise BadArchive(f"holds a file for {wanted.name!r}, where a link leads outside the slot")
    try:
        wanted.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise BadArchive(f"needs a folder {wanted.name!r}, where a file is") from error


def _write_member(
    opened: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, gate: Gate, note: Callable[[], None]
) -> None:
    if target.is_dir():
        raise BadArchive(f"holds a file {target.name!r}, where a folder is")
    target.unlink(missing_ok=True)  # a link, or a program that runs, is replaced and not written through
    with opened.open(member) as source:
        piece = source.read(PIECE)
        if looks_like_soft_link(piece):
            note()
        with target.open("xb") as out:
            while piece:
                gate()
                out.write(piece)
                piece = source.read(PIECE)
    mode = (member.external_attr >> 16) & 0o777
    if member.create_system == _UNIX and mode:
        target.chmod((mode | stat.S_IRUSR | stat.S_IWUSR) & ~(stat.S_IWGRP | stat.S_IWOTH))


def _add(opened: zipfile.ZipFile, path: Path, name: str, gate: Gate) -> None:
    information = zipfile.ZipInfo.from_file(path, name, strict_timestamps=False)
    information.compress_type = zipfile.ZIP_DEFLATED
    with path.open("rb") as source, opened.open(information, "w", force_zip64=True) as out:
        while piece := source.read(PIECE):
            gate()
            out.write(piece)


def _zlib_error() -> type[Exception]:
    import zlib

    return zlib.error


_ZLIB_ERROR = _zlib_error()
