"""A guest image as it is shipped, compressed, and unpacked once for a whole computer. File work only: no reactor.

    packing          how a file is compressed, None when it is not
    describe, read   size and SHA-256 of the image, in a file beside the compressed one
    unpack           the image, unpacked into a folder and checked; at once when another job has done it
    sweep            unpacked images whose compressed file the client has deleted go

An unpacked image is called by its SHA-256, so slots and app versions with the same one share it. It lies beside the
compressed file, in the project's folder: the client empties that when the project is detached or reset. What another
job may delete is always something that this module makes again, with the same bytes under the same name.

    vmwrapper_image_<hash>        the image: whole, checked, read-only
    vmwrapper_image_<hash>.part   being written, by who holds the lock
    vmwrapper_image_<hash>.lock   locked while the image is made or removed; in it its format and the names of the
                                  compressed files, a line each

Another version of us may share the folder: an image whose lock file has another format is neither used nor removed.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import json
import lzma
import os
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from vmcontrol.common import imagenote, jsonfile
from vmcontrol.common.atomicfile import fsync_folder, sync
from vmcontrol.common.filelock import NO_LOCKS, is_current, open_lock_file, try_lock

Packing = Literal["xz", "gzip"]

PREFIX = "vmwrapper_image_"
PIECE = 1 << 20
"""Bytes between two gates."""
BLOCK = 1 << 16
"""A block of nothing but zeros is left out: a hole in the file."""
CHECKED_NS = 1_000_000_000 * 1_000_000_000
"""Modification time of a checked image (September 2001). Whoever writes into it, changes it: it is then made again."""
MAX_DESCRIPTION = 1 << 20
PATIENCE_S = 30.0
"""So long may a suspended job keep others from unpacking; then it gives up and begins again when it is resumed."""
LOOK_AGAIN_S = 0.1
LOCK_LIMIT_S = 1800.0
"""For another job to unpack the image. It gives up by itself when it is suspended; one that hangs is not waited for."""
SOURCES_LIMIT = 64 * 1024
"""Bytes of a lock file. The name of a compressed file is a line, and stands there once."""
FORMAT = 1
_FORMAT_LINE = "vmwrapper-format "
"""Before its number; a lock file without such a line is of the first format. It is no file that could be there: a
version that knows no formats takes it for the name of a compressed file that is gone."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_MAGIC: dict[bytes, Packing] = {b"\xfd7zXZ\0": "xz", b"\x1f\x8b": "gzip"}
_ZEROS = bytes(BLOCK)
_HASH_CHARACTERS = 32
"""Of the SHA-256 in a name: Windows' paths end at 260 characters."""


class BadShippedImage(Exception):  # noqa: N818
    """The compressed image or its description cannot be used; `str` is a sentence that begins with its name."""


class NotShared(Exception):  # noqa: N818
    """What is in the folder is another version's, or no file of ours: another folder has to be used. Why."""


class GivenUp(Exception):  # noqa: N818
    """Unpacking broke off because the job was suspended for long. Nothing is left; to be tried again."""


class Gate(Protocol):
    """What `vmwrapper.context.background` hands to work in a thread."""

    def passing(self) -> None: ...
    def passes_within(self, seconds: float) -> bool: ...


@dataclass(frozen=True, slots=True)
class Description:
    """What the image is when it is unpacked."""

    size: int
    sha256: str
    """Hex digits."""
    stored: int
    """Bytes that it takes on a disk: without its blocks of zeros."""
    packed_size: int | None = None
    """Of the compressed file; None: not said."""
    memory_mb: int | None = None
    """MiB that its guest needs; None: not said."""

    @property
    def name(self) -> str:
        """Of the unpacked file."""
        return f"{PREFIX}{self.sha256[:_HASH_CHARACTERS]}"

    def to_json(self) -> bytes:
        values: dict[str, object] = {"size": self.size, "sha256": self.sha256, "stored": self.stored}
        if self.packed_size is not None:
            values["packed_size"] = self.packed_size
        if self.memory_mb is not None:
            values["memory_mb"] = self.memory_mb
        return (json.dumps(values, indent=1) + "\n").encode()


def packing(path: Path) -> Packing | None:
    """By the file's first bytes; its name is not trusted. Raises OSError."""
    with path.open("rb") as file:
        start = file.read(8)
    return next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)


def describe(image: Path) -> Description:
    """Of an image that is not compressed. Raises OSError."""
    digest, size, stored = hashlib.sha256(), 0, 0
    with image.open("rb") as file:
        while piece := file.read(BLOCK):
            digest.update(piece)
            size += len(piece)
            stored += 0 if _is_zero(piece) else len(piece)
    return Description(size, digest.hexdigest(), stored, memory_mb=imagenote.read(image))


def read(path: Path, name: str) -> Description:
    """The description in a file. Raises BadShippedImage."""
    try:
        values = jsonfile.load(Path(os.path.realpath(path)), MAX_DESCRIPTION)
    except FileNotFoundError as error:
        raise BadShippedImage(f"{name}, which has to say what is in the compressed image, is not there") from error
    except (OSError, ValueError) as error:
        raise BadShippedImage(f"{name} cannot be read: {error}") from error
    size, sha256 = _number(values, "size"), values.get("sha256") if isinstance(values, dict) else None
    if size is None or not isinstance(sha256, str) or len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise BadShippedImage(f"{name} does not say the image's size and sha256")
    stored = _number(values, "stored")
    packed, memory = _number(values, "packed_size"), _number(values, "memory_mb")
    return Description(size, sha256, size if stored is None else stored, packed, memory)


def _number(values: object, key: str) -> int | None:
    value = values.get(key) if isinstance(values, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


# --- unpacking


def unpack(
    packed: Path, description: Description, folder: Path, gate: Gate, progress: Callable[[float], None] = lambda _: None
) -> Path:
    """The unpacked image in `folder`, made if it is not there yet; `progress` gets the part that is there, 0 to 1.

    Repeating it does no harm, and neither do many at once. Raises BadShippedImage, GivenUp, NotShared, what the gate
    raises, and OSError for the computer's trouble; nothing half is left then.
    """
    image = folder / description.name
    _check_place(image)
    if _is_good(image, description) and packed.name in _sources(_lock_file(image)):
        return image
    if description.packed_size not in (None, packed.stat().st_size):
        raise BadShippedImage(
            f"{packed.name} is damaged: it has {packed.stat().st_size} bytes, not {description.packed_size}"
        )
    with _locked(_lock_file(image), gate) as lock:
        if not _is_good(image, description):
            _make(packed, description, image, gate, progress)
        _add_source(lock, _lock_file(image), packed.name)
    return image


def _check_place(image: Path) -> None:
    """Raises NotShared when something else than ours is in the place of one of the three files."""
    for path in (image, _part(image), _lock_file(image)):
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(mode):
            raise NotShared(f"{path} is no file")
    try:
        lines = _lines(_lock_file(image))
    except (OSError, ValueError) as error:
        raise NotShared(f"{_lock_file(image)} cannot be read: {error}") from error
    if not _is_ours(lines):
        raise NotShared(f"{_lock_file(image)} is of another version of vmwrapper")


def _is_good(image: Path, description: Description) -> bool:
    try:
        status = image.lstat()
    except OSError:
        return False
    if not stat.S_ISREG(status.st_mode):
        return False
    return status.st_size == description.size and status.st_mtime_ns == CHECKED_NS


def _make(packed: Path, description: Description, image: Path, gate: Gate, progress: Callable[[float], None]) -> None:
    part = _part(image)
    part.unlink(missing_ok=True)  # of a job that was killed: its lock is free
    _check_room(part.parent, description)
    try:
        with os.fdopen(os.open(part, _NEW, 0o600), "wb") as out:
            _write(packed, description, out, gate, progress)
            out.truncate(description.size)
            sync(out)
            if not os.path.samestat(os.fstat(out.fileno()), part.stat()):  # a file system without locks
                raise OSError(errno.EBUSY, "another task unpacks it at the same time")
        part.chmod(0o444)
        os.utime(part, ns=(CHECKED_NS, CHECKED_NS))
        if os.name == "nt" and image.exists():  # a read-only file is not replaced there
            image.chmod(0o644)
        part.replace(image)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    fsync_folder(image.parent)


_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


def _write(
    packed: Path, description: Description, out: IO[bytes], gate: Gate, progress: Callable[[float], None]
) -> None:
    digest, size = hashlib.sha256(), 0
    for piece in _pieces(packed):
        if not gate.passes_within(PATIENCE_S):
            raise GivenUp
        size += len(piece)
        if size > description.size:
            break
        digest.update(piece)
        for start in range(0, len(piece), BLOCK):
            block = piece[start : start + BLOCK]
            if _is_zero(block):
                out.seek(len(block), os.SEEK_CUR)
            else:
                out.write(block)
        progress(size / max(description.size, 1))
    if size != description.size:
        more = "more than " if size > description.size else ""
        raise BadShippedImage(
            f"{packed.name} is damaged: it holds {more}{min(size, description.size)} bytes, not {description.size}"
        )
    if digest.hexdigest() != description.sha256:
        raise BadShippedImage(f"{packed.name} is damaged: its SHA-256 is {digest.hexdigest()}")


def _pieces(packed: Path) -> Iterator[bytes]:
    opened: Any = None
    try:
        opened = lzma.open(packed) if packing(packed) == "xz" else gzip.open(packed)  # noqa: SIM115
        with opened as file:
            while piece := file.read(PIECE):
                yield piece
    except (lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise BadShippedImage(f"{packed.name} is damaged: {error}") from error


def _is_zero(block: bytes) -> bool:
    return block == (_ZEROS if len(block) == BLOCK else bytes(len(block)))


def _check_room(folder: Path, description: Description) -> None:
    """Before the disk is full rather than after. Raises OSError."""
    import shutil

    if shutil.disk_usage(folder).free < description.stored:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- who else


def sweep(folder: Path) -> list[str]:
    """Remove what belongs to compressed files that are gone; the names of the images. Raises nothing.

    The client keeps a file as long as a task or the newest app version needs it, so what is gone is needed by none.
    """
    removed = []
    for lock in sorted(folder.glob(f"{PREFIX}*.lock")):
        image = lock.with_suffix("")
        with contextlib.suppress(OSError, ValueError, _Busy), _locked(lock, None) as held:
            lines = _lines(lock)
            if not _is_ours(lines) or any((folder / name).exists() for name in lines):
                continue
            for path in (image, _part(image)):
                if os.name == "nt" and path.exists():
                    path.chmod(0o644)
                path.unlink(missing_ok=True)
            removed.append(image.name)
            if os.name == "nt":
                os.ftruncate(held, 0)  # an open file cannot be deleted there; an empty one is swept next time
            else:
                lock.unlink()
    return removed


def _lock_file(image: Path) -> Path:
    return image.with_name(f"{image.name}.lock")


def _part(image: Path) -> Path:
    return image.with_name(f"{image.name}.part")


def _lines(lock: Path) -> list[str]:
    """The format, and the names of the compressed files; a line that a crash cut off names nothing that exists.

    Raises OSError, and ValueError for what is no lock file.
    """
    try:
        text = jsonfile.read_file(lock, SOURCES_LIMIT).decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if line]


def _is_ours(lines: Sequence[str]) -> bool:
    """Whether these are of a lock file whose format we know."""
    formats = [line.removeprefix(_FORMAT_LINE) for line in lines if line.startswith(_FORMAT_LINE)]
    return all(one == str(FORMAT) for one in formats)


def _sources(lock: Path) -> list[str]:
    """Raises nothing."""
    try:
        return _lines(lock)
    except (OSError, ValueError):
        return []


def _add_source(lock: int, path: Path, name: str) -> None:
    """Under the lock. A crash may leave half a line: so each begins with a line break."""
    known = _sources(path)
    new = [line for line in (f"{_FORMAT_LINE}{FORMAT}", name) if line not in known]
    if new:
        os.write(lock, "".join(f"\n{line}\n" for line in new).encode("utf-8", "surrogateescape"))
        os.fsync(lock)


class _Busy(Exception):  # noqa: N818
    """Another process holds the lock."""


@contextlib.contextmanager
def _locked(path: Path, gate: Gate | None) -> Iterator[int]:
    """The lock; its descriptor. Waits, passing the gate, or raises _Busy when there is none. OSError: not in time.

    The kernel gives it up when its holder dies, in whatever way. A lock file that was deleted meanwhile is no lock.
    """
    for _ in range(round(LOCK_LIMIT_S / LOOK_AGAIN_S)):
        fd = open_lock_file(path)
        try:
            if _try_lock(fd) and is_current(fd, path):
                yield fd
                return
        finally:
            os.close(fd)
        if gate is None:
            raise _Busy
        gate.passing()
        time.sleep(LOOK_AGAIN_S)  # in a thread of its own: nobody tells of a lock that becomes free
    raise OSError(errno.ETIMEDOUT, f"another job has held it for {LOCK_LIMIT_S:g} s", str(path))


def _try_lock(fd: int) -> bool:
    """On a file system without locks two jobs may unpack at the same time, and one of them fails."""
    try:
        return try_lock(fd)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return True
        raise
