"""The guest's clock is set after every time the guest stood still, whatever made it stand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock

from tests.support.conversations import a_conversation
from vmcontrol.common import eventloop
from vmcontrol.common.clock import PausableClock
from vmcontrol.guests.vm import CLOCK_PAUSE_S, CLOCK_TRIES
from vmcontrol.guests.vms import Machines
from vmcontrol.link.errors import GuestRefused, LinkDown
from vmcontrol.protocol.vm import VmInfo, VmState

MAC = "52:54:00:00:00:02"


class FakeLink:
    """A GuestLink that is up when the test says so, and whose agent answers what the test says."""

    made: list[FakeLink]
    answers: list[Exception]
    """What the next requests to set the clock come to; then they succeed."""

    def __init__(self, reactor: Any, **_: object) -> None:
        self.clock = PausableClock(reactor)
        self.on_up: list[Callable[[], None]] = []
        self.on_down: list[Callable[[], None]] = []
        self.is_up = False
        self.set = 0
        """Requests to set the clock."""
        self.made.append(self)

    def start(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...

    async def stop(self) -> None:
        self.is_up = False

    def up(self) -> None:
        self.is_up = True
        for callback in list(self.on_up):
            callback()

    def down(self) -> None:
        self.is_up = False
        for callback in list(self.on_down):
            callback()

    def set_clock(self, *, limit: float) -> Deferred[float]:
        assert limit > 0
        self.set += 1
        if self.answers:
            raise self.answers.pop(0)
        return succeed(1.0)


class FakeHypervisor:
    """One VM, "vm", whose agent answers at another port after each start."""

    name = "Fake"

    def __init__(self) -> None:
        self.now = VmState.SAVED
        self.port = 1000
        self._listener: Any = None

    def on_state_change(self, listener: Any) -> None:
        self._listener = listener

    async def list_running(self) -> list[str]:
        return []

    async def state(self, _name: str) -> VmState:
        return self.now

    async def info(self, name: str) -> VmInfo:
        live = self.now in (VmState.RUNNING, VmState.PAUSED)
        return VmInfo(name, self.now, MAC, None, None, agent_address=("127.0.0.1", self.port) if live else None)

    def _is(self, state: VmState) -> None:
        self.now = state
        self._listener("vm", state)

    async def start(self, _name: str) -> None:
        self.port += 1
        self._is(VmState.RUNNING)

    async def pause(self, _name: str) -> None:
        self._is(VmState.PAUSED)

    async def unpause(self, _name: str) -> None:
        self._is(VmState.RUNNING)

    async def power_off(self, _name: str) -> None:
        self._is(VmState.POWERED_OFF)

    async def save_snapshot(self, _name: str, _snapshot: str, _description: str) -> None: ...

    async def restore_snapshot(self, _name: str, _snapshot: str | None) -> None:
        self._is(VmState.SAVED)


class World:
    """HostMain's machines over both."""

    def __init__(self, folder: Path) -> None:
        self.clock: Any = Clock()
        conversation = a_conversation(self.clock, lambda guest, id: self.machines.guest_changed(guest, id))  # noqa: PLW0108
        secret = folder / "secret"
        secret.write_text("0123456789abcdef")
        self.machines = Machines(
            self.clock, conversation=conversation, secret_file=secret, broker=lambda: None, slot=secret.parent
        )
        hypervisor: Any = FakeHypervisor()
        self.machines.opened(hypervisor)

    def do(self, work: Any) -> None:
        """A call that waits for nothing."""
        ended: list[object] = []
        eventloop.start(work).addBoth(ended.append)
        assert ended == [None]

    @property
    def link(self) -> FakeLink:
        """The newest."""
        return FakeLink.made[-1]

    def running(self) -> FakeLink:
        """Started, the link up, the clock set."""
        self.do(self.machines.start("vm"))
        self.link.up()
        assert self.link.set == 1
        return self.link


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    FakeLink.made, FakeLink.answers = [], []
    monkeypatch.setattr("vmcontrol.link.dialler.GuestLink", FakeLink)
    return World(tmp_path)


def test_after_a_start_from_saved_as_soon_as_the_agent_is_reached(world: World) -> None:
    world.do(world.machines.start("vm"))
    assert world.link.set == 0
    world.link.up()
    assert world.link.set == 1
    world.link.down()
    world.link.up()
    assert world.link.set == 1, "a link that broke says nothing of the clock"


def test_after_a_snapshot_was_gone_back_to(world: World) -> None:
    first = world.running()
    world.do(world.machines.power_off("vm"))
    world.do(world.machines.restore_snapshot("vm", "s"))
    world.do(world.machines.start("vm"))
    assert world.link is not first
    world.link.up()
    assert (first.set, world.link.set) == (1, 1)


def test_after_a_snapshot_was_taken_during_which_the_guest_stood(world: World) -> None:
    link = world.running()
    world.do(world.machines.save_snapshot("vm", "s", ""))
    assert link.set == 2
    link.down()
    world.do(world.machines.save_snapshot("vm", "s", ""))
    assert link.set == 2
    link.up()
    assert link.set == 3, "when it is reached again"


def test_after_a_pause_also_when_a_snapshot_was_taken_in_it(world: World) -> None:
    link = world.running()
    world.do(world.machines.pause("vm"))
    world.do(world.machines.save_snapshot("vm", "s", ""))
    assert link.set == 1, "a guest that stands is asked nothing"
    world.do(world.machines.unpause("vm"))
    assert link.set == 2


def test_an_agent_that_cannot_yet_is_asked_a_few_times(world: World, caplog: pytest.LogCaptureFixture) -> None:
    FakeLink.answers = [GuestRefused(500, {}, "clock")] * 2
    world.do(world.machines.start("vm"))
    world.link.up()
    world.clock.pump([CLOCK_PAUSE_S] * 5)
    assert world.link.set == 3
    FakeLink.answers = [GuestRefused(500, {}, "clock")] * 100
    world.do(world.machines.save_snapshot("vm", "s", ""))
    world.clock.pump([CLOCK_PAUSE_S] * 20)
    assert world.link.set == 3 + CLOCK_TRIES
    assert caplog.messages[-1] == "the clock of vm cannot be set"


def test_what_a_broken_connection_left_undone_is_done_over_the_next(world: World) -> None:
    FakeLink.answers = [LinkDown("broken")]
    world.do(world.machines.start("vm"))
    world.link.up()
    world.link.down()
    world.clock.pump([CLOCK_PAUSE_S] * 5)
    assert world.link.set == 1
    world.link.up()
    assert world.link.set == 2


def test_a_vm_that_was_started_anew_meanwhile_is_not_asked_by_the_old_way(world: World) -> None:
    FakeLink.answers = [GuestRefused(500, {}, "clock")]
    world.do(world.machines.start("vm"))
    first = world.link
    first.up()
    world.do(world.machines.power_off("vm"))
    world.do(world.machines.start("vm"))
    world.clock.pump([CLOCK_PAUSE_S] * 5)
    assert first.set == 1
    world.link.up()
    assert world.link.set == 1
