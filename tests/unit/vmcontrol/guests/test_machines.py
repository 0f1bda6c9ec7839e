"""HostMain's virtual machines, with a hypervisor that does what the test says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from twisted.internet.task import Clock

from tests.support.conversations import a_conversation
from vmcontrol.common import eventloop
from vmcontrol.guests.vms import Machines
from vmcontrol.hypervisors.interface import HypervisorError, VmNotFound
from vmcontrol.protocol.vm import VmInfo, VmState

MAC = "52:54:00:00:00:02"


class FakeHypervisor:
    """name -> what asking for that VM gives: a state, or an error that is raised."""

    name = "Fake"

    def __init__(self, **vms: VmState | Exception) -> None:
        self.vms = vms
        self.listeners: list[Any] = []

    def on_state_change(self, listener: Any) -> None:
        self.listeners.append(listener)

    async def list_vms(self) -> list[str]:
        return list(self.vms)

    async def list_running(self) -> list[str]:
        return []

    async def state(self, name: str) -> VmState:
        found = self.vms.get(name, VmNotFound(name))
        if isinstance(found, Exception):
            raise found
        return found

    async def info(self, name: str) -> VmInfo:
        return VmInfo(name, await self.state(name), MAC, None, None)

    async def delete(self, name: str) -> None:
        self.vms.pop(name, None)

    async def close(self) -> None: ...


def machines_of(hypervisor: Any, folder: Path, clock: Any = None) -> Machines:
    clock = clock or Clock()
    conversation = a_conversation(clock, lambda guest, id: machines.guest_changed(guest, id))  # noqa: PLW0108
    machines = Machines(
        clock, conversation=conversation, secret_file=folder / "secret", broker=lambda: None, slot=folder
    )
    machines.opened(hypervisor)
    return machines


def outcome(work: Any) -> Any:
    """What a coroutine that waits for nothing has come to."""
    results: list[Any] = []
    eventloop.start(work).addBoth(results.append)
    assert results, "it waits"
    if hasattr(results[0], "raiseException"):
        results[0].raiseException()
    return results[0]


def test_a_vm_that_cannot_be_read_can_be_deleted_and_hides_no_name(tmp_path: Path) -> None:
    hypervisor = FakeHypervisor(bad=HypervisorError("vm.json: nonsense"), good=VmState.POWERED_OFF)
    machines = machines_of(hypervisor, tmp_path)
    assert outcome(machines.names_to_ids()) == {"good": MAC}
    with pytest.raises(HypervisorError, match="nonsense"):
        outcome(machines.id_of("bad"))
    outcome(machines.delete("bad"))
    assert list(hypervisor.vms) == ["good"]


def test_the_secret_is_made_once_whole_and_for_its_owner_alone(tmp_path: Path) -> None:
    machines = machines_of(FakeHypervisor(), tmp_path)
    secret = machines.secret()
    assert len(secret) == 64
    assert machines.secret() == secret
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_an_empty_secret_is_none(tmp_path: Path) -> None:
    (tmp_path / "secret").touch(mode=0o600)
    with pytest.raises(HypervisorError, match="is empty"):
        machines_of(FakeHypervisor(), tmp_path).secret()


def test_a_wait_for_a_vm_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    machines = machines_of(FakeHypervisor(), tmp_path)
    for _ in range(3):
        with pytest.raises(VmNotFound):
            outcome(machines.wait_state("nobody", ["Running"], 60.0))
    assert machines._changed._waiting == []
