"""Calls of VBoxManage and time per stage of a job: `python -m bench.virtualbox [--rounds 5] [--memory 256]`.

Uses the lab of the tests (a real VirtualBox without its kernel driver: nothing here runs in the guest, so the times are
VirtualBox's own), as root. The guest counts on its console. "paused" is what VBox.log says of the guest's pause;
"noticed" is from the kill of the VM process to the call of the listener; "idle" is the processor time of the watch.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Awaitable
from pathlib import Path

import psutil
from twisted.python.failure import Failure

from tests.support.virtualbox_world import VirtualBoxWorld, environment_of
from tests.virtualbox.lab import LabMissing, lab
from vmcontrol.common.eventloop import sleep, start, the_reactor
from vmcontrol.protocol.vm import VmState

IDLE_S = 10.0


class Stages:
    """What each stage took."""

    def __init__(self, world: VirtualBoxWorld) -> None:
        self.world = world
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.calls: dict[str, list[int]] = defaultdict(list)

    async def stage(self, name: str, work: Awaitable[object]) -> None:
        calls, began = self.world.driver.vbox.calls, self.world.reactor.seconds()
        await work
        self.seconds[name].append(self.world.reactor.seconds() - began)
        self.calls[name].append(self.world.driver.vbox.calls - calls)

    def report(self) -> None:
        print(f"{'stage':34}{'calls':>6}{'median s':>10}{'worst s':>9}")
        for name, seconds in self.seconds.items():
            calls = self.calls.get(name)
            shown = "" if calls is None else f"{statistics.median(calls):.0f}"
            print(f"{name:34}{shown:>6}{statistics.median(seconds):10.3f}{max(seconds):9.3f}")


def guest_pauses(log: Path) -> list[float]:
    """Seconds that the guest stood still, each time, as VBox.log says."""
    found, stopped = [], None
    for stamp, what in re.findall(r"^(\S+) Changing the VM state from '(?:\w+)' to '(\w+)'", log.read_text(), re.M):
        hours, minutes, seconds = stamp.split(":")
        now = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        if what in ("SUSPENDING", "SUSPENDING_LS"):
            stopped = now
        elif what == "RUNNING" and stopped is not None:
            found.append(now - stopped)
            stopped = None
    return found


async def one_round(stages: Stages, memory_mb: int) -> None:
    world, stage = stages.world, stages.stage
    hypervisor = world.hypervisor

    async def made() -> None:
        await hypervisor.create(world.spec(memory_mb=memory_mb))
        await hypervisor.start("one")

    await stage("createVM to running", made())
    await world.counting()
    await stage("pause", hypervisor.pause("one"))
    await stage("resume", hypervisor.unpause("one"))
    await stage("checkpoint (snapshot)", hypervisor.save_snapshot("one", "vmwrapper_1"))
    await world.counting()
    await stage("checkpoint, the second", hypervisor.save_snapshot("one", "vmwrapper_2"))
    files = world.vm.files
    assert files is not None
    stages.seconds["guest paused by a checkpoint"] += guest_pauses(files.log)[1:]
    await stage("delete the older snapshot", hypervisor.delete_snapshot("one", "vmwrapper_1"))

    async def stopped() -> None:
        await hypervisor.pause("one")
        await hypervisor.save_snapshot("one", "vmwrapper_3")
        await hypervisor.unpause("one")

    await stage("pause, snapshot, resume instead", stopped())
    await stage("save", hypervisor.save_state("one"))
    await stage("start from saved", hypervisor.start("one"))
    await world.counting()
    pid = (await hypervisor.info("one")).pid
    assert pid is not None
    world.states.clear()

    async def noticed() -> None:
        os.kill(pid, 9)
        await world.told("one", VmState.ABORTED, 10.0)

    await stage("a killed VM process is noticed", noticed())
    await stage("restore a snapshot", hypervisor.restore_snapshot("one"))
    await stage("start from a snapshot", hypervisor.start("one"))
    await world.counting()
    await stage("delete, running, with its media", hypervisor.delete("one"))
    (world.folder / "one.log").unlink()


async def idle(stages: Stages) -> None:
    world = stages.world
    await world.running("one")
    process = psutil.Process()
    calls, before = world.driver.vbox.calls, process.cpu_times()
    await sleep(world.reactor, IDLE_S)
    after = process.cpu_times()
    spent = after.user + after.system - before.user - before.system
    print(
        f"idle: {spent * 60 / IDLE_S:.2f} s of processor a minute with a guest that prints 18 lines a second, "
        f"{world.driver.vbox.calls - calls} calls in {IDLE_S:g} s"
    )


async def bench(world: VirtualBoxWorld, options: argparse.Namespace) -> None:
    stages = Stages(world)
    try:
        for _ in range(options.rounds):
            await one_round(stages, options.memory)
        stages.report()
        await idle(stages)
    finally:
        await world.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.virtualbox", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, default=256, help="MiB of the guest")
    options = parser.parse_args()
    try:
        here = lab()
    except LabMissing as error:
        print(error, file=sys.stderr)
        return 1
    reactor = the_reactor()
    failed: list[Failure] = []
    with tempfile.TemporaryDirectory() as folder, here.home(Path(folder, "home")) as environment:
        names = ("VBOX_USER_HOME", "VBOX_IPC_SOCKETID", "HOME", "LOGNAME", "USER")
        with environment_of({name: environment[name] for name in names}):
            slot = Path(folder, "slot")
            slot.mkdir()
            world = VirtualBoxWorld(reactor, slot, here, environment)
            print(f"{world.manage('--version').stdout.strip()}, guest of {options.memory} MiB, {options.rounds} rounds")

            def tell(failure: Failure) -> None:
                failure.printTraceback()
                failed.append(failure)

            def begin() -> None:
                done = start(bench(world, options))
                done.addErrback(tell)
                done.addBoth(lambda _: reactor.stop())

            reactor.callWhenRunning(begin)
            reactor.run()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
