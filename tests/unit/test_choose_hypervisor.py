"""Which driver for which name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from vmcontrol.eventloop import start
from vmcontrol.hypervisors import choose
from vmcontrol.hypervisors.interface import Fault, HypervisorError, Probe


class Driver:
    def __init__(self, name: str, usable: bool) -> None:
        self.name, self.usable, self.closed = name, usable, False

    async def probe(self) -> Probe:
        return Probe(self.usable, "1", f"{self.name} it is")

    async def close(self) -> None:
        self.closed = True


def opened(kind: str) -> Any:
    deferred: Deferred[Any] = start(choose.open_hypervisor(kind, None, Path("/slot/vm")))
    seen: list[Any] = []
    deferred.addBoth(seen.append)
    return getattr(seen[0], "value", seen[0])


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Driver]:
    made = {"VirtualBox": Driver("VirtualBox", False), "QEMU": Driver("QEMU", True)}
    monkeypatch.setattr(choose, "DRIVERS", {name: lambda *_, d=driver: d for name, driver in made.items()})
    return made


@pytest.mark.parametrize("kind", ["QEMU", "qemu"])
def test_by_name(drivers: dict[str, Driver], kind: str) -> None:
    assert opened(kind) is drivers["QEMU"]


def test_auto_takes_the_first_that_works(drivers: dict[str, Driver]) -> None:
    assert opened("auto") is drivers["QEMU"]
    assert drivers["VirtualBox"].closed
    drivers["QEMU"].usable = False
    fault = opened("auto")
    assert isinstance(fault, Fault)
    assert "VirtualBox it is" in fault.reason
    assert "QEMU it is" in fault.reason


def test_virtualbox_is_refused_for_good_and_says_what_there_is() -> None:
    fault = opened("VirtualBox")
    assert isinstance(fault, Fault)
    assert fault.delay_s is None
    assert "QEMU" in fault.reason


def test_an_unknown_name() -> None:
    error = opened("Xen")
    assert isinstance(error, HypervisorError)
    assert "Xen" in str(error)
