"""Snapshots inside an overlay: how they are called there, and which is which. Reads only.

A snapshot's name in the file (tag) is `<number>:<name>`: the number gives the order, and the same name can be taken
again before the older one goes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vmcontrol.hypervisors.common.diskimage import BadImage, InternalSnapshot, snapshots
from vmcontrol.hypervisors.interface import HypervisorError, SnapshotNotFound

NAME_BYTES = 200
"""QEMU's limit is 255 with our number."""
_TAG = re.compile(r"([0-9]{1,9}):(.+)", re.DOTALL)


def of_overlay(overlay: Path) -> list[InternalSnapshot]:
    """Ours, oldest first. The overlay is the truth about snapshots. Raises HypervisorError."""
    try:
        found = snapshots(overlay)
    except FileNotFoundError:
        return []
    except (BadImage, OSError) as error:
        raise HypervisorError(f"{overlay}: {error}") from error
    return sorted((one for one in found if _TAG.fullmatch(one.tag)), key=lambda one: number_of(one.tag))


def new_tag(known: Sequence[InternalSnapshot], name: str) -> str:
    """The tag under which `name` is taken now. Raises HypervisorError for a name that cannot be."""
    length = len(name.encode("utf-8", "replace"))
    if not name.isprintable() or not 0 < length <= NAME_BYTES:
        raise HypervisorError(f"{name!r} cannot be a snapshot's name: 1 to {NAME_BYTES} printable bytes")
    return f"{max((number_of(one.tag) for one in known), default=0) + 1}:{name}"


def find(known: Sequence[InternalSnapshot], name: str | None, current: str | None) -> InternalSnapshot:
    """The newest of that name; for None the one with the tag `current`, else the newest. Raises SnapshotNotFound."""
    for one in reversed(known):
        if one.tag == current if name is None else name_of(one.tag) == name:
            return one
    if name is None and known:
        return known[-1]
    raise SnapshotNotFound("there is no snapshot" + ("" if name is None else f" {name!r}"))


def name_of(tag: str) -> str:
    return tag.partition(":")[2]


def number_of(tag: str) -> int:
    return int(tag.partition(":")[0])
