"""Where a VM's files are, as it is remembered: relative to the slot. Reads no file.

BOINC's data folder may be moved, or copied with the original still there, between two starts. What lies in it (the
slot, and the project's folder beside it with the image) moves along, and keeps its place as seen from the slot; what
lies elsewhere stays where it is, and is remembered as an absolute path.
"""

from __future__ import annotations

import os
from pathlib import Path

LEVELS = 2
"""From the slot (<data>/slots/<number>) up to the data folder."""


def remember(path: Path, slot: Path) -> str:
    """An absolute path, as it is to be remembered in `slot`. Both as the file system resolves them."""
    for folder in (slot, *list(slot.parents)[:LEVELS]):
        if folder != folder.parent and path.is_relative_to(folder):  # what has only the root in common moves alone
            return Path(os.path.relpath(path, slot)).as_posix()
    return str(path)


def recall(text: str, slot: Path) -> Path:
    """Where that is now."""
    return Path(os.path.normpath(Path(os.path.realpath(slot), text)))


def resolved(path: Path) -> Path:
    """The folder of a file as the file system resolves it, and the file's own name in it: the file may not be there."""
    return Path(os.path.realpath(path.parent), path.name)


def old_slot(console_log: str, vm: str) -> Path | None:
    """The slot in which an older version remembered absolute paths, by that of the console log; None: relative ones.

    vm: the name of its VM. That log is in the slot, or in the VM's folder, <slot>/vm/<name>.
    """
    path = Path(console_log)
    if not path.is_absolute():
        return None
    return path.parents[2] if path.parent.name == vm and len(path.parents) > 2 else path.parent


def moved_along(text: str, old: Path) -> str:
    """An absolute path that an older version remembered in the slot `old`, as it would be remembered today."""
    path = Path(text)
    return remember(path, old) if path.is_absolute() else text
