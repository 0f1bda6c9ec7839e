"""Which seconds of a guest's silence count."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.task import Clock

from tests.unit.vmcontrol.guests.test_machines import MAC, FakeHypervisor, machines_of, outcome
from vmcontrol.common import eventloop
from vmcontrol.guests import runqueue
from vmcontrol.guests.silence import PERIOD_S, Sample, Silence
from vmcontrol.protocol.messages import StillAlive
from vmcontrol.protocol.vm import VmState

TEN_MINUTES = 120
"""Samples."""


def silent(samples: list[Sample]) -> float:
    silence = Silence()
    for sample in samples:
        silence.sample(sample)
    return silence.seconds


def waiting(share: float, threads: int = 1) -> list[Sample]:
    """Ten minutes of a VM one of whose threads waits for a processor for that share of the time."""
    return [
        Sample(n * PERIOD_S, waited_s={t: n * PERIOD_S * share * (t == 0) for t in range(threads)})
        for n in range(TEN_MINUTES + 1)
    ]


def test_a_guest_that_is_let_run_and_says_nothing_is_silent() -> None:
    assert silent(waiting(0.0)) == 600
    assert silent([Sample(n * PERIOD_S) for n in range(37)]) == 180, "where nothing is known of the process"


@pytest.mark.parametrize("threads", [1, 4])
def test_eight_busy_processes_beside_a_guest_of_idle_priority_make_it_silent_for_no_time_that_counts(
    threads: int,
) -> None:
    assert silent(waiting(1.0, threads)) == 0
    assert silent(waiting(0.8, threads)) == pytest.approx(120)


def test_without_the_kernels_count_a_process_that_wants_a_processor_and_gets_none_is_starved() -> None:
    def samples(cpu_share: float, *, runnable: bool) -> list[Sample]:
        return [Sample(n * PERIOD_S, cpu_s=n * PERIOD_S * cpu_share, runnable=runnable) for n in range(TEN_MINUTES + 1)]

    assert silent(samples(0.02, runnable=True)) == pytest.approx(12)
    assert silent(samples(1.0, runnable=True)) == 600, "a kernel that spins after its panic"
    assert silent(samples(0.0, runnable=False)) == 600, "one that has halted"


def test_time_in_which_hostmain_itself_was_late_does_not_count() -> None:
    assert silent([Sample(n * 300.0, waited_s={1: 0.0}) for n in range(3)]) == 2 * PERIOD_S


def test_a_sign_of_life_ends_the_silence_and_a_stop_only_interrupts_it() -> None:
    silence = Silence()
    for at in (0.0, 5.0, 10.0):
        silence.sample(Sample(at))
    silence.stood()
    silence.sample(Sample(500.0))
    assert silence.seconds == 10
    silence.heard()
    silence.sample(Sample(505.0))
    assert silence.seconds == 0


def test_threads_that_come_and_go_are_no_waiting() -> None:
    assert silent([Sample(0.0, waited_s={1: 50.0}), Sample(5.0, waited_s={2: 90.0})]) == 5


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this kernel does not count")
def test_a_process_that_is_kept_off_the_processor_is_seen_to_wait() -> None:
    """Real ones: two that spin on one processor; each waits for about half of the time."""
    cpu = min(os.sched_getaffinity(0))
    pids = []
    try:
        for _ in range(2):
            pid = os.fork()
            if not pid:
                os.sched_setaffinity(0, {cpu})
                while True:
                    pass
            pids.append(pid)
        clock = eventloop.the_reactor()
        first = runqueue.sample(clock.seconds(), pids[0])
        time.sleep(1.0)
        second = runqueue.sample(clock.seconds(), pids[0])
        silence = Silence()
        silence.sample(first)
        silence.sample(second)
        assert silence.seconds < 0.8 * (second.at - first.at)
    finally:
        for pid in pids:
            os.kill(pid, 9)
            os.waitpid(pid, 0)


def test_a_process_that_is_gone_is_no_error() -> None:
    assert runqueue.sample(1.0, 2**22 + 1) == Sample(1.0)


def waits(machines: Any) -> Any:
    return eventloop.start(machines.wait_silent("vm", 30.0, 1000.0))


def watched(tmp_path: Path) -> tuple[Any, FakeHypervisor, Clock]:
    clock, hypervisor = Clock(), FakeHypervisor(vm=VmState.RUNNING)
    machines = machines_of(hypervisor, tmp_path, clock)
    hypervisor.listeners[0]("vm", VmState.RUNNING)
    return machines, hypervisor, clock


def test_hostmain_tells_of_a_guest_that_falls_silent(tmp_path: Path) -> None:
    machines, _, clock = watched(tmp_path)
    waiting = waits(machines)
    for _ in range(20):  # beacons
        clock.pump([1.0] * 5)
        machines._conversation._changed(
            machines._conversation.guests.heard(StillAlive(MAC, "", 2, "VMMain"), clock.seconds()), MAC
        )
    assert not waiting.called
    clock.pump([1.0] * 31)
    assert not waiting.called
    clock.pump([1.0] * 9)
    assert waiting.result >= 30
    machines._conversation.guests.heard(StillAlive(MAC, "", 2, "VMMain"), clock.seconds())
    assert outcome(machines.wait_silent("vm", 30.0, 0.0)) == 0, "at once, not at the next sample"


def test_a_paused_guest_is_not_silent(tmp_path: Path) -> None:
    machines, hypervisor, clock = watched(tmp_path)
    waiting = waits(machines)
    for _ in range(10):  # as under a client that throttles by suspending: what runs in between counts
        hypervisor.vms["vm"] = VmState.PAUSED
        hypervisor.listeners[0]("vm", VmState.PAUSED)
        clock.pump([1.0] * 60)
        hypervisor.vms["vm"] = VmState.RUNNING
        hypervisor.listeners[0]("vm", VmState.RUNNING)
        clock.pump([1.0] * 2)
    assert not waiting.called
    assert machines._machines["vm"].silent_s == pytest.approx(20, abs=6)
