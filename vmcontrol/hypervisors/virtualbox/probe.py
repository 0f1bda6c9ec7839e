"""Whether VirtualBox works on this computer, found out by booting a VM of one sector, and how fast guests are there.

The outcome of a boot that worked is kept for this user until the computer is booted or VirtualBox is replaced. Faults
are not kept: they are what somebody is just about to mend.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from vmcontrol.common import jsonfile
from vmcontrol.common.eventloop import LimitReached, sleep, with_limit
from vmcontrol.hypervisors.common.cache import cache_file
from vmcontrol.hypervisors.interface import HostProblem, HypervisorError, Probe, VmSpec
from vmcontrol.hypervisors.virtualbox import problems

if TYPE_CHECKING:
    from vmcontrol.hypervisors.virtualbox.driver import VirtualBoxHypervisor

log = logging.getLogger(__name__)

WORD = b"VMWRAPPER\n"
TURNS = 50_000_000
"""Of a loop of two instructions before the word: 0.03 s on hardware, more than 10 s when it is interpreted."""
SPEED_LIMIT_S = 4.0
"""For the firmware (0.5 s on hardware) and the loop."""
LOOK_EVERY_S = 0.05
SLOW_KEPT_S = 3600.0

_CODE = (
    b"\xfa\xfc\x31\xc0\x8e\xd8"  # cli; cld; xor %ax,%ax; mov %ax,%ds
    b"\x66\xb9" + TURNS.to_bytes(4, "little") + b"\x66\x49\x75\xfc"  # mov $TURNS,%ecx; 1: dec %ecx; jnz 1b
    b"\xbe\x24\x7c\xba\xf8\x03"  # mov $word,%si; mov $0x3f8,%dx
    b"\xac\x84\xc0\x74\x03\xee\xeb\xf8"  # 1: lodsb; test %al,%al; jz 2f; out %al,%dx; jmp 1b
    b"\xf4\xeb\xfd" + b"\x90" * 3  # 2: hlt; jmp 2b
)
SECTOR = (_CODE + WORD + b"\0").ljust(510, b"\0") + b"\x55\xaa"
DISK_BYTES = 1024 * 1024


async def probe(host: VirtualBoxHypervisor, cache: Path | None = None) -> Probe:
    """The whole examination. cache: where the outcome is kept; None: the user's cache folder."""
    if host.vbox.program is None:
        return Probe(False, "", problems.not_installed().reason, hardware=False)
    try:
        version = str((await host.dialect()).version)
    except HypervisorError as error:
        return Probe(False, "", str(error), hardware=False)
    if cache is None:
        cache = cache_file("virtualbox.json")
    key = _computer(host.vbox.program, version)
    kept = _remembered(cache, key)
    if kept is not None:
        return kept
    try:
        fast = await _boot(host)
    except HypervisorError as error:
        reason = error.reason if isinstance(error, HostProblem) else f"VirtualBox could not run a test machine: {error}"
        return Probe(False, version, reason, hardware=False)
    detail = (
        "a test machine ran at the processor's speed"
        if fast
        else "a test machine runs, but is interpreted and very slow: VirtualBox has no hardware virtualization here"
    )
    outcome = Probe(True, version, detail, hardware=fast)
    _remember(cache, key, outcome)
    return outcome


async def _boot(host: VirtualBoxHypervisor) -> bool:
    """Whether the sector says its word in time. Raises HypervisorErrors."""
    from vmcontrol.hypervisors.virtualbox.driver import VirtualBoxHypervisor

    with tempfile.TemporaryDirectory(prefix="vmwrapper-trial-") as folder:
        image, console = Path(folder, "disk.raw"), Path(folder, "console.txt")
        image.write_bytes(SECTOR.ljust(DISK_BYTES, b"\0"))
        name = f"vmwrapper_trial_{secrets.token_hex(4)}"
        driver = VirtualBoxHypervisor(host.reactor, Path(folder, "vm"), program=host.vbox.program)
        spec = VmSpec(name, image, Path(folder, "vm", name), memory_mb=32, console_log=console)
        try:
            await driver.create(spec)
            await driver.start(name)
            try:
                await with_limit(host.reactor, SPEED_LIMIT_S, "the test machine", _said(host.reactor, console))
            except LimitReached:
                return False
            return True
        finally:
            try:
                await driver.delete(name)
            finally:
                await driver.close()


async def _said(reactor: Any, console: Path) -> None:
    while not (console.exists() and WORD in console.read_bytes()):
        await sleep(reactor, LOOK_EVERY_S)


def _computer(program: str, version: str) -> str:
    """Changes when the outcome may: with each boot and each VirtualBox."""
    try:
        status = os.stat(shutil.which(program) or program)  # noqa: PTH116 (what which found may be None)
        return f"{psutil.boot_time():.0f} {version} {status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
    except OSError:
        return f"{psutil.boot_time():.0f} {version}"


@dataclass(frozen=True, slots=True)
class _Kept:
    """What virtualbox.json says, in its format 1."""

    computer: str
    version: str
    detail: str
    hardware: bool
    time: float
    usable: bool = True


_FORMAT = 1


def _remembered(cache: Path | None, key: str) -> Probe | None:
    kept = None if cache is None else jsonfile.load_kept(cache, _Kept, _FORMAT)
    if kept is None or kept.computer != key:
        return None
    if not kept.hardware and not 0 <= time.time() - kept.time < SLOW_KEPT_S:
        return None
    return Probe(True, kept.version, f"{kept.detail} (as tried before)", hardware=kept.hardware)


def _remember(cache: Path | None, key: str, outcome: Probe) -> None:
    if cache is not None:
        kept = _Kept(key, outcome.version, outcome.detail, outcome.hardware, time.time())
        jsonfile.keep(cache, asdict(kept), _FORMAT)
