"""Whether a hypervisor really runs a guest here: a disk of one sector whose program says a word on the serial port.

A device node or a version proves nothing: under nested virtualization a guest may never leave its firmware. The outcome
is kept for this user and this boot of the computer; a failure for an hour, as what causes it may end.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from vmcontrol.common import jsonfile

WORD = b"vmwrapper-trial"
FAILURE_KEPT_S = 3600
_DISK_BYTES = 1024 * 1024
"""The firmware refuses a disk of less than one cylinder."""


def write_disk(path: Path, turns: int = 1) -> None:
    """Make the disk. turns: of a loop of two instructions before the word, which shows an interpreter by its time."""
    code = (
        b"\xfa\xfc\x31\xc0\x8e\xd8"  # cli; cld; xor %ax,%ax; mov %ax,%ds
        b"\x66\xb9" + turns.to_bytes(4, "little") + b"\x66\x49\x75\xfc"  # mov $turns,%ecx; 1: dec %ecx; jnz 1b
        b"\xbe\x24\x7c\xba\xf8\x03"  # mov $word,%si; mov $0x3f8,%dx: the first serial port takes bytes without set-up
        b"\xac\x84\xc0\x74\x03\xee\xeb\xf8"  # 1: lodsb; test %al,%al; jz 2f; out %al,%dx; jmp 1b
        b"\xf4\xeb\xfd" + b"\x90" * 3  # 2: hlt; jmp 2b
    )  # the firmware loads it at 0x7c00; the word follows the code
    path.write_bytes((code + WORD + b"\n\0").ljust(510, b"\0") + b"\x55\xaa")
    os.truncate(path, _DISK_BYTES)


@dataclass(frozen=True, slots=True)
class Trial:
    """An outcome. detail: why it does not work."""

    works: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class _Kept:
    """What the file of an outcome says, in its format 1."""

    tried: str
    works: bool
    detail: str
    time: float


_FORMAT = 1


def subject(program: str, *more: str) -> str:
    """What an outcome is of. Changes when the outcome may: with each boot, each program, and whatever is in `more`."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = f"{psutil.boot_time():.0f}"
    try:
        status = os.stat(shutil.which(program) or program)  # noqa: PTH116 (what which found may be None)
        return " ".join((boot, f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}", *more))
    except OSError:
        return " ".join((boot, *more))


def remembered(cache: Path | None, tried: str) -> Trial | None:
    """The outcome that was kept, if there is one that still counts."""
    kept = None if cache is None else jsonfile.load_kept(cache, _Kept, _FORMAT)
    if kept is None or kept.tried != tried:
        return None
    if not kept.works and not 0 <= time.time() - kept.time < FAILURE_KEPT_S:
        return None
    return Trial(kept.works, kept.detail)


def remember(cache: Path | None, tried: str, trial: Trial) -> None:
    """Keep an outcome, where that is possible."""
    if cache is not None:
        jsonfile.keep(cache, asdict(_Kept(tried, trial.works, trial.detail, time.time())), _FORMAT)
