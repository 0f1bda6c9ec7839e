"""Which driver for which name. A new hypervisor is one module and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vmcontrol.hypervisors.interface import HostProblem, Hypervisor, HypervisorError


def _qemu(reactor: Any, folder: Path) -> Hypervisor:
    from vmcontrol.hypervisors.qemu.driver import QemuHypervisor  # only the chosen driver is loaded

    driver = QemuHypervisor(reactor, folder)
    driver.warm_up()
    return driver


def _virtualbox(reactor: Any, folder: Path) -> Hypervisor:
    from vmcontrol.hypervisors.virtualbox.driver import VirtualBoxHypervisor

    return VirtualBoxHypervisor(reactor, folder)


DRIVERS: Mapping[str, Callable[[Any, Path], Hypervisor]] = {
    "VirtualBox": _virtualbox,
    "QEMU": _qemu,
}
"""In the order in which `auto` prefers them."""

AUTO = "auto"


def virtualbox_advice(key: str) -> str:
    """What the volunteer can do about a HostProblem of VirtualBox with this key."""
    from vmcontrol.hypervisors.virtualbox.problems import PROBLEMS

    return next(row.reason for row in PROBLEMS if row.key == key)


async def open_hypervisor(
    kind: str, reactor: Any, folder: Path, report: Callable[[str], None] = lambda _: None
) -> Hypervisor:
    """The driver for `kind` (QEMU, VirtualBox, auto; case does not matter), whose VMs live in folders below `folder`.

    auto: the first that runs guests at the processor's speed, else the last that runs any. Raises HostProblem for a
    computer on which none does, HypervisorError for an unknown name.
    report: called with which one it is and why, in a sentence.
    """
    if kind.lower() == AUTO:
        return await _first_usable([driver(reactor, folder) for driver in DRIVERS.values()], report)
    for name, driver in DRIVERS.items():
        if name.lower() == kind.lower():
            report(f"{name}, as the configuration says")
            return driver(reactor, folder)
    known = ", ".join((*DRIVERS, AUTO))
    raise HypervisorError(f"unknown hypervisor {kind!r}; known: {known}")


async def _first_usable(candidates: Sequence[Hypervisor], report: Callable[[str], None]) -> Hypervisor:
    """Says which one is taken, and why the others are not. Those are closed."""
    said = [missing for candidate in candidates if (missing := candidate.missing())]
    there = [candidate for candidate in candidates if not candidate.missing()]
    chosen = there[0] if len(there) == 1 else await _fastest(there, said)
    for candidate in candidates:
        if candidate is not chosen:
            await candidate.close()
    if chosen is None:
        raise HostProblem("no hypervisor works here: " + "; ".join(said), key="no-hypervisor", delay_s=None)
    report(f"{chosen.name} is taken{''.join(f'; {text}' for text in said)}")
    return chosen


async def _fastest(candidates: Sequence[Hypervisor], said: list[str]) -> Hypervisor | None:
    """The first that runs guests at the processor's speed. Where none does, the last that runs any is the least slow:
    QEMU translates, VirtualBox interprets."""
    usable: Hypervisor | None = None
    for candidate in candidates:
        probe = await candidate.probe()
        said.append(" ".join(f"{candidate.name} {probe.version}: {probe.detail}".split()))
        if probe.usable:
            usable = candidate
            if probe.hardware:
                break
    return usable
