"""The decisions of a guest task, as statements."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcontrol.protocol.command import CommandState, CommandStatus
from vmwrapper.errors import GuestOutOfMemory, TaskFailed
from vmwrapper.job.model import GuestOptions, Job, Task, UnzipTask
from vmwrapper.state.checkpoint import Checkpoint, GuestProgress, Phase, SnapshotRecord, VmRecord
from vmwrapper.state.rollback import next_attempt
from vmwrapper.vm import decisions
from vmwrapper.vm.decisions import Send, Watch, Way

OURS = VmRecord("worker", "vmwrapper_x", snapshots=(SnapshotRecord("vmwrapper_3", True, 0),))
TWO = VmRecord(
    "worker", "vmwrapper_x", snapshots=(SnapshotRecord("vmwrapper_3", True, 0), SnapshotRecord("vmwrapper_4", False, 1))
)
NEW = VmRecord("worker", "vmwrapper_x")
CERN = VmRecord("CernVM", "CernVM", ours=False)


@pytest.mark.parametrize(
    ("record", "state", "snapshots", "way", "snapshot", "rolled_back"),
    [
        (NEW, None, (), Way.CREATE, "", True),
        (OURS, "Saved", ("vmwrapper_3",), Way.RESUME, "", False),
        (OURS, "Running", ("vmwrapper_3",), Way.TAKE_OVER, "", False),
        (OURS, "Paused", (), Way.TAKE_OVER, "", False),
        (OURS, "Aborted", ("vmwrapper_2", "vmwrapper_3"), Way.RESTORE, "vmwrapper_3", True),
        (OURS, "PoweredOff", ("vmwrapper_3",), Way.RESTORE, "vmwrapper_3", True),
        # the older generation of the checkpoint names a snapshot that is gone already
        (OURS, "Aborted", ("theirs", "vmwrapper_10", "vmwrapper_9"), Way.RESTORE, "vmwrapper_10", True),
        # the newest was never durable, or somebody has deleted it
        (TWO, "Aborted", ("vmwrapper_3",), Way.RESTORE, "vmwrapper_3", True),
        (TWO, "Aborted", ("vmwrapper_3", "vmwrapper_4"), Way.RESTORE, "vmwrapper_4", True),
        (NEW, "Aborted", (), Way.RECREATE, "", True),
        (NEW, "Aborted", ("vmwrapper_1",), Way.RECREATE, "", True),  # it was given up, or is not in the checkpoint yet
        (NEW, "PoweredOff", ("theirs",), Way.RECREATE, "", True),
        (CERN, "PoweredOff", ("theirs",), Way.BOOT, "", True),
        (CERN, "Saved", (), Way.RESUME, "", False),
    ],
)
def test_the_newest_consistent_state_is_used(
    record: VmRecord, state: str | None, snapshots: Sequence[str], way: Way, snapshot: str, rolled_back: bool
) -> None:
    plan = decisions.plan_start(record, state, snapshots)
    assert (plan.way, plan.snapshot, plan.rolled_back) == (way, snapshot, rolled_back)
    assert plan.entry in (None, *record.snapshots)


def sent(attempt: int = 1) -> GuestProgress:
    return GuestProgress(0, "id", attempt, Phase.SENT)


def back(progress: GuestProgress) -> GuestProgress:
    """After the guest went back."""
    sent = {"0": progress.attempt} if progress.phase is Phase.SENT else {}
    return next_attempt(Checkpoint("0" * 64, attempts=sent), progress)


def known(state: str, attempt: int = 1) -> CommandStatus:
    return CommandStatus("id", "", CommandState(state), attempt=attempt)


def test_only_what_is_unknown_is_sent() -> None:
    for state in ("running", "finished"):
        for progress in (sent(), back(sent(3))):
            assert decisions.next_step(progress, known(state)) == Watch(1)


@pytest.mark.parametrize("state", ["Saved", "PoweredOff", "Aborted"])
@pytest.mark.parametrize("snapshot", ["", "vmwrapper_3"])
def test_what_cannot_be_used_any_more_is_made_anew_and_it_is_told_why(state: str, snapshot: str) -> None:
    entries = (SnapshotRecord(snapshot, True, 0),) if snapshot else ()
    record = VmRecord("vm", "vm", ours=True, snapshots=entries, saved_state_expected=True)
    plan = decisions.plan_start(record, state, ["vmwrapper_3"], "its image was replaced")
    assert (plan.way, plan.rolled_back) == (Way.RECREATE, True)
    assert plan.why == "its image was replaced: it is made anew"


def test_what_runs_or_is_somebodys_own_is_never_given_up() -> None:
    mine, theirs = VmRecord("vm", "vm", ours=True), VmRecord("vm", "vm", ours=False)
    assert decisions.plan_start(mine, "Running", [], "its image was replaced").way is Way.TAKE_OVER
    assert decisions.plan_start(theirs, "Saved", [], "its image was replaced").way is Way.RESUME


def test_a_command_that_never_arrived_keeps_its_attempt() -> None:
    step = decisions.next_step(sent(), None)
    assert step == Send(1, copy_files=False)
    never_sent = back(GuestProgress(0, "id"))
    assert decisions.next_step(never_sent, None) == Send(1, copy_files=True)


@given(st.integers(1, 50), st.sampled_from(["unknown", None]))
def test_after_a_rollback_the_attempt_grows(attempt: int, state: str | None) -> None:
    view = known(state, 0) if state else None
    step = decisions.next_step(back(sent(attempt)), view)
    assert isinstance(step, Send)
    assert (step.attempt, step.copy_files) == (attempt + 1, True)
    assert step.rollback


@given(st.integers(1, 50), st.integers(0, 50), st.sampled_from(["lost", "refused"]))
def test_the_attempt_is_above_every_one_that_the_agent_has_seen(mine: int, theirs: int, state: str) -> None:
    step = decisions.next_step(sent(mine), known(state, theirs))
    assert isinstance(step, Send)
    assert step.attempt > max(mine, theirs)


def guest_task(**more: object) -> Task:
    guest = {"virtualmachine": "vm", "image": "img", "copy_app_to_vm": True, "copy_files_to_vm": ("in", "text"),
             "copy_files_from_vm": ("out", "stdout")}  # fmt: skip
    options: dict[str, object] = {"stdin_filename": "text", "stdout_filename": "stdout", **more}
    return Task("./worker.py", 7, guest=GuestOptions(**guest), **options)  # type: ignore[arg-type]


def test_each_file_is_copied_once_and_the_application_is_executable() -> None:
    copies = decisions.files_in(guest_task())
    assert [(copy.remote, copy.executable) for copy in copies] == [("worker.py", True), ("in", False), ("text", False)]
    assert [copy.logical for copy in decisions.files_out(guest_task())] == ["out"], "stdout comes as a stream"
    assert decisions.command_of(guest_task()) == "./worker.py"


def test_the_application_may_be_in_the_guest_already() -> None:
    task = Task("tool", 1, guest=GuestOptions("vm", app_path_vm="/opt/app"))
    assert decisions.command_of(task) == "/opt/app/tool"
    assert decisions.command_of(Task("tool", 1, guest=GuestOptions("vm"))) == "tool"


def missing(job: Job, there: Sequence[str], unzip_done: int = 0) -> list[str]:
    def fault_of(name: str) -> str:
        return "" if name in there else "is not in the slot"

    return [str(error) for error in decisions.missing_inputs(job, unzip_done, 0, fault_of)]


def test_what_nothing_can_make_is_missing_before_anything_starts() -> None:
    job = Job("job.xml", "0" * 64, tasks=(guest_task(),))
    assert missing(job, ["./worker.py", "in", "text", "img"]) == []
    assert missing(job, ["./worker.py", "text", "img"]) == ["job.xml:7: <copy_file_to_VM>: in is not in the slot"]
    second = Task("./b", 9, guest=GuestOptions("vm", "img", copy_files_to_vm=("out", "other")))
    both = Job("job.xml", "0" * 64, tasks=(guest_task(), second))
    assert missing(both, ["./worker.py", "in", "text", "img"]) == [
        "job.xml:9: <copy_file_to_VM>: other is not in the slot"
    ]


def test_unzip_tasks_and_host_tasks_can_make_anything() -> None:
    unzip = Job("job.xml", "0" * 64, unzip_tasks=(UnzipTask("tar", 1),), tasks=(guest_task(),))
    assert missing(unzip, []) == []
    assert len(missing(unzip, [], unzip_done=1)) == 4
    assert missing(Job("job.xml", "0" * 64, tasks=(Task("make", 1), guest_task())), []) == []


@pytest.mark.parametrize(
    ("result", "time_limit", "killed"),
    [
        ({"signal": 9}, False, True),
        ({"signal": 9}, True, False),
        ({"signal": 9, "out_of_memory": True}, False, False),
        ({"signal": 11}, False, False),
        ({"exit_status": 9, "signal": None}, False, False),
    ],
)
def test_only_a_kill_that_nothing_explains_is_no_end_of_the_programs_own(
    result: dict[str, object], time_limit: bool, killed: bool
) -> None:
    assert decisions.was_killed(result, time_limit_reached=time_limit) is killed


def test_what_the_end_of_a_command_means() -> None:
    task = guest_task()
    assert decisions.verdict(task, {"exit_status": 0}, time_limit_reached=False) is None
    failed = decisions.verdict(task, {"exit_status": 3}, time_limit_reached=False)
    assert isinstance(failed, TaskFailed)
    assert "exit status 3" in str(failed)
    assert isinstance(decisions.verdict(task, {"signal": 11}, time_limit_reached=False), TaskFailed)
    oom = {"signal": 9, "out_of_memory": True}
    assert isinstance(decisions.verdict(task, oom, time_limit_reached=False), GuestOutOfMemory)
    assert decisions.verdict(task, {"signal": 15}, time_limit_reached=True) is None
    broken = decisions.verdict(task, {"error": "application-missing"}, time_limit_reached=True)
    assert isinstance(broken, TaskFailed)
