"""A small file in two generations: the newest, and the one before it, which is read when the newest is damaged.

Knows nothing of what is in them: who reads a generation decides whether it is good, and says so with `found_good`. A
damaged newest one is never moved over the good one before it.

    NeverReadable       what has the file's name can never be read; `str` says why
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from vmcontrol.common.atomicfile import replacing, sync
from vmwrapper.paths import is_there

_NEVER_READ = (errno.EIO, errno.EISDIR, errno.ELOOP)


class NeverReadable(Exception):  # noqa: N818 (named for what was found)
    """It is no file, or a bad sector: waiting for a better day helps nobody."""


class TwoGenerations:
    """The two files. `save` alone writes them."""

    def __init__(self, newest: Path, previous: Path, size_limit: int) -> None:
        """size_limit: bytes; of a longer file one byte more than that is read, so that it is seen to be too long."""
        self.paths = (newest, previous)
        """In the order in which they are to be tried."""
        self._newest, self._previous = newest, previous
        self._size_limit = size_limit
        self._newest_is_good = False

    def exists(self) -> bool:
        return is_there(self._newest) or is_there(self._previous)

    def read(self, path: Path) -> bytes:
        """Raises NeverReadable, else OSError: for a reason that may pass, or that somebody can undo.

        A symbolic link is never ours, and is not followed.
        """
        try:
            if not stat.S_ISREG(path.lstat().st_mode):  # a pipe would make us wait for ever
                raise NeverReadable("it is no file")
            with path.open("rb") as file:
                return file.read(self._size_limit + 1)
        except OSError as error:
            if error.errno in _NEVER_READ:
                raise NeverReadable(f"it cannot be read: {error.strerror}") from error
            raise

    def found_good(self, path: Path) -> None:
        """What is in `path` counts; the newest one may take the place of the previous one at the next save."""
        self._newest_is_good = path == self._newest

    def save(self, content: bytes) -> None:
        """Make this the newest generation. Durable on return; a crash before that leaves an older one to read.

        Raises OSError; the generations that were there then still are.
        """
        with replacing(self._newest, mode=0o600) as out:
            out.write(content)
            sync(out)
            if self._newest_is_good:  # a damaged one must not take the place of the good older one
                with contextlib.suppress(FileNotFoundError):
                    self._keep_as_previous()
            _clear(self._newest)
        self._newest_is_good = True

    def _keep_as_previous(self) -> None:
        """A second name for the newest, so that it is there at every moment; where a file has one name only, it is
        renamed, and until the new one is in its place there is only the previous one. Raises OSError."""
        second = self._newest.with_name(f".{self._newest.name}.{os.urandom(4).hex()}")
        try:
            os.link(self._newest, second, follow_symlinks=False)
        except (OSError, NotImplementedError):
            _clear(self._previous)
            self._newest.replace(self._previous)
            return
        try:
            _clear(self._previous)
            second.replace(self._previous)
        finally:  # also when both are the same file already: then a rename does nothing
            second.unlink(missing_ok=True)


def _clear(path: Path) -> None:
    """Set a folder in the place of a file aside. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(f"{path.name}.{os.urandom(4).hex()}"))
