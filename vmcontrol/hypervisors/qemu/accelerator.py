"""Which accelerator works here: found out by trying, because a device node proves nothing.

/dev/kvm may exist, open and report running while the guest never leaves its firmware (nested virtualization does
that). So QEMU boots a disk of one sector, whose program says a word on the serial port; who says it within the limit
works. This costs 0.1 to 0.3 s where hardware virtualization works, and the limit where it hangs silently.

The outcome is kept for the user and this boot of the computer: success until the next boot, failure for an hour,
because another hypervisor that holds the processor may end.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from vmcontrol.common import jsonfile
from vmcontrol.common.eventloop import LimitReached
from vmcontrol.hypervisors.common import tool
from vmcontrol.hypervisors.qemu.command import LATEST_MACHINE, SANDBOX, Accelerator

log = logging.getLogger(__name__)

HARDWARE: Mapping[str, Accelerator] = {
    "linux": Accelerator("kvm", "host"),
    "darwin": Accelerator("hvf", "host"),  # not run by us
    "win32": Accelerator("whpx", "max"),  # not run by us
}
"""sys.platform -> what to try before emulation."""
EMULATION = Accelerator("tcg", "max,erms=off")
"""Without "fast rep movsb": kernel and C library would copy with it, which emulation carries out byte by byte."""

TRIAL_LIMIT_S = 3.0
"""Firmware and boot sector take 0.1 s even when emulated; a laden computer may need ten times that."""
EMULATION_LIMIT_S = 15.0
"""The last resort is given more time: if it fails no VM can run here."""
FAILURE_KEPT_S = 3600

WORD = b"vmwrapper-trial"

BOOT_SECTOR = (
    b"\xfa"  # cli
    b"\x31\xc0"  # xor %ax,%ax
    b"\x8e\xd8"  # mov %ax,%ds
    b"\xfc"  # cld
    b"\xbe\x17\x7c"  # mov $word,%si           the firmware loads us at 0x7c00; the word follows the code
    b"\xba\xf8\x03"  # mov $0x3f8,%dx          first serial port; QEMU's takes bytes without set-up
    b"\xac"  # next: lodsb
    b"\x84\xc0"  # test %al,%al
    b"\x74\x03"  # jz end
    b"\xee"  # out %al,%dx
    b"\xeb\xf8"  # jmp next
    b"\xf4"  # end: hlt
    b"\xeb\xfd" + WORD + b"\n\0"  # jmp end
).ljust(510, b"\0") + b"\x55\xaa"
DISK_BYTES = 1024 * 1024
"""The firmware refuses a disk of less than one cylinder."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Outcome for one accelerator. detail: why it does not work."""

    works: bool
    detail: str


async def attempt(reactor: Any, qemu: str, accelerator: Accelerator, limit_s: float = TRIAL_LIMIT_S) -> Trial:
    """Boot the sector with this accelerator and wait for its word. Raises ToolMissing when there is no QEMU."""
    with tempfile.TemporaryDirectory(prefix="vmwrapper-trial-") as folder:
        disk = Path(folder, "disk.raw")
        disk.write_bytes(BOOT_SECTOR)
        os.truncate(disk, DISK_BYTES)
        blockdev = {
            "driver": "raw",
            "node-name": "disk",
            "read-only": True,
            "file": {"driver": "file", "filename": str(disk), "read-only": True},
        }
        words = [
            *(qemu, "-nodefaults", "-no-user-config", "-machine", f"{LATEST_MACHINE},smm=off,vmport=off"),
            *accelerator.words,
            *("-m", "32", "-display", "none", "-vga", "none", "-monitor", "none", "-serial", "stdio"),
            *("-blockdev", json.dumps(blockdev), "-device", "virtio-blk-pci,drive=disk,bootindex=0"),
            *("-sandbox", SANDBOX),
        ]
        try:
            result = await tool.run(reactor, words, limit_s=limit_s, until=WORD, dies_with_us=True)
        except LimitReached:
            return Trial(False, f"starts, but its guest does not run (nothing within {limit_s:g} s)")
    if WORD.decode() in result.stdout:
        return Trial(True, "")
    return Trial(False, " ".join(result.text.split())[:300] or f"exit status {result.status}")


async def choose(reactor: Any, qemu: str, cache: Path | None, *, again: bool = False) -> tuple[Accelerator, str]:
    """The accelerator to use, and a sentence about how that was found. Raises ToolMissing when there is no QEMU.

    again: do not believe the kept outcome.
    """
    hardware = HARDWARE.get(sys.platform)
    if hardware is None:
        return EMULATION, "emulation; no hardware virtualization is known for this system"
    if hardware.name == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        why = "this user may not use /dev/kvm" if Path("/dev/kvm").exists() else "/dev/kvm is not there"
        return EMULATION, f"emulation (slow); hardware virtualization is off or missing: {why}"
    key = _computer(qemu)
    trial = None if again else _remembered(cache, key, hardware.name)
    how = "as tried before"
    if trial is None:
        trial = await attempt(reactor, qemu, hardware)
        _remember(cache, key, hardware.name, trial)
        how = "tried"
    if trial.works:
        return hardware, f"hardware virtualization by {hardware.name}, {how}"
    return EMULATION, f"emulation (slow); {hardware.name} does not work, {how}: {trial.detail}"


def _computer(qemu: str) -> str:
    """Changes when the outcome may: with each boot and each QEMU."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = f"{psutil.boot_time():.0f}"
    try:
        program = os.stat(shutil.which(qemu) or qemu)  # noqa: PTH116 (what which found may be None)
        version = f"{program.st_ino}:{program.st_size}:{program.st_mtime_ns}"
    except OSError:
        version = ""
    return f"{boot} {version}"


@dataclass(frozen=True, slots=True)
class _Kept:
    """What accelerator.json says, in its format 1."""

    computer: str
    accelerator: str
    works: bool
    detail: str
    time: float


_FORMAT = 1


def _remembered(cache: Path | None, key: str, name: str) -> Trial | None:
    kept = None if cache is None else jsonfile.load_kept(cache, _Kept, _FORMAT)
    if kept is None or (kept.computer, kept.accelerator) != (key, name):
        return None
    if not kept.works and not 0 <= time.time() - kept.time < FAILURE_KEPT_S:
        return None
    return Trial(kept.works, kept.detail)


def _remember(cache: Path | None, key: str, name: str, trial: Trial) -> None:
    if cache is not None:
        jsonfile.keep(cache, asdict(_Kept(key, name, trial.works, trial.detail, time.time())), _FORMAT)
