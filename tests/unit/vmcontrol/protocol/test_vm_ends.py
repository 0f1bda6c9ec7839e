"""What became of the VMs at an end: HostMain says it of each one, and the wrapper tells and writes down just that."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Any, cast

import pytest
from twisted.internet.task import Clock

from vmcontrol.common.eventloop import sleep, start
from vmcontrol.guests.endings import Endings
from vmcontrol.guests.vms import Machines
from vmcontrol.hypervisors.interface import HostProblem, HypervisorError
from vmcontrol.protocol import vmends
from vmcontrol.protocol.vm import VmState
from vmcontrol.protocol.vmends import Outcome, VmEnd
from vmwrapper.run.cleanup import after_the_end
from vmwrapper.state.checkpoint import Checkpoint, SnapshotRecord, VmRecord

FULL = HostProblem("the disk is full", key="disk-full", delay_s=3600)


class FakeMachines:
    """VMs by name: their state, and what comes of saving one (an error, or seconds that it takes)."""

    def __init__(self, clock: Clock, **vms: tuple[VmState, Any]) -> None:
        self.clock, self.vms = clock, dict(vms)
        self.hypervisor = object()
        self.calls: list[str] = []

    @property
    def ours(self) -> list[str]:
        return sorted(self.vms)

    async def wait_state(self, name: str, states: list[str], limit_s: float) -> VmState:
        return self.vms[name][0]

    async def state(self, name: str) -> VmState:
        return self.vms[name][0]

    async def trouble(self, name: str) -> str:
        return "killed"

    async def save_state(self, name: str) -> None:
        self.calls.append(f"save {name}")
        comes = self.vms[name][1]
        if isinstance(comes, float):
            await sleep(cast(Any, self.clock), comes)
        elif isinstance(comes, Exception):
            raise comes
        self.vms[name] = VmState.SAVED, None
        if comes == "fails after that":
            raise HypervisorError("its link")

    async def power_off(self, name: str) -> None:
        self.calls.append(f"off {name}")
        self.vms[name] = VmState.POWERED_OFF, None


def ended(machines: FakeMachines, *, save: bool = True, limit_s: float = 20.0) -> dict[str, VmEnd]:
    results: list[list[VmEnd]] = []
    start(Endings(machines.clock, cast(Machines, machines)).end(save=save, limit_s=limit_s)).addCallback(results.append)
    machines.clock.pump([1.0] * 30)
    return {end.name: end for end in results[0]}


def test_each_vm_has_its_own_end() -> None:
    machines = FakeMachines(
        Clock(),
        saved=(VmState.RUNNING, None),
        paused=(VmState.PAUSED, None),
        before=(VmState.SAVED, None),
        full=(VmState.RUNNING, FULL),
        odd=(VmState.RUNNING, "fails after that"),
        dead=(VmState.ABORTED, None),
        down=(VmState.POWERED_OFF, None),
    )
    ends = ended(machines)
    assert {name: end.outcome for name, end in ends.items()} == {
        "saved": Outcome.SAVED,
        "paused": Outcome.SAVED,
        "before": Outcome.SAVED,
        "full": Outcome.FAILED,
        "odd": Outcome.SAVED,
        "dead": Outcome.FAILED,
        "down": Outcome.OFF,
    }
    assert (ends["full"].key, ends["full"].reason) == ("disk-full", "the disk is full")
    assert ends["dead"].reason == "it is Aborted: killed"
    assert "off full" in machines.calls, "nothing runs on that nobody looks after"


def test_what_takes_too_long_is_not_saved_and_is_switched_off() -> None:
    machines = FakeMachines(Clock(), slow=(VmState.RUNNING, 60.0), quick=(VmState.RUNNING, 1.0))
    ends = ended(machines)
    assert ends["quick"].outcome is Outcome.SAVED
    assert ends["slow"] == VmEnd("slow", Outcome.FAILED, "it took longer than 20 s")
    assert machines.calls[-1] == "off slow"


def test_who_asks_for_a_save_while_one_is_under_way_gets_its_answer() -> None:
    """TERM to everything and `shutdown` come together."""
    clock = Clock()
    machines = FakeMachines(clock, one=(VmState.RUNNING, 5.0))
    endings = Endings(clock, cast(Machines, machines))
    answers: list[list[VmEnd]] = []
    for _ in range(2):
        start(endings.end(save=True, limit_s=20)).addCallback(answers.append)
    clock.pump([1.0] * 6)
    assert answers == [[VmEnd("one", Outcome.SAVED)]] * 2
    assert machines.calls == ["save one"]


@pytest.mark.parametrize("trouble", [FULL, OSError(errno.EMFILE, "too many open files")])
def test_a_save_that_fails_for_a_moment_is_tried_again(trouble: Exception) -> None:
    clock = Clock()
    machines = FakeMachines(clock, one=(VmState.RUNNING, trouble))
    answers: list[list[VmEnd]] = []
    start(Endings(clock, cast(Machines, machines)).end(save=True, limit_s=20)).addCallback(answers.append)
    clock.advance(0.5)
    machines.vms["one"] = VmState.RUNNING, None
    clock.advance(1.0)
    assert answers == [[VmEnd("one", Outcome.SAVED)]]
    assert machines.calls == ["save one"] * 3


def test_one_that_fails_for_ever_is_tried_for_seconds_and_another_fault_once() -> None:
    machines = FakeMachines(Clock(), full=(VmState.RUNNING, FULL), odd=(VmState.RUNNING, HypervisorError("odd")))
    assert {end.outcome for end in ended(machines).values()} == {Outcome.FAILED}
    assert 2 <= machines.calls.count("save full") <= 5
    assert machines.calls.count("save odd") == 1


def test_an_end_that_keeps_nothing_switches_off() -> None:
    machines = FakeMachines(Clock(), one=(VmState.RUNNING, None), two=(VmState.SAVED, None))
    assert {end.outcome for end in ended(machines, save=False).values()} == {Outcome.OFF}
    assert machines.calls == ["off one"]


@pytest.mark.parametrize("said", [None, True, "saved", [None, 7, {"name": "x"}, {"name": "x", "outcome": []}], {}])
def test_an_answer_that_says_nothing_of_a_vm_has_saved_none(said: object) -> None:
    assert vmends.read(said) == {}


def test_an_end_travels_as_a_struct() -> None:
    end = VmEnd("one", Outcome.FAILED, "no room", "disk-full")
    assert vmends.read([end.to_struct()]) == {"one": end}
    assert len(str(VmEnd("one", Outcome.FAILED, "x" * 5000).to_struct()["reason"])) == 1000


ONE = VmRecord("one", "vm_one", snapshots=(SnapshotRecord("vmwrapper_3", True, 0),))
TWO = VmRecord("two", "vm_two", saved_state_expected=True)
NOW = Checkpoint("d", "r", vms=(TWO, ONE))


def test_a_saved_state_is_written_down_for_what_was_saved() -> None:
    kept = after_the_end(NOW, {"vm_one": VmEnd("vm_one", Outcome.SAVED)}, "vm_one", lost_s=9.0)
    assert {vm.name: vm.saved_state_expected for vm in kept.checkpoint.vms} == {"vm_one": True, "vm_two": True}
    assert (kept.saved, kept.lost) == (("VM vm_one is saved",), ())


def test_one_that_was_not_saved_is_told_with_what_it_costs() -> None:
    kept = after_the_end(NOW, {"vm_one": VmEnd("vm_one", Outcome.FAILED, "full", "disk-full")}, "vm_one", lost_s=9.0)
    assert kept.checkpoint == NOW
    (line,) = kept.lost
    assert line == (
        "VM vm_one was not saved (full): the next start goes back to its snapshot vmwrapper_3, and 9 s of CPU time are"
        " lost"
    )


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (VmRecord("one", "vm_one"), "it has no snapshot, so the next start makes it anew and its task begins again"),
        (VmRecord("one", "vm_one", ours=False), "the next start switches it on as it is, and the task begins again"),
    ],
)
def test_where_nothing_is_kept_the_words_say_so(record: VmRecord, words: str) -> None:
    (line,) = after_the_end(Checkpoint("d", "r", vms=(record,)), {}, "vm_one", lost_s=0.2).lost
    assert line == f"VM vm_one was not saved (HostMain did not say what became of it): {words}"


def test_another_vm_that_failed_is_told_too_and_one_that_did_not_run_is_not() -> None:
    ends = {"vm_two": VmEnd("vm_two", Outcome.FAILED, "full"), "vm_one": VmEnd("vm_one", Outcome.OFF)}
    kept = after_the_end(NOW, ends, "", lost_s=5.0)
    assert len(kept.lost) == 1
    assert kept.lost[0].startswith("VM vm_two was not saved (full)")
    assert "CPU" not in kept.lost[0]


def test_a_vm_whose_state_is_given_up_is_not_told_as_saved() -> None:
    """It was to be switched off, HostMain could not be reached then, and saved it at the end."""
    given_up = replace(ONE, discard=True)
    now = Checkpoint("d", "r", vms=(given_up,))
    kept = after_the_end(now, {"vm_one": VmEnd("vm_one", Outcome.SAVED)}, "vm_one", lost_s=9.0)
    assert kept.checkpoint == now
    assert kept.saved == ()
    assert kept.lost[0].startswith(
        "VM vm_one was not saved (what it was doing is given up): the next start goes back to"
    )
