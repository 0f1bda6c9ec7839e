"""A folder of the guest as an agent lists it; for messages only: no name of it is used on this computer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NAME_LIMIT = 255
"""Characters of a name in a listing; no file system has longer ones."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a folder of the guest. For messages only."""

    name: str
    size: int
    folder: bool


def entries(listing: object, most: int) -> list[Entry]:
    """A guest's listing, which may be anything: what makes no sense in it is left out."""
    found: list[Entry] = []
    for item in listing[:most] if isinstance(listing, list) else []:
        name = item.get("name") if isinstance(item, Mapping) else None
        if isinstance(name, str) and name:
            size = item.get("size")
            sound = isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**63
            found.append(Entry(name[:NAME_LIMIT], size if sound else 0, item.get("folder") is True))
    return found
