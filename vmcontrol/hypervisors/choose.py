"""Which driver for which name. A new hypervisor is one module and one line here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vmcontrol.hypervisors.interface import Fault, Hypervisor, HypervisorError

log = logging.getLogger(__name__)


def _qemu(reactor: Any, folder: Path) -> Hypervisor:
    from vmcontrol.hypervisors.qemu import QemuHypervisor  # only the chosen driver is loaded

    driver = QemuHypervisor(reactor, folder)
    driver.warm_up()
    return driver


DRIVERS: Mapping[str, Callable[[Any, Path], Hypervisor]] = {
    "QEMU": _qemu,
}
"""In the order in which `auto` prefers them."""

AUTO = "auto"
_PLANNED = {"virtualbox": "VirtualBox"}


async def open_hypervisor(kind: str, reactor: Any, folder: Path) -> Hypervisor:
    """The driver for `kind` (QEMU, VirtualBox, auto; case does not matter), whose VMs live in folders below `folder`.

    auto: the first that works here; where only one is known, that one, without the time for a probe. Raises Fault
    (permanent) for a hypervisor that cannot be used, HypervisorError for an unknown name.
    """
    if kind.lower() == AUTO:
        return await _first_usable([driver(reactor, folder) for driver in DRIVERS.values()])
    for name, driver in DRIVERS.items():
        if name.lower() == kind.lower():
            return driver(reactor, folder)
    known = ", ".join((*DRIVERS, AUTO))
    if kind.lower() in _PLANNED:
        name = _PLANNED[kind.lower()]
        raise Fault(
            f"this version of vmwrapper cannot use {name} yet; choose one of: {known}",
            key="hypervisor-not-supported",
            delay_s=None,
        )
    raise HypervisorError(f"unknown hypervisor {kind!r}; known: {known}")


async def _first_usable(candidates: Sequence[Hypervisor]) -> Hypervisor:
    if len(candidates) == 1:
        return candidates[0]
    refusals = []
    for candidate in candidates:
        probe = await candidate.probe()
        if probe.usable:
            log.info("hypervisor: %s %s: %s", candidate.name, probe.version, probe.detail)
            return candidate
        refusals.append(f"{candidate.name}: {probe.detail}")
        await candidate.close()
    raise Fault("no hypervisor works here: " + "; ".join(refusals), key="no-hypervisor", delay_s=None)
