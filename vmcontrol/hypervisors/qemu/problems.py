"""QEMU's complaints, told apart: pattern, what it means, what the volunteer can do, when a new try makes sense.

Pure. The texts are those of QEMU 7.2 unless a comment says otherwise. What no row knows stays a HypervisorError with
QEMU's own words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vmcontrol.hypervisors.interface import HostProblem, HypervisorError

MINUTES_5, HOUR = 300, 3600


@dataclass(frozen=True, slots=True)
class Row:
    """One problem. delay_s: None if it never passes by itself."""

    pattern: re.Pattern[str]
    key: str
    reason: str
    delay_s: int | None


def _row(pattern: str, key: str, reason: str, delay_s: int | None) -> Row:
    return Row(re.compile(pattern, re.IGNORECASE), key, reason, delay_s)


PROBLEMS = (
    _row(
        r"cannot set up guest memory|cannot allocate memory|unable to allocate",
        "no-memory",
        "this computer has not enough free memory for the virtual machine; it will be tried again",
        MINUTES_5,
    ),
    _row(
        r"no space left on device|disk quota exceeded|file too large|not enough (free )?space|the disk is full"
        r"|\berror -(28|122|27)\b|\b(ENOSPC|EDQUOT|EFBIG)\b",
        "disk-full",
        "the disk of this computer is full; free some space in BOINC's data folder",
        HOUR,
    ),
    _row(
        r"could not set up host forwarding rule",
        "port-taken",
        "another program uses a network port that this job needs; it will be tried again",
        MINUTES_5,
    ),
    _row(
        r'failed to get "?\w+"? lock|failed to get shared',
        "disk-locked",
        "another process still uses the virtual machine's disk; it will be tried again",
        60,
    ),
    _row(
        # The driver checks the image itself; these are for one that vanished or broke later.
        r'"node-name": "image".*: (could not open|image is|invalid|unsupported|not a)'
        r"|could not open backing (file|image)",
        "image-damaged",
        "the virtual machine's disk image is missing or damaged; reset the project to load it again",
        None,
    ),
    _row(r"read-only file system", "read-only", "BOINC's data folder cannot be written", HOUR),
    _row(r"permission denied", "no-permission", "this user may not use a file that the virtual machine needs", HOUR),
    _row(r"too many open files", "no-files", "this computer has too many files open; it will be tried again", 60),
    _row(r"could not load (pc bios|firmware)|could not find bios|failed to find romfile", "qemu-incomplete",
         "QEMU is installed without its firmware; reinstall QEMU (Debian: qemu-system-x86 and seabios)", None),
    _row(
        r"unsupported machine type|machine type received is",
        "qemu-version",
        "this virtual machine was made by another version of QEMU than the one installed now",
        None,
    ),
    _row(
        r"device or resource busy|failed to initialize kvm|could not access kvm",
        "accelerator-taken",
        "hardware virtualization is in use by another program (VirtualBox, for example) or switched off",
        MINUTES_5,
    ),
)  # fmt: skip


_INPUT_OUTPUT = re.compile(r"input/output error|\berror -5\b|\bEIO\b|gave no reason", re.IGNORECASE)
"""What QEMU says of a full disk where it writes the machine's state into a snapshot."""


def explain(what: str, text: str, *, has_room: bool = True) -> HypervisorError:
    """The error for `text`, which QEMU or qemu-img said when `what` was tried.

    has_room: False when the disk has less space left than what was tried may need: then an input/output error is that.
    """
    words = " ".join(text.split())[-2000:] or "it said nothing"
    if not has_room and _INPUT_OUTPUT.search(words):
        words += " (no space left on device)"
    for row in PROBLEMS:
        if row.pattern.search(words):
            return HostProblem(f"{row.reason} ({what}: {words})", key=row.key, delay_s=row.delay_s)
    return HypervisorError(f"{what}: {words}")


def qemu_missing(program: str) -> HostProblem:
    """The program is not installed."""
    return HostProblem(
        f"QEMU is not installed ({program} is not on the PATH); Debian: apt install qemu-system-x86 qemu-utils",
        key="qemu-missing",
        delay_s=None,
    )


def bad_image(path: object, why: str, *, missing: bool = False) -> HostProblem:
    """The image cannot be used."""
    return HostProblem(
        f"the disk image {path} cannot be used: {why}",
        key="image-missing" if missing else "image-damaged",
        delay_s=None,
    )
