"""Looks at files, and folders for them, without surprises. Owns nothing.

Path.is_file() and its kin raise OSError for what they do not take for an answer (Python 3.11: a name that is too long,
a folder that may not be entered). To a job all of that means one thing: there is no such file that could be used.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from vmcontrol.common.beneath import make_folders

LISTING_LIMIT = 40
"""Names that a message lists."""


def is_file(path: Path) -> bool:
    """Whether this leads to a regular file. Raises nothing."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """Whether this leads to a folder. Raises nothing."""
    return stat.S_ISDIR(_mode(path))


def is_there(path: Path) -> bool:
    """Whether this leads to anything. Raises nothing."""
    return _mode(path) != 0


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return 0


def fault_of_input(path: Path, slot_folder: Path) -> str:
    """Why this is no input file, as the end of a sentence that begins with its name; "" when it is one."""
    if not is_there(path):
        return f"is not in the slot; {what_is_there(slot_folder)}"
    if not is_file(path):
        return "is no file"
    return "" if os.access(path, os.R_OK) else "may not be read"


def what_is_there(folder: Path) -> str:
    """List a folder, for a message about a file that is not in it."""
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208 (names are wanted)
    except OSError:
        names = []
    return f"there is: {listed(names)}"


def listed(names: Sequence[str]) -> str:
    """Join names for one line of a message, at most LISTING_LIMIT of them."""
    shown = ", ".join(names[:LISTING_LIMIT]) or "nothing"
    return shown + (f" and {len(names) - LISTING_LIMIT} more" if len(names) > LISTING_LIMIT else "")


def make_folder_for(path: Path, slot_folder: Path) -> None:
    """Make the folders in which `path` is to be, as far as they lie in the slot; durable on return. Raises OSError.

    path: through no link; one on the way is an OSError. Elsewhere (a link of the client leads out of the slot) nothing
    is made: what is not there is not ours to make.
    """
    make_folders(path.parent, Path(os.path.realpath(slot_folder)))
