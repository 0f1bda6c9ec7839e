"""What finished tasks have left running: what counts as work, and what the checkpoint has of it."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest_twisted

from vmcontrol.common import proctable
from vmcontrol.common.eventloop import the_reactor
from vmwrapper.host.left_running import Activity, LeftRunning
from vmwrapper.process.patience import Patience
from vmwrapper.state.checkpoint import Checkpoint


def test_computing_writing_and_waiting_for_the_disk_are_work() -> None:
    before = Activity(10.0, 500)
    assert not Activity(10.004, 500).is_work_since(before, 0.5), "a server that looks for work now and then"
    assert Activity(10.006, 500).is_work_since(before, 0.5)
    assert Activity(10.0, 501).is_work_since(before, 0.5)
    assert Activity(10.0, 500, waits_for_disk=True).is_work_since(before, 0.5)
    assert Activity(3.0, 500).is_work_since(before, 0.5), "one of them has ended"


def test_what_others_write_into_an_open_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    with path.open("ab") as out, subprocess.Popen(["sleep", "60"], stdout=out) as process:
        try:
            entry = proctable.look_at(process.pid)
            assert entry is not None
            time.sleep(0.1)
            before = Activity.of([entry])
            out.write(b"more")
            out.flush()
            assert Activity.of([entry]).written == before.written + 4
        finally:
            process.kill()


class FakeProgram:
    def __init__(self) -> None:
        self.left_running = [proctable.look_at(os.getpid())]
        self.there = True

    def is_there(self) -> bool:
        return self.there

    async def end(self, _patience: Patience) -> None:
        self.there = False


class FakeLedger:
    def __init__(self, now: Checkpoint) -> None:
        self.now = now

    def keep(self, checkpoint: Checkpoint) -> None:
        self.now = checkpoint


def context_of(**checkpoint: Any) -> Any:
    control = SimpleNamespace(work_clock=the_reactor())
    return SimpleNamespace(control=control, ledger=FakeLedger(Checkpoint("0" * 64, **checkpoint)))


def test_what_has_ended_by_itself_leaves_the_checkpoint() -> None:
    context = context_of(tasks_done=2)
    left, programs = LeftRunning(context), [FakeProgram(), FakeProgram()]
    for index, program in enumerate(programs):
        left.add(index, program)  # type: ignore[arg-type]
    left.look()
    assert context.ledger.now.left_running == (0, 1)
    programs[0].there = False
    left.look()
    assert context.ledger.now.left_running == (1,)


def test_tasks_of_the_last_run_stay_in_the_checkpoint_until_they_have_run_again() -> None:
    context = context_of(tasks_done=3, left_running=(0, 2))
    left = LeftRunning(context)
    assert left.to_run_again() == [0, 2]
    left.ran_again(0)
    assert left.indices() == (2,)
    left.ran_again(0)
    assert left.indices() == (2,)


@pytest_twisted.ensureDeferred
async def test_after_a_rollback_nothing_is_left_of_tasks_that_run_again() -> None:
    context = context_of(tasks_done=3, left_running=(2,))
    left, programs = LeftRunning(context), [FakeProgram(), FakeProgram()]
    for index, program in enumerate(programs):
        left.add(index, program)  # type: ignore[arg-type]
    await left.before(1)
    assert [program.there for program in programs] == [True, False]
    assert left.indices() == (0,)
