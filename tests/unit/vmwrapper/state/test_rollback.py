"""What going back to an older state of a VM means for the job."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from vmwrapper.state.checkpoint import Checkpoint, GuestProgress, Phase, SnapshotRecord, VmRecord
from vmwrapper.state.rollback import go_back, proven, with_snapshot

DIGEST = "0" * 64


def running(task: int, attempt: int = 1) -> GuestProgress:
    return GuestProgress(task, f"id_{task}", attempt, Phase.SENT)


def test_within_a_task_the_command_gets_a_new_attempt_and_the_time_of_the_snapshot() -> None:
    snapshot = SnapshotRecord("vmwrapper_1", True, 0, running(0), 10.0, 60.0)
    newer = SnapshotRecord("vmwrapper_2", False, 0, running(0), 20.0, 90.0)
    now = Checkpoint(
        DIGEST,
        cpu_time_s=25.0,
        task_elapsed_s=95.0,
        current=running(0),
        vms=(VmRecord("a", "a", True, (snapshot, newer), True),),
        attempts={"0": 1},
    )
    back = go_back(now, ["a"], "a", snapshot)
    assert (back.tasks_done, back.task_elapsed_s, back.rollbacks) == (0, 60.0, 1)
    assert back.current == GuestProgress(0, "id_0", 2, Phase.PREPARING)
    assert back.vms == (VmRecord("a", "a", True, (snapshot,), discard=True),)
    assert (back.cpu_time_s, back.rolled_back_to) == (25.0, 1), "what was told stays told"


def test_the_snapshot_between_two_tasks_begins_the_later_one_anew() -> None:
    snapshot = SnapshotRecord("vmwrapper_1", True, 1)
    now = Checkpoint(
        DIGEST, tasks_done=1, current=running(1, 4), vms=(VmRecord("a", "a", True, (snapshot,)),), attempts={"1": 4}
    )
    back = go_back(now, ["a", "a"], "a", snapshot)
    assert (back.tasks_done, back.current) == (1, GuestProgress(1, "id_1", 5, Phase.PREPARING))


def test_a_task_that_is_not_in_the_state_is_done_again_with_all_that_came_after_it() -> None:
    in_the_first = SnapshotRecord("vmwrapper_1", True, 0, running(0), 1.0, 5.0)
    now = Checkpoint(
        DIGEST,
        tasks_done=3,
        current=running(3),
        vms=(VmRecord("a", "a", True, (in_the_first, SnapshotRecord("vmwrapper_2", False, 1))),),
        attempts={"0": 1, "3": 1},
        left_running=(0, 1),
    )
    back = go_back(now, ["a", "", "", "a"], "a", in_the_first)
    assert (back.tasks_done, back.current, back.task_elapsed_s) == (0, GuestProgress(0, "id_0", 2), 5.0)
    assert back.left_running == ()


def test_tasks_that_did_not_use_the_vm_stay_done() -> None:
    snapshot = SnapshotRecord("vmwrapper_1", True, 1)
    now = Checkpoint(DIGEST, tasks_done=2, vms=(VmRecord("a", "a", True, (snapshot,)),), current=running(2))
    assert go_back(now, ["a", "", "a"], "a", snapshot).tasks_done == 2


def test_another_vm_goes_back_with_the_job_and_takes_it_back_further() -> None:
    """b has done task 1 in one go, so that its only state of before task 3 is that of its making."""
    a = VmRecord("a", "a", True, (SnapshotRecord("vmwrapper_1", True, 2, running(2)),))
    b = VmRecord("b", "b", True, (SnapshotRecord("vmwrapper_2", True, 4),))
    now = Checkpoint(DIGEST, tasks_done=4, vms=(a, b), current=running(4))
    back = go_back(now, ["", "b", "a", "b", "a"], "a", a.snapshots[0])
    assert back.tasks_done == 1
    assert back.current is None
    assert back.vm("b") == VmRecord("b", "b", discard=True)
    kept = replace(b, snapshots=(SnapshotRecord("vmwrapper_0", True, 2), *b.snapshots))
    back = go_back(replace(now, vms=(a, kept)), ["", "b", "a", "b", "a"], "a", a.snapshots[0])
    assert back.tasks_done == 2
    assert back.vm("b") == replace(kept, snapshots=kept.snapshots[:1], discard=True)


def test_a_vm_that_goes_back_goes_further_when_another_one_has_to() -> None:
    """a has no state of before task 6 but its making, so task 3 is done again, and b may not have done task 4."""
    a = VmRecord("a", "a")
    b = VmRecord("b", "b", True, (SnapshotRecord("vmwrapper_1", True, 0), SnapshotRecord("vmwrapper_5", True, 5)))
    now = Checkpoint(DIGEST, tasks_done=7, vms=(a, b))
    back = go_back(now, ["", "", "", "a", "b", "b", "a"], "b", b.snapshots[1])
    assert back.tasks_done == 3
    assert back.vm("b") == replace(b, snapshots=b.snapshots[:1], discard=True)


USERS = st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=1, max_size=7)


@given(USERS, st.data())
def test_wherever_it_goes_back_no_vm_has_done_more_than_the_job_and_none_less(
    users: list[str], data: st.DataObject
) -> None:
    done = data.draw(st.integers(0, len(users)))
    vms = []
    for name in sorted({*users[:done], "a"} - {""}):
        at = [0, *(index + 1 for index, user in enumerate(users[:done]) if user == name)]
        numbers = data.draw(st.lists(st.sampled_from(at), max_size=2, unique=True).map(sorted))
        vms.append(VmRecord(name, name, True, tuple(SnapshotRecord(f"{name}{n}", True, n) for n in numbers)))
    now = Checkpoint(DIGEST, tasks_done=done, vms=tuple(vms))
    vm = data.draw(st.sampled_from(vms))
    back = go_back(now, users, vm.virtualmachine, data.draw(st.sampled_from([None, *vm.snapshots])))
    assert back.tasks_done <= done
    for record in back.vms:
        if record.discard:
            state = record.snapshots[-1].tasks_done if record.snapshots else 0
            assert record.virtualmachine not in users[min(state, back.tasks_done) : max(state, back.tasks_done)]
        else:
            assert record.virtualmachine not in users[back.tasks_done : done]


def test_two_snapshots_are_kept_until_the_newer_one_is_proven() -> None:
    record = VmRecord("a", "a")
    for number in range(1, 4):
        record = with_snapshot(record, SnapshotRecord(f"vmwrapper_{number}", False, 0))
        assert [one.name for one in record.snapshots] == [f"vmwrapper_{number}"], "one that was never proven goes"
    record = proven(record)
    record = with_snapshot(with_snapshot(record, SnapshotRecord("lost", False, 0)), SnapshotRecord("new", False, 0))
    assert [(one.name, one.proven) for one in record.snapshots] == [("vmwrapper_3", True), ("new", False)]
    assert [(one.name, one.proven) for one in proven(record).snapshots] == [("new", True)]
