"""Which driver for which name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from vmcontrol.common.eventloop import start
from vmcontrol.hypervisors import choose
from vmcontrol.hypervisors.interface import HostProblem, HypervisorError, Probe


class Driver:
    def __init__(self, name: str, usable: bool, hardware: bool = True) -> None:
        self.name, self.usable, self.hardware, self.closed = name, usable, hardware, False
        self.there, self.probed = True, False

    def missing(self) -> str:
        return "" if self.there else f"{self.name} is not there"

    async def probe(self) -> Probe:
        self.probed = True
        return Probe(self.usable, "1", f"{self.name} it is", hardware=self.hardware)

    async def close(self) -> None:
        self.closed = True


def opened(kind: str, told: list[str] | None = None) -> Any:
    said = [] if told is None else told
    deferred: Deferred[Any] = start(choose.open_hypervisor(kind, None, Path("/slot/vm"), said.append))
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
    told: list[str] = []
    assert opened(kind, told) is drivers["QEMU"]
    assert told == ["QEMU, as the configuration says"]


def test_auto_takes_the_first_that_works(drivers: dict[str, Driver]) -> None:
    assert opened("auto") is drivers["QEMU"]
    assert drivers["VirtualBox"].closed
    drivers["QEMU"].usable = False
    problem = opened("auto")
    assert isinstance(problem, HostProblem)
    assert "VirtualBox it is" in problem.reason
    assert "QEMU it is" in problem.reason


@pytest.mark.parametrize(
    ("virtualbox", "qemu", "taken"),
    [(True, True, "VirtualBox"), (True, False, "VirtualBox"), (False, True, "QEMU"), (False, False, "QEMU")],
)
def test_auto_prefers_the_processors_speed(
    drivers: dict[str, Driver], virtualbox: bool, qemu: bool, taken: str
) -> None:
    drivers["VirtualBox"].usable = True
    drivers["VirtualBox"].hardware, drivers["QEMU"].hardware = virtualbox, qemu
    told: list[str] = []
    assert opened("auto", told) is drivers[taken]
    (text,) = told
    assert text.startswith(f"{taken} is taken; VirtualBox 1: VirtualBox it is")
    assert not drivers[taken].closed
    assert all(driver.closed for name, driver in drivers.items() if name != taken)


def test_the_only_one_that_is_installed_is_not_examined_first(drivers: dict[str, Driver]) -> None:
    drivers["VirtualBox"].there = False
    assert opened("auto") is drivers["QEMU"]
    assert not drivers["QEMU"].probed
    drivers["QEMU"].there = False
    problem = opened("auto")
    assert isinstance(problem, HostProblem)
    assert "VirtualBox is not there" in problem.reason
    assert "QEMU is not there" in problem.reason


def test_virtualbox_interpreted_is_better_than_nothing(drivers: dict[str, Driver]) -> None:
    drivers["VirtualBox"].usable, drivers["VirtualBox"].hardware = True, False
    drivers["QEMU"].usable = False
    assert opened("auto") is drivers["VirtualBox"]


def test_an_unknown_name() -> None:
    error = opened("Xen")
    assert isinstance(error, HypervisorError)
    assert "Xen" in str(error)
