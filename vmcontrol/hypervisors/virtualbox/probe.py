"""Whether VirtualBox works on this computer, found out by booting a VM of one sector, and how fast guests are there.

The outcome of a boot that worked is kept (common/trial.py). Problems are not: they are what somebody is about to mend.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmcontrol.common.eventloop import LimitReached, sleep, with_limit
from vmcontrol.hypervisors.common import trial
from vmcontrol.hypervisors.common.cache import cache_file
from vmcontrol.hypervisors.common.trial import Trial
from vmcontrol.hypervisors.interface import HostProblem, Hypervisor, HypervisorError, Probe, VmSpec

TURNS = 50_000_000
"""Of the trial's loop: 0.03 s on hardware, more than 10 s when it is interpreted."""
SPEED_LIMIT_S = 4.0
"""For the firmware (0.5 s on hardware) and the loop."""
LOOK_EVERY_S = 0.05
SLOW = "a test machine runs, but is interpreted and very slow: VirtualBox has no hardware virtualization here"


async def probe(reactor: Any, program: str, version: str, open_driver: Callable[[Path], Hypervisor]) -> Probe:
    """The whole examination. open_driver: opens a driver for the trial, whose VMs are below a folder."""
    cache, tried = cache_file("trial-virtualbox.json"), trial.subject(program, version)
    outcome, how = trial.remembered(cache, tried), " (as tried before)"
    if outcome is None:
        try:
            outcome, how = await _boot(reactor, open_driver), ""
        except HypervisorError as error:
            what = "" if isinstance(error, HostProblem) else "VirtualBox could not run a test machine: "
            return Probe(False, version, f"{what}{error}", hardware=False)
        trial.remember(cache, tried, outcome)
    return Probe(True, version, f"{outcome.detail}{how}", hardware=outcome.works)


async def _boot(reactor: Any, open_driver: Callable[[Path], Hypervisor]) -> Trial:
    """Whether the guest says its word in time. Raises HypervisorErrors."""
    with tempfile.TemporaryDirectory(prefix="vmwrapper-trial-") as folder:
        image, console = Path(folder, "disk.raw"), Path(folder, "console.txt")
        trial.write_disk(image, TURNS)
        name = f"vmwrapper_trial_{secrets.token_hex(4)}"
        driver = open_driver(Path(folder, "vm"))
        spec = VmSpec(name, image, Path(folder, "vm", name), memory_mb=32, console_log=console)
        try:
            await driver.create(spec)
            await driver.start(name)
            try:
                await with_limit(reactor, SPEED_LIMIT_S, "the test machine", _said(reactor, console))
            except LimitReached:
                return Trial(False, SLOW)
            return Trial(True, "a test machine ran at the processor's speed")
        finally:
            try:
                await driver.delete(name)
            finally:
                await driver.close()


async def _said(reactor: Any, console: Path) -> None:
    while not (console.exists() and trial.WORD in console.read_bytes()):
        await sleep(reactor, LOOK_EVERY_S)
