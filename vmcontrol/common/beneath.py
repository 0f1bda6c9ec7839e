"""Files below a folder, opened without following any link on the way. Used by the wrapper and HostMain alike.

A slot may hold links that nobody should follow: an archive that came out of a guest was unpacked by a program of the
job, say. A path that was looked at can be another one when it is opened; so each folder on the way is opened from the
one before it, and is never a link. What lies outside of the folder is the volunteer's own and is opened as it is.

Windows opens nothing that way: there the links on the way are looked for before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from vmcontrol.common.atomicfile import fsync_folder

LINK_WORDS = "is a link, or a link leads to it, that was not there before the first guest task"
_BY_FOLDER = {os.open, os.mkdir, os.stat} <= os.supports_dir_fd
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _NO_LINK
_OPEN_FOLDERS = Path("/proc/self/fd")
"""Linux: the way from an open folder to a path that leads through it and nowhere else."""


def parts_below(path: Path, base: Path | None) -> tuple[str, ...] | None:
    """The names on the way from `base` to `path`; None when it is not below it, or there is no `base`."""
    if base is None:
        return None
    plain = Path(os.path.normpath(path))
    return plain.relative_to(base).parts if plain.is_relative_to(base) else None


def open_file(path: Path, base: Path | None, flags: int, mode: int = 0o644) -> int:
    """os.open; of a path below `base` nothing is followed: OSError (ELOOP) when something on the way is a link."""
    parts = parts_below(path, base)
    flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if parts is None or base is None:
        return os.open(path, flags, mode)
    if not _BY_FOLDER:
        refuse_links(base, parts)
        return os.open(path, flags, mode)
    folder = _open_folder(base, parts[:-1], path)
    try:
        return os.open(parts[-1] if parts else ".", flags | _NO_LINK, mode, dir_fd=folder)
    except OSError as error:
        raise _about(error, path) from error
    finally:
        os.close(folder)


@contextlib.contextmanager
def held_folder(folder: Path, base: Path | None) -> Iterator[Path]:
    """A path to this folder that stays the same folder whatever is renamed on the way, and goes through no link.

    Outside of `base`: the folder as it is. Raises OSError.
    """
    parts = parts_below(folder, base)
    if parts is None or base is None:
        yield folder
        return
    if not _BY_FOLDER:
        refuse_links(base, parts)
        yield folder
        return
    fd = _open_folder(base, parts, folder)
    try:
        by_descriptor = _OPEN_FOLDERS / str(fd)
        yield by_descriptor if by_descriptor.is_dir() else folder
    finally:
        os.close(fd)


def make_folders(folder: Path, base: Path) -> None:
    """Make what is missing of a folder below `base`; durable on return. Elsewhere nothing is made. Raises OSError."""
    parts = parts_below(folder, base)
    if not parts:
        return
    place = base
    for count, name in enumerate(parts):
        with held_folder(place, base) as held, contextlib.suppress(FileExistsError):
            (held / name).mkdir(0o755)
            fsync_folder(held)
        place = place / name
        if count + 1 == len(parts):
            with held_folder(place, base):  # it is a folder, and no link to one
                pass


def refuse_links(base: Path, parts: tuple[str, ...]) -> None:
    """Raises OSError (ELOOP) when one of the names on the way from `base` is a link."""
    place = base
    for name in parts:
        place = place / name
        try:
            is_link = stat.S_ISLNK(place.lstat().st_mode)
        except FileNotFoundError:
            return
        if is_link:
            raise OSError(errno.ELOOP, LINK_WORDS, str(place))


def _open_folder(base: Path, parts: tuple[str, ...], path: Path) -> int:
    fd = os.open(base, _FOLDER & ~_NO_LINK)
    for name in parts:
        try:
            inner = os.open(name, _FOLDER, dir_fd=fd)
        except OSError as error:
            # Linux says of a link here that it is no folder.
            raise _about(error, path, is_link=_is_link(name, fd)) from error
        finally:
            os.close(fd)
        fd = inner
    return fd


def _is_link(name: str, folder: int) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    return False


def _about(error: OSError, path: Path, *, is_link: bool = False) -> OSError:
    """The same error of the whole path, with words for the one that matters here."""
    if is_link or error.errno in (errno.ELOOP, errno.EMLINK):  # Linux and macOS; FreeBSD
        return OSError(errno.ELOOP, LINK_WORDS, str(path))
    return OSError(error.errno, error.strerror, str(path))
