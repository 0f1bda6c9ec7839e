"""Where a VM's files are, as it is remembered: relative to the slot. Reads no file.

BOINC's data folder may be moved, or copied with the original still there, between two starts. What lies in it (the
slot, and the project's folder beside it with the image) moves along, and keeps its place as seen from the slot; what
lies elsewhere stays where it is, and is remembered as an absolute path.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


REMEMBERED = ("image", "secret_file", "console_log")
"""Fields with paths, of both drivers' definitions."""


def carried_over(definition: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a definition, in which an older version may have remembered absolute paths, with relative ones.

    The path of the console log shows in which slot that was: it is in the slot, or in the VM's folder,
    <slot>/vm/<name>.
    """
    changed = dict(definition)
    console, name = changed.get("console_log"), changed.get("name")
    if isinstance(console, str) and Path(console).is_absolute():
        path = Path(console)
        slot = path.parents[2] if path.parent.name == name and len(path.parents) > 2 else path.parent
        for field in REMEMBERED:
            text = changed.get(field)
            if isinstance(text, str) and Path(text).is_absolute():
                changed[field] = remember(Path(text), slot)
    return changed
