"""Makes what a host task has written survive a power loss, before the checkpoint says that the task is done.

Without it a checkpoint could outlive the outputs that it counts on: file systems write contents later than names. Only
what has changed since the task began is synced: files of the slot, and files in the project's folder that links of the
slot lead to. Files elsewhere are their program's business.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from vmcontrol.common.atomicfile import fsync_file
from vmwrapper.context.logical_names import LogicalNames
from vmwrapper.job.names import is_kept_by_us
from vmwrapper.slot import Slot

MAX_ENTRIES = 2000
"""In a larger slot the whole file system is synced instead: that asks for less than looking at every file."""
SLACK_NS = 2_000_000_000
"""Time stamps of files are coarse, on FAT two seconds."""


class Outputs:
    """The outputs of one slot."""

    def __init__(self, folder: Path, names: LogicalNames | None = None) -> None:
        self._folder = folder
        self._names = names or LogicalNames(Slot(folder))
        self._targets: list[Path] | None = None

    def changed(self, since_ns: int) -> list[Path] | None:
        """Files that have changed; None when there are too many to look at."""
        found: list[Path] = []
        for count, entry in enumerate(self._walk(self._folder)):
            if count == MAX_ENTRIES:
                return None
            with contextlib.suppress(OSError):
                if entry.stat(follow_symlinks=False).st_mtime_ns >= since_ns - SLACK_NS and not is_kept_by_us(
                    entry.name
                ):
                    found.append(Path(entry.path))
        for target in self._link_targets():
            with contextlib.suppress(OSError):
                if target.stat().st_mtime_ns >= since_ns - SLACK_NS:
                    found.append(target)
        return found

    def _walk(self, folder: Path) -> Iterator[os.DirEntry[str]]:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from self._walk(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    yield entry

    def _link_targets(self) -> list[Path]:
        """The client makes its links before it starts us: they are looked for once."""
        if self._targets is None:
            self._targets = self._names.outside_targets()
        return self._targets

    def sync(self, since_ns: int) -> None:
        """Make the changes durable. What cannot be synced (a file that is gone, a pipe) is passed over."""
        changed = self.changed(since_ns)
        if changed is None:
            os.sync()
            return
        folders: set[Path] = set()
        for path in changed:
            if _sync(path):
                folders.add(path.parent)
        for folder in folders - {self._folder}:  # the slot itself is synced with the checkpoint
            _sync(folder)


def _sync(path: Path) -> bool:
    try:
        fsync_file(path)
    except OSError:
        return False
    return True
