"""Archives of unzip_input: unpacked into the slot. File work in pieces, with a gate between them.

What an archive holds may come from anywhere: nothing of it is written outside the slot, through a link, or over the
files by which the client and we live. A member that may not be written is left out with a warning, and the rest is
unpacked; only what cannot be read, or what is larger than the job's disk bound, spoils the archive.

    BadArchive     the archive cannot be used; `str` says why
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from vmwrapper.host.zip_names import Unplaced, is_folder, name_of, place_of
from vmwrapper.state.links import looks_like_soft_link, read_soft_link

PIECE = 1 << 20
"""Bytes between two gates."""
LINK_LIMIT = 4096
"""Bytes of a link's text (PATH_MAX)."""
TOLD_LIMIT = 20
"""Members left out that are named; the others are counted."""
_UNIX = 3
"""zipfile.ZipInfo.create_system."""
_NO_SUCH_NAME = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)

Gate = Callable[[], None]
log = logging.getLogger(__name__)


class BadArchive(Exception):  # noqa: N818
    """An input archive that cannot be used."""


def unpack(archive: Path, folder: Path, gate: Gate, note: Callable[[str], None], *, limit: float = 0.0) -> list[str]:
    """Unpack into `folder`; names of what is there now. Existing files are replaced; repeating it does no harm.

    note: called with the name of a file that looks like a link of BOINC's, before it is there. limit: bytes that its
    files may have together, 0: any. Raises BadArchive, and OSError for the computer's trouble.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            return _Unpacking(opened, archive.name, folder, gate, note).run(limit)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, RuntimeError, ValueError) as error:
        # RuntimeError: encrypted. NotImplementedError: a compression that Python does not know.
        raise BadArchive(str(error) or type(error).__name__) from error
    except OSError as error:
        if error.errno is None or isinstance(error, FileNotFoundError | PermissionError):
            raise BadArchive(f"cannot be read: {error.strerror or error}") from error
        raise
    except zlib.error as error:
        raise BadArchive(f"is damaged: {error}") from error


@dataclass(slots=True)
class _Unpacking:
    """One archive."""

    opened: zipfile.ZipFile
    name: str
    folder: Path
    gate: Gate
    note: Callable[[str], None]
    left_out: int = 0
    made: list[str] = field(default_factory=list)

    def run(self, limit: float) -> list[str]:
        members = [placed for member in self.opened.infolist() if (placed := self._placed(member)) is not None]
        size = sum(member.file_size for member, _, is_a_folder in members if not is_a_folder)
        if 0 < limit < size:
            raise BadArchive(f"holds {size} bytes, more than the {limit:.0f} that the job may have on disk")
        links: list[tuple[str, PurePosixPath, str]] = []
        for member, place, is_a_folder in members:
            self.gate()
            name = name_of(member)
            with self._left_out_when_unplaced(name):
                if is_a_folder:
                    self._make_folder(place)
                elif _is_link(member):
                    links.append((name, place, self._link_text(member)))
                else:
                    self._write(member, place)
        self._make_links(links)  # last, so that nothing is written through one
        if self.left_out > TOLD_LIMIT:
            log.warning("unzip_input: %s: %d more members are left out", self.name, self.left_out - TOLD_LIMIT)
        return self.made

    @contextlib.contextmanager
    def _left_out_when_unplaced(self, name: str) -> Iterator[None]:
        try:
            yield
        except Unplaced as why:
            self._leave_out(name, str(why))
        except OSError as error:
            if error.errno not in _NO_SUCH_NAME:
                raise
            self._leave_out(name, f"has a name that this system does not take ({error.strerror})")

    def _leave_out(self, name: str, why: str) -> None:
        self.left_out += 1
        if self.left_out <= TOLD_LIMIT:
            log.warning("unzip_input: %s: %r is left out: it %s", self.name, name[:200], why)

    def _placed(self, member: zipfile.ZipInfo) -> tuple[zipfile.ZipInfo, PurePosixPath, bool] | None:
        name = name_of(member)
        try:
            return member, place_of(name), is_folder(name)
        except Unplaced as why:
            if name.strip("/."):  # "./" is the slot itself
                self._leave_out(name, str(why))
            return None

    def _make_folder(self, place: PurePosixPath) -> None:
        """Each folder on the way is one, and no link. Raises Unplaced."""
        folder = self.folder
        for part in place.parts:
            folder /= part
            mode = _mode(folder)
            if mode == 0:
                folder.mkdir(exist_ok=True)
            elif not stat.S_ISDIR(mode):
                raise Unplaced(f"lies below {part!r}, which is {'a link' if stat.S_ISLNK(mode) else 'a file'}")

    def _write(self, member: zipfile.ZipInfo, place: PurePosixPath) -> None:
        """Raises Unplaced; OSError of the disk."""
        target = self.folder / place
        self._make_folder(place.parent)
        if stat.S_ISDIR(_mode(target)):
            raise Unplaced("is a file, and there is a folder of that name")
        if _leads_to_an_output(target, self.folder):
            raise Unplaced("would take the place of the client's link to an output file")
        target.unlink(missing_ok=True)  # a link, or a program that runs, is replaced and not written through
        with self.opened.open(member) as source:
            piece = source.read(PIECE)
            if looks_like_soft_link(piece):
                self.note(str(place))
            with target.open("xb") as out:
                while piece:
                    self.gate()
                    out.write(piece)
                    piece = source.read(PIECE)
        mode = (member.external_attr >> 16) & 0o777
        if member.create_system == _UNIX and mode:
            target.chmod((mode | stat.S_IRUSR | stat.S_IWUSR) & ~(stat.S_IWGRP | stat.S_IWOTH))
        self.made.append(str(place))

    # --- links

    def _link_text(self, member: zipfile.ZipInfo) -> str:
        text = self.opened.read(member).decode("utf-8", "surrogateescape") if member.file_size <= LINK_LIMIT else ""
        if not text or "\0" in text:
            raise Unplaced("is a link that leads nowhere")
        return text

    def _make_links(self, links: list[tuple[str, PurePosixPath, str]]) -> None:
        made: list[tuple[str, Path]] = []
        for name, place, text in links:
            target = self.folder / place
            with self._left_out_when_unplaced(name):
                self._make_folder(place.parent)
                if stat.S_ISDIR(_mode(target)):
                    raise Unplaced("is a link, and there is a folder of that name")
                if Path(text).is_absolute() or not _is_inside(target.parent / text, self.folder):
                    raise Unplaced("is a link that leads outside the slot")
                target.unlink(missing_ok=True)
                target.symlink_to(text)
                made.append((name, target))
        # Where a link leads can change with the links that are made after it.
        while outside := [(name, link) for name, link in made if not _is_inside(link, self.folder)]:
            for name, link in outside:
                link.unlink()
                made.remove((name, link))
                self._leave_out(name, "is a link that leads outside the slot")
        self.made += [str(link.relative_to(self.folder)) for _, link in made]


def _leads_to_an_output(target: Path, folder: Path) -> bool:
    """Whether it is a link of the client's to a file that is not there yet."""
    text = read_soft_link(target) if stat.S_ISREG(_mode(target)) else None
    return text is not None and _mode(folder / text) == 0


def _is_link(member: zipfile.ZipInfo) -> bool:
    return member.create_system == _UNIX and stat.S_ISLNK(member.external_attr >> 16)


def _is_inside(path: Path, folder: Path) -> bool:
    inside = os.path.realpath(folder)
    return os.path.commonpath([inside, os.path.realpath(path)]) == inside


def _mode(path: Path) -> int:
    """st_mode, a link as a link; 0 when there is nothing."""
    try:
        return path.lstat().st_mode
    except FileNotFoundError:
        return 0
