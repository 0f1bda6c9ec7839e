"""A hypervisor's error messages: what they mean, what the volunteer can do, when to try again. Pure.

Each driver has a table with its hypervisor's words. What no row knows stays a HypervisorError with those words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from vmcontrol.hypervisors.interface import HostProblem, HypervisorError

MINUTE, MINUTES_5, HOUR = 60, 300, 3600


@dataclass(frozen=True, slots=True)
class Row:
    """One problem. delay_s: None if it never passes by itself."""

    pattern: re.Pattern[str]
    key: str
    reason: str
    delay_s: int | None


def row(pattern: str, key: str, reason: str = "", delay_s: int | None = None) -> Row:
    """A row of a table; of a problem that all hypervisors have, key and pattern are enough."""
    if not reason:
        reason, delay_s = _COMMON[key]
    return Row(re.compile(pattern, re.IGNORECASE), key, reason, delay_s)


_COMMON: dict[str, tuple[str, int | None]] = {
    "no-memory": (
        "this computer has not enough free memory for the virtual machine; it will be tried again",
        MINUTES_5,
    ),
    "disk-full": ("the disk of this computer is full; free some space in BOINC's data folder", HOUR),
    "port-taken": ("another program uses a network port that this job needs; it will be tried again", MINUTES_5),
    "image-damaged": (
        "the virtual machine's disk image is missing or damaged; reset the project to load it again",
        None,
    ),
    "no-permission": ("this user may not use a file that the virtual machine needs", HOUR),
    "no-files": ("this computer has too many files open; it will be tried again", MINUTE),
}
"""Key -> reason and delay."""


def look_up(table: Iterable[Row], what: str, words: str) -> HypervisorError:
    """The error for what a hypervisor said, in one line, when `what` was tried."""
    for one in table:
        if one.pattern.search(words):
            return HostProblem(f"{one.reason} ({what}: {words})", key=one.key, delay_s=one.delay_s)
    return HypervisorError(f"{what}: {words}")


def one_line(text: str) -> str:
    """The end of a hypervisor's words, in one line."""
    return " ".join(text.split())[-2000:] or "it said nothing"


def bad_image(path: object, why: str, *, missing: bool = False) -> HostProblem:
    """The project's image cannot be used."""
    key = "image-missing" if missing else "image-damaged"
    return HostProblem(f"the disk image {path} cannot be used: {why}", key=key, delay_s=None)


def process_stuck(text: str) -> HostProblem:
    """A process of a VM that does not end even when it is killed. text: which, as a sentence."""
    return HostProblem(f"{text}; only a restart of this computer may help", key="process-stuck", delay_s=HOUR)
