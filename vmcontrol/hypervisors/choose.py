"""Which driver for which name. A new hypervisor is one module and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vmcontrol.hypervisors.interface import Fault, Hypervisor, HypervisorError


def _qemu(reactor: Any, folder: Path) -> Hypervisor:
    from vmcontrol.hypervisors.qemu import QemuHypervisor  # only the chosen driver is loaded

    return QemuHypervisor(reactor, folder)


DRIVERS: Mapping[str, Callable[[Any, Path], Hypervisor]] = {
    "QEMU": _qemu,
}
"""In the order in which `auto` prefers them."""

AUTO = "auto"
_PLANNED = {"virtualbox": "VirtualBox"}


def open_hypervisor(kind: str, reactor: Any, folder: Path) -> Hypervisor:
    """The driver for `kind` (QEMU, VirtualBox, auto; case does not matter), whose VMs live in folders below `folder`.

    Raises Fault (permanent) for a hypervisor that this version cannot drive, HypervisorError for an unknown name.
    """
    if kind.lower() == AUTO:
        return next(iter(DRIVERS.values()))(reactor, folder)
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
