"""Files that survive power loss: written beside their place, synced, renamed, and the folder synced.

Owns no file. Used by the wrapper, HostMain and the guest agent alike.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

PREFIX_BYTES = 150
"""Of a file's name in that of a temporary file beside it, which has at most 255 bytes with all that is added."""


def name_prefix(name: str) -> str:
    """The beginning of a file's name for temporary files beside it: file systems count bytes, not characters."""
    return os.fsencode(name)[:PREFIX_BYTES].decode("utf-8", "ignore")


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` durable. Windows has no such call and needs none (NTFS journals its folders)."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `content`: after a crash at any point it has either the old or the new content, whole.

    Raises OSError; the old content is then untouched and no temporary file is left.
    """
    fd, temporary = tempfile.mkstemp(prefix=f".{name_prefix(path.name)}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        if os.name != "nt":
            Path(temporary).chmod(mode)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
    fsync_folder(path.parent)
