"""Which accelerator works here: found out by trying, because a device node proves nothing.

/dev/kvm may exist, open and report running while the guest never leaves its firmware (nested virtualization does
that). A trial (common/trial.py) costs 0.1 to 0.3 s where hardware virtualization works, and the limit where it hangs
silently.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmcontrol.common.eventloop import LimitReached
from vmcontrol.hypervisors.common import tool, trial
from vmcontrol.hypervisors.common.problems import HOUR
from vmcontrol.hypervisors.common.trial import Trial
from vmcontrol.hypervisors.interface import HostProblem
from vmcontrol.hypervisors.qemu.command import LATEST_MACHINE, SANDBOX, Accelerator
from vmcontrol.hypervisors.qemu.files import Definition

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


async def attempt(reactor: Any, qemu: str, accelerator: Accelerator, limit_s: float = TRIAL_LIMIT_S) -> Trial:
    """Boot the trial's disk with this accelerator. Raises ToolMissing when there is no QEMU."""
    with tempfile.TemporaryDirectory(prefix="vmwrapper-trial-") as folder:
        disk = Path(folder, "disk.raw")
        trial.write_disk(disk)
        file = {"driver": "file", "filename": str(disk), "read-only": True}
        blockdev = {"driver": "raw", "node-name": "disk", "read-only": True, "file": file}
        argv = [
            *(qemu, "-nodefaults", "-no-user-config", "-machine", f"{LATEST_MACHINE},smm=off,vmport=off"),
            *accelerator.argv,
            *("-m", "32", "-display", "none", "-vga", "none", "-monitor", "none", "-serial", "stdio"),
            *("-blockdev", json.dumps(blockdev), "-device", "virtio-blk-pci,drive=disk,bootindex=0"),
            *("-sandbox", SANDBOX),
        ]
        try:
            result = await tool.run(reactor, argv, limit_s=limit_s, until=trial.WORD, dies_with_us=True)
        except LimitReached:
            return Trial(False, f"starts, but its guest does not run (nothing within {limit_s:g} s)")
    if trial.WORD.decode() in result.stdout:
        return Trial(True)
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
    tried = trial.subject(qemu, hardware.name)
    outcome = None if again else trial.remembered(cache, tried)
    how = "as tried before"
    if outcome is None:
        outcome = await attempt(reactor, qemu, hardware)
        trial.remember(cache, tried, outcome)
        how = "tried"
    if outcome.works:
        return hardware, f"hardware virtualization by {hardware.name}, {how}"
    return EMULATION, f"emulation (slow); {hardware.name} does not work, {how}: {outcome.detail}"


def to_resume(definition: Definition, chosen: Accelerator) -> Accelerator:
    """The one that the saved state or snapshot needs, which the next start loads: it fits only the hardware it was
    taken with. chosen: the one that works here now. Raises HostProblem `accelerator-changed`.
    """
    tag = definition.resume_snapshot
    known = (definition.snapshot_hardware or {}).get(tag) if tag is not None else None
    needed = Accelerator(*(known or (definition.accelerator or chosen.name, definition.cpu or chosen.cpu)))
    if needed.hardware and needed.name != chosen.name:
        raise HostProblem(
            f"{definition.name} was saved with hardware virtualization ({needed.name}), which does not work now:"
            " another program may use it, or it was switched off",
            key="accelerator-changed",
            delay_s=HOUR,
        )
    return needed
