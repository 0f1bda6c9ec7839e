"""`vmwrapper doctor`: can this computer run virtual machines, and what to do if not.

Boots a test machine with every hypervisor that HostMain has a driver for, and looks around (computer.py). Changes
nothing on the computer; what the test machines leave is gone when it ends.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from vmcontrol.common.eventloop import LimitReached, start, the_reactor, with_limit
from vmcontrol.hypervisors import choose
from vmcontrol.hypervisors.interface import HypervisorError, Probe
from vmwrapper import __version__
from vmwrapper.boinc.choose import open_runtime
from vmwrapper.boinc.runtime import BoincError
from vmwrapper.cli import console
from vmwrapper.cli.computer import hints
from vmwrapper.exit_status import ExitStatus

PROBE_LIMIT_S = 120.0
"""A probe starts a hypervisor for a moment, under emulation on a slow computer."""


def run() -> int:
    """Print what is found; 0 when at least one hypervisor can be used, else 1."""
    _say(f"vmwrapper {__version__}, Python {sys.version.split()[0]}")
    _say(f"BOINC runtime: {_runtime()}")
    reactor = the_reactor()
    probes: dict[str, Probe] = {}

    async def examine() -> None:
        for kind in choose.DRIVERS:
            probes[kind] = await _probe(kind, reactor)

    def begin() -> None:
        start(examine()).addErrback(lambda failure: _say(f"doctor: {failure.getErrorMessage()}")).addBoth(
            lambda _: reactor.stop()
        )

    reactor.callWhenRunning(begin)
    reactor.run()
    for kind, probe in probes.items():
        word = "cannot be used" if not probe.usable else "can be used" if probe.hardware else "can be used, slowly"
        _say(" ".join(filter(None, (f"{kind}: {word}:", probe.version, probe.detail))))
    virtualbox = probes.get("VirtualBox")
    for hint in hints(Path.cwd(), virtualbox=virtualbox.version if virtualbox is not None else ""):
        _say(f"note: {hint}")
    if any(probe.usable for probe in probes.values()):
        _say("This computer can run virtual machines.")
        return ExitStatus.DONE
    _say("This computer cannot run virtual machines with vmwrapper: what each line says would have to be done first.")
    return ExitStatus.DOCTOR_NO


async def _probe(kind: str, reactor: Any) -> Probe:
    with tempfile.TemporaryDirectory(prefix="vmwrapper-doctor-") as folder:
        try:
            hypervisor = await choose.open_hypervisor(kind, reactor, Path(folder))
        except HypervisorError as error:
            return Probe(False, "", str(error))
        try:
            return await with_limit(reactor, PROBE_LIMIT_S, "the probe", hypervisor.probe())
        except (HypervisorError, LimitReached) as error:
            return Probe(False, "", str(error))
        finally:
            await hypervisor.close()


def _runtime() -> str:
    try:
        return open_runtime("auto", Path()).description
    except BoincError as error:
        return str(error)


def _say(line: str) -> None:
    console.say(line, sys.stdout)
