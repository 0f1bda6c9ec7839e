"""What going back to an older state of a VM means for the job. Pure: a checkpoint in, the checkpoint after it out.

Tasks are done one after the other, and what one did in a VM is in that VM only: when a VM loses it, the task is done
again, and with it all that came after it, for which every other VM goes back as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from vmwrapper.names import snapshot_number
from vmwrapper.state.checkpoint import Checkpoint, GuestProgress, Phase, SnapshotRecord, VmRecord


def go_back(now: Checkpoint, users: Sequence[str], virtualmachine: str, to: SnapshotRecord | None) -> Checkpoint:
    """The job when `virtualmachine` is at the snapshot `to` (None: as it was made).

    users: for each task of the job the VM that it uses, "" for none. What left the slot since is not taken back: CPU
    time that was reported, attempts; messages are kept elsewhere (vmwrapper.vm.sent).
    """
    states: dict[str, SnapshotRecord | None] = {virtualmachine: to}
    done = now.tasks_done
    while True:
        first = min((lost for vm, state in states.items() for lost in _lost(now, users, vm, state)), default=done)
        done = min(done, first)
        others = {
            vm.virtualmachine: _newest_before(vm, users, done)
            for vm in now.vms
            if vm.virtualmachine in users[done : _state_at(states, vm.virtualmachine, now.tasks_done)]
        }
        if others.items() <= states.items():
            break
        states |= others
    to = states[virtualmachine]
    current, elapsed_s = None, 0.0
    if to is not None and to.current is not None and to.tasks_done == done:
        current, elapsed_s = next_attempt(now, to.current), to.task_elapsed_s
    elif now.current is not None and now.current.task == done:
        current = next_attempt(now, now.current)
    return replace(
        now,
        tasks_done=done,
        current=current,
        task_elapsed_s=elapsed_s,
        vms=tuple(_at(vm, states[vm.virtualmachine]) if vm.virtualmachine in states else vm for vm in now.vms),
        left_running=tuple(index for index in now.left_running if index < done),
        rollbacks=now.rollbacks + 1,
        rolled_back_to=(snapshot_number(to.name) or 0) if to is not None else 0,
    )


def _state_at(states: Mapping[str, SnapshotRecord | None], virtualmachine: str, done: int) -> int:
    """How many tasks have left their work in a VM at most, when it is where it is to be. done: by the job as it is.

    A snapshot after a task's end may be of more than that: whether the task counts had not been written yet.
    """
    if virtualmachine not in states:
        return done
    state = states[virtualmachine]
    return min(state.tasks_done, done) if state is not None else 0


def next_attempt(now: Checkpoint, progress: GuestProgress) -> GuestProgress:
    """The command after the guest went back, perhaps to a state that does not know it. Written before it goes back."""
    sent = now.attempts.get(str(progress.task), 0)
    return replace(progress, attempt=max(1, sent + 1), phase=Phase.PREPARING)


def with_snapshot(record: VmRecord, snapshot: SnapshotRecord) -> VmRecord:
    """A new snapshot beside the newest that is proven; others are not worth their space."""
    proven = [one for one in record.snapshots if one.proven][-1:]
    return replace(record, snapshots=(*proven, snapshot))


def proven(record: VmRecord) -> VmRecord:
    """The guest has answered after its newest snapshot was taken: those before it may go."""
    return replace(record, snapshots=tuple(replace(one, proven=True) for one in record.snapshots[-1:]))


def _lost(now: Checkpoint, users: Sequence[str], virtualmachine: str, state: SnapshotRecord | None) -> Iterator[int]:
    """Tasks that were done in a VM and whose work is not in this state of it."""
    begin = state.tasks_done if state is not None else 0
    return (index for index in range(begin, now.tasks_done) if users[index] == virtualmachine)


def _newest_before(vm: VmRecord, users: Sequence[str], done: int) -> SnapshotRecord | None:
    """The newest snapshot that has the work of all tasks before `done` in it, and nothing of the others."""
    for snapshot in reversed(vm.snapshots):
        between = users[snapshot.tasks_done : done]
        if snapshot.current is None and snapshot.tasks_done <= done and vm.virtualmachine not in between:
            return snapshot
    return None


def _at(vm: VmRecord, state: SnapshotRecord | None) -> VmRecord:
    kept = vm.snapshots[: vm.snapshots.index(state) + 1] if state is not None and state in vm.snapshots else ()
    return replace(vm, snapshots=kept, saved_state_expected=False, discard=True)
