"""A small file in two generations: the newest, and the one before it, which is read when the newest is damaged.

The caller decides whether one that can be read is of use, and says so with `found_good`. A damaged newest one is never
moved over the good one before it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from vmcontrol.common import jsonfile
from vmcontrol.common.atomicfile import replacing, sync
from vmcontrol.common.jsonfile import Damaged
from vmwrapper.paths import is_there

T = TypeVar("T")
_NEVER_READ = (errno.EIO, errno.EISDIR, errno.ELOOP)


class TwoGenerations(Generic[T]):
    """The two files. `save` alone writes them."""

    def __init__(self, newest: Path, previous: Path, size_limit: int, parse: Callable[[bytes], T]) -> None:
        """size_limit: bytes. parse: raises vmcontrol.common.jsonfile.Damaged."""
        self._newest, self._previous = newest, previous
        self._parse = parse
        self._size_limit = size_limit
        self._newest_is_good = False

    def exists(self) -> bool:
        return is_there(self._newest) or is_there(self._previous)

    def readable(self, complaints: list[str]) -> Iterator[tuple[Path, T]]:
        """What is in each of the files, the newest first; a damaged one is a line in `complaints` instead.

        What will never be read again (a bad sector, something else than a file) counts as damaged. Raises OSError when
        a file cannot be read for a reason that may pass, or that somebody can undo.
        """
        for path in (self._newest, self._previous):
            try:
                yield path, self._parse(jsonfile.read_file(path, self._size_limit))
            except FileNotFoundError:
                continue
            except Damaged as error:
                complaints.append(f"{path.name} is damaged: {error}")
            except OSError as error:
                if error.errno not in _NEVER_READ:
                    raise
                complaints.append(f"{path.name} is damaged: it cannot be read: {error.strerror}")

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
