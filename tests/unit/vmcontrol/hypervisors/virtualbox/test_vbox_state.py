"""How a VirtualBox VM's state is known: how long an answer counts, what makes VirtualBox be asked, what is told."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import psutil
import pytest
from twisted.internet.defer import DeferredLock
from twisted.internet.task import Clock

from vmcontrol.common.eventloop import start
from vmcontrol.hypervisors.common.tool import ToolResult
from vmcontrol.hypervisors.interface import HypervisorError
from vmcontrol.hypervisors.virtualbox.dialect import Dialect
from vmcontrol.hypervisors.virtualbox.files import Definition, Record, VmFiles
from vmcontrol.hypervisors.virtualbox.output import Version
from vmcontrol.hypervisors.virtualbox.registration import Registration
from vmcontrol.hypervisors.virtualbox.state import FACTS_KEPT_S, FACTS_KEPT_UNWATCHED_S, FULL_BYTES, StateTracker
from vmcontrol.hypervisors.virtualbox.vboxmanage import VBoxManage
from vmcontrol.hypervisors.virtualbox.watch import FolderWatch
from vmcontrol.protocol.vm import VmState

UUID = "0a1b2c3d-0000-0000-0000-000000000001"
LIMITED = "VBoxManage: error: The object functionality is limited"
T = TypeVar("T")


class FakeHost:
    """A driver whose VirtualBox says one thing, and is counted; folders tell when the test says so."""

    def __init__(self, folder: Path) -> None:
        self.reactor = Clock()
        self.folder = folder
        self.vbox, self.watch, self.registration = (
            cast(VBoxManage, self),
            cast(FolderWatch, self),
            cast(Registration, self),
        )
        self.files = VmFiles(folder / "one")
        self.files.logs.mkdir(parents=True)
        self.files.settings.touch()
        self.word = "poweroff"
        self.asked = 0
        self.readable = True
        self.told: list[VmState] = []
        self.changed: dict[Path, Callable[[], None]] = {}

    async def ask(self, *words: str) -> ToolResult:
        assert words == ("showvminfo", UUID, "--machinereadable")
        self.asked += 1
        if not self.readable:
            return ToolResult(1, "", LIMITED)
        text = f'name="one"\nUUID="{UUID}"\nVMState="{self.word}"\nLogFldr="{self.files.logs}"\n'
        return ToolResult(0, text, "")

    async def register_anew(self, name: str, uuid: str, files: VmFiles) -> None:
        assert (name, uuid, files) == ("one", UUID, self.files)
        self.readable = True

    def add(self, folder: Path, changed: Callable[[], None]) -> None:
        self.changed[folder] = changed

    def remove(self, folder: Path) -> None:
        del self.changed[folder]

    async def dialect(self) -> Dialect:
        return Dialect(Version(7, 2))

    def state_changed(self, name: str, state: VmState) -> None:
        assert name == "one"
        self.told.append(state)

    def log_says(self, state: str) -> None:
        with self.files.log.open("a") as log:
            log.write(f"00:00:01.000000 Console: Machine state changed to '{state}'\n")
        for changed in self.changed.values():
            changed()


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


def tracker(host: FakeHost, operations: DeferredLock | None = None, *, running: bool = False) -> StateTracker:
    definition = Definition(
        name="one",
        uuid=UUID,
        image="i",
        mac="",
        agent_port=0,
        forwards=(),
        network=False,
        network_nic=0,
        console_log="console.log",
        memory_mb=32,
        running=running,
    )
    record = Record(host.files, definition)
    return StateTracker(host, "one", UUID, record, operations or DeferredLock())


def now(work: Coroutine[Any, Any, T]) -> T:
    """The result of what need not wait."""
    results: list[T] = []
    start(work).addCallback(results.append)
    return results[0]


def test_an_answer_counts_until_it_is_old_or_the_settings_change(host: FakeHost) -> None:
    found = tracker(host)
    for _ in range(3):
        assert now(found.state()) is VmState.POWERED_OFF
    assert host.asked == 1
    host.reactor.advance(FACTS_KEPT_S)
    now(found.state())
    assert host.asked == 2
    os.utime(host.files.settings, ns=(1, 1))
    now(found.state())
    assert host.asked == 3
    found.forget()
    now(found.state())
    assert host.asked == 4


def test_without_a_folder_to_watch_it_counts_for_a_moment(host: FakeHost) -> None:
    host.files.logs.rmdir()
    found = tracker(host)
    now(found.state())
    host.reactor.advance(FACTS_KEPT_UNWATCHED_S / 2)
    now(found.state())
    assert host.asked == 1
    host.reactor.advance(FACTS_KEPT_UNWATCHED_S)
    now(found.state())
    assert host.asked == 2


def test_a_vm_whose_settings_virtualbox_cannot_read_is_registered_anew_and_asked_for_again(host: FakeHost) -> None:
    host.readable = False
    assert now(tracker(host).state()) is VmState.POWERED_OFF
    assert host.asked == 2


def test_a_vm_that_ran_when_the_power_failed_was_aborted(host: FakeHost) -> None:
    found = tracker(host, running=True)
    assert now(found.state()) is VmState.ABORTED
    with found.in_phase(VmState.STARTING):
        assert now(found.asked()) is VmState.POWERED_OFF, "we start it just now"


def test_a_new_state_in_the_log_is_asked_for_and_told(host: FakeHost) -> None:
    found = tracker(host)
    now(found.state())
    host.word = "running"
    host.log_says("Running")
    assert (host.asked, host.told) == (2, [VmState.RUNNING])
    host.log_says("Running")
    assert host.asked == 2, "known already"


def test_during_an_operation_the_log_is_its_own_to_tell(host: FakeHost) -> None:
    operations = DeferredLock()
    found = tracker(host, operations)
    now(found.state())
    operations.acquire()
    reached = found.monitor.reached(VmState.PAUSED)
    host.log_says("Running")
    assert not reached.is_set()
    host.log_says("Paused")
    assert reached.is_set()
    with found.in_phase(VmState.SAVING):
        assert now(found.state()) is VmState.SAVING
    assert (host.asked, host.told) == (1, [VmState.SAVING])


def test_after_an_operation_that_failed_virtualbox_is_asked(host: FakeHost) -> None:
    found = tracker(host)
    now(found.state())
    host.word = "paused"
    with pytest.raises(HypervisorError), found.in_phase(VmState.SAVING):
        raise HypervisorError("no")
    assert (host.asked, host.told) == (2, [VmState.SAVING, VmState.PAUSED])


def test_a_closed_monitor_watches_nothing(host: FakeHost) -> None:
    found = tracker(host)
    now(found.state())
    found.monitor.close()
    assert not host.changed
    found.forget()
    now(found.state())
    assert not host.changed


def test_a_vm_that_virtualbox_pauses_for_a_full_disk_is_stuck_until_it_is_resumed(host: FakeHost) -> None:
    host.word = "running"
    found = tracker(host)
    now(found.report_asked())
    with host.files.log.open("a") as log:
        log.write("00:00:02 Console: VM runtime error: fatal=false, errorID=DrvVD_DISKFULL message=...\n")
    host.word = "paused"
    host.log_says("Paused")
    assert host.told == [VmState.RUNNING, VmState.STUCK]
    assert found.held
    assert "free some space" in found.trouble
    with pytest.raises(HypervisorError), found.in_phase(VmState.SAVING):
        raise HypervisorError("disk full")
    assert now(found.state()) is VmState.STUCK, "a save that failed has not changed that"
    host.log_says("Running")
    found.report(VmState.RUNNING)  # as the operation does that resumes it
    found.look_again_soon()
    with host.files.log.open("a") as log:
        log.write("00:00:02 Console: VM runtime error: fatal=false, errorID=DrvVD_DISKFULL message=...\n")
    host.reactor.advance(1.0)
    assert found.held, "still full: it stopped again before anybody listened"


def test_a_vm_that_a_person_has_paused_is_just_paused(host: FakeHost) -> None:
    host.word = "running"
    found = tracker(host)
    now(found.report_asked())
    host.word = "paused"
    host.log_says("Paused")
    assert host.told == [VmState.RUNNING, VmState.PAUSED]
    assert not found.held


def test_a_log_on_the_same_full_disk_says_nothing_and_the_disk_itself_is_looked_at(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.word = "running"
    found = tracker(host)
    now(found.report_asked())
    free = [10 * FULL_BYTES]
    monkeypatch.setattr(psutil, "disk_usage", lambda _folder: SimpleNamespace(free=free[0]))
    host.word = "paused"
    found.forget()
    assert now(found.state()) is VmState.PAUSED, "by a person"
    free[0] = 0
    assert now(found.state()) is VmState.STUCK
    assert found.held
    assert "free some space" in found.trouble
    assert host.told[-1] is VmState.STUCK
