"""Files that survive power loss: written beside their place, synced, renamed, and the folder synced.

Owns no file. Used by the wrapper, HostMain and the guest agent alike.

    write_atomically    a small file from its content
    replacing           any file, written piece by piece
    put_in_place        a file that was written elsewhere in the same folder
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PREFIX_BYTES = 150
"""Of a file's name in that of a temporary file beside it, which has at most 255 bytes with all that is added."""


def name_prefix(name: str) -> str:
    """The beginning of a file's name for temporary files beside it: file systems count bytes, not characters."""
    return os.fsencode(name)[:PREFIX_BYTES].decode("utf-8", "ignore")


def fsync_file(path: Path) -> None:
    """Make all that was written to `path` durable, whoever wrote it. A folder counts as a file, a pipe is an OSError.

    Raises OSError.
    """
    access = os.O_RDWR if os.name == "nt" else os.O_RDONLY | os.O_NONBLOCK
    fd = os.open(path, access)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` durable. Windows has no such call and needs none (NTFS journals its folders)."""
    if os.name != "nt":
        fsync_file(folder)


def put_in_place(source: Path, target: Path, *, fd: int | None = None, mode: int | None = None) -> None:
    """Replace `target` by `source`, a complete file of the same folder; durable on return. A link is replaced too.

    fd: of `source`, where it is open. mode: None: as it is. Raises OSError; the old `target` is then untouched, unless
    the last step fails (the folder's fsync).
    """
    if mode is not None and os.name != "nt":
        os.chmod(source if fd is None else fd, mode)  # noqa: PTH101 (of a descriptor)
    if fd is None:
        fsync_file(source)
    else:
        os.fsync(fd)
    source.replace(target)
    fsync_folder(target.parent)


@contextlib.contextmanager
def replacing(path: Path, *, mode: int = 0o644, prefix: str = "") -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` when the block ends: after a crash there is the old or the new one, whole.

    prefix: of the new file's name until then. Raises OSError; after any error the old file is untouched and the new
    one is gone.
    """
    fd, name = tempfile.mkstemp(prefix=prefix or f".{name_prefix(path.name)}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(fd, "wb") as out:
            yield out
            sync(out)
        if os.name != "nt":
            temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_folder(path.parent)


def sync(file: BinaryIO) -> None:
    """Make what was written to an open file durable. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def write_atomically(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `content`; see `replacing`."""
    with replacing(path, mode=mode) as out:
        out.write(content)
