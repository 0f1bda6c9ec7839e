"""A world of the contract whose hypervisor is a real VirtualBox, in a VirtualBox home of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.hypervisor_contract import World
from tests.support.limits import after
from tests.virtualbox.lab import Lab, LabMissing, lab
from vmcontrol.common.eventloop import the_reactor
from vmcontrol.hypervisors.common import tool
from vmcontrol.hypervisors.interface import Hypervisor
from vmcontrol.hypervisors.virtualbox import problems
from vmcontrol.hypervisors.virtualbox.driver import VirtualBoxHypervisor
from vmcontrol.hypervisors.virtualbox.vm import VBoxVm


def the_lab() -> Lab:
    """Skips, with the reason, where there can be none."""
    try:
        return lab()
    except LabMissing as error:
        pytest.skip(f"VIRTUALBOX IS NOT TESTED: {error}")


class VirtualBoxWorld(World):
    """folder: the slot. home: VirtualBox's, outside of it."""

    def __init__(self, reactor: Any, folder: Path, here: Lab, environment: dict[str, str]) -> None:
        self.lab = here
        self.environment = environment
        super().__init__(reactor, folder)

    def open(self) -> Hypervisor:
        return VirtualBoxHypervisor(self.reactor, self.vms, program=str(self.lab.vboxmanage))

    @property
    def driver(self) -> VirtualBoxHypervisor:
        assert isinstance(self.hypervisor, VirtualBoxHypervisor)
        return self.hypervisor

    @property
    def vm(self) -> VBoxVm:
        return self.driver.vms["one"]

    def manage(self, *words: str, check: bool = True, limit_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Call VBoxManage as a volunteer or another program would; again while a session or the service ends."""
        deadline = after(10)
        while True:
            said = subprocess.run(
                [self.lab.vboxmanage, *words], env=self.environment, capture_output=True, text=True, timeout=limit_s
            )
            if said.returncode == 0 or not check:
                return said
            assert "locked" in said.stderr or problems.never_began(said.stderr), said
            assert time.monotonic() < deadline, said
            time.sleep(0.05)

    async def by_another_program(self, *words: str) -> None:
        """The same without holding up the reactor, so that the driver hears of it as it happens."""
        result = await tool.run(self.reactor, [str(self.lab.vboxmanage), *words], limit_s=60)
        assert result.status == 0, result.text

    def nothing_left(self) -> None:
        """VirtualBox knows no VM and no medium."""
        assert self.manage("list", "vms").stdout == ""
        assert "UUID" not in self.manage("list", "hdds").stdout
        assert not any(self.vms.glob("*")) if self.vms.is_dir() else True


@contextlib.contextmanager
def environment_of(values: dict[str, str]) -> Iterator[None]:
    """This process's environment, from which the driver's calls get theirs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


async def a_world(tmp_path: Path) -> AsyncIterator[VirtualBoxWorld]:
    """For the fixture of a test module."""
    here = the_lab()
    folder = tmp_path / "slot 1, é"
    folder.mkdir()
    with here.home(tmp_path / "home") as environment:
        names = ("VBOX_USER_HOME", "VBOX_IPC_SOCKETID", "HOME", "LOGNAME", "USER")
        values = {name: environment[name] for name in names} | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        with environment_of(values):
            world = VirtualBoxWorld(the_reactor(), folder, here, environment)
            try:
                yield world
            finally:
                await world.close()
