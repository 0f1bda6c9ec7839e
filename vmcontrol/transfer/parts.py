"""Files that are being copied out of a guest: beside their place, hidden, until they are whole.

A HostMain that is killed leaves them: the next one of the slot removes what lies in the slot (`sweep_parts`), and the
next copy of the same file what lies beside it elsewhere (a job's output may stand in the project's folder, where other
slots have theirs). Owns the parts of the copies that are under way.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from vmcontrol.common import atomicfile
from vmcontrol.common.beneath import held_folder, open_file
from vmcontrol.common.slotfiles import HOSTMAIN_LOCK, VM_FOLDER
from vmcontrol.transfer.interface import LocalFileMissing

log = logging.getLogger(__name__)

PREFIX = ".vmwrapper_part_"
DEPTH = 4
"""Folders below the slot that are looked into: one that is started standalone may have somebody's home for a slot."""

_under_way: set[Path] = set()


@contextlib.contextmanager
def opened(local: Path, slot: Path | None) -> Iterator[tuple[int, os.stat_result]]:
    """Descriptor and status of a regular file to send. Raises LocalFileMissing. slot: below it no link is followed."""
    try:
        fd = open_file(local, slot, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise LocalFileMissing(local, error.strerror or str(error)) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise LocalFileMissing(local, "is no regular file")
        yield fd, status
    finally:
        os.close(fd)


@contextlib.contextmanager
def part_of(local: Path, slot: Path | None = None) -> Iterator[tuple[int, Path]]:
    """Descriptor and path of a new, empty file beside `local`; `put_in_place` completes it. Raises OSError.

    slot: below it no link is followed, and the path is one through the folder as it was opened.
    """
    mark = f"{PREFIX}{hashlib.sha256(os.fsencode(local)).hexdigest()[:12]}_"
    with held_folder(local.parent, slot) as folder:
        with contextlib.suppress(OSError):
            for stale in folder.glob(f"{mark}*"):
                if local.parent / stale.name not in _under_way:
                    stale.unlink(missing_ok=True)
        fd, name = tempfile.mkstemp(prefix=mark, dir=folder)
        path = Path(name)
        _under_way.add(local.parent / path.name)
        try:
            yield fd, path
        finally:
            os.close(fd)
            _under_way.discard(local.parent / path.name)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def put_in_place(fd: int, part: Path, local: Path) -> None:
    """The part becomes `local`, durable on return; a link of that name is replaced and not followed. Blocks."""
    atomicfile.put_in_place(part, part.with_name(local.name), fd=fd, mode=0o644)


def sweep_parts(slot: Path, before: float | None = None) -> None:
    """Remove what a killed HostMain left in the slot. before: Unix time; younger ones are of copies of ours. Blocks."""
    before = time.time() if before is None else before
    for folder, folders, names in os.walk(slot):
        if Path(folder) != slot and Path(folder, VM_FOLDER, HOSTMAIN_LOCK).exists():
            folders.clear()  # the slot of another HostMain
            continue
        if len(Path(folder).relative_to(slot).parts) >= DEPTH:
            folders.clear()
        for name in names:
            path = Path(folder, name)
            if name.startswith(PREFIX) and path not in _under_way:
                with contextlib.suppress(OSError):
                    if path.lstat().st_mtime < before:
                        path.unlink()
                        log.info("%s: removed, a copy that was cut off", path)
