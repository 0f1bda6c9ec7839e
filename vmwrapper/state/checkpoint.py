"""The checkpoint of a slot: what the job has finished, and which state of which VM belongs to it.

Owns `vmwrapper_checkpoint.json` and `vmwrapper_checkpoint.previous.json`. The model is pure and frozen: a new state of
the job is a new `Checkpoint`, and it counts from the moment `CheckpointStore.save` has returned. The state of a VM and
the result of a command are not in it: the hypervisor and the agent have them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Annotated, Any

from vmcontrol.common import jsonfile
from vmcontrol.common.jsonfile import Count, Damaged, Name, Sha256, between
from vmcontrol.common.slotfiles import CHECKPOINT, PREVIOUS_CHECKPOINT
from vmwrapper.slot import Slot
from vmwrapper.state.generations import TwoGenerations

VERSION = 2
_FIRST_VERSION = 1
"""Of before a VM's snapshots had entries of their own; still read, so that a running job survives an upgrade."""
SIZE_LIMIT = 1 << 20
"""Bytes. Ours have a few hundred; more than this is no checkpoint."""
Seconds = Annotated[float, between(0, 1e12)]


class Phase(StrEnum):
    """How far the command of a guest task may have come."""

    PREPARING = "preparing"
    """It was never sent with this attempt."""
    SENT = "sent"
    """It may have been sent: only the agent knows what became of it."""


@dataclass(frozen=True, slots=True)
class GuestProgress:
    """The command of the guest task that is being done."""

    task: Count
    """Index in the job."""
    command_id: Name
    attempt: Annotated[int, between(1, 10**9)] = 1
    """Grows after a rollback to a state that does not know the command."""
    phase: Phase = Phase.PREPARING


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """A snapshot of a VM, and the state of the job to which going back to it leads."""

    name: Name
    proven: bool
    """Its guest has answered after it was taken."""
    tasks_done: Count
    current: GuestProgress | None = None
    """The command that ran in the guest; None: between two tasks."""
    cpu_time_s: Seconds = 0.0
    """Of the whole job, as in `Checkpoint`."""
    task_elapsed_s: Seconds = 0.0


@dataclass(frozen=True, slots=True)
class VmRecord:
    """A VM that this slot uses. Written before the VM is made, dropped after it was deleted."""

    virtualmachine: str
    """Its name in the job file."""
    name: Name
    """Its name at the hypervisor."""
    ours: bool = True
    """We make it and delete it. False: it existed before, and stays."""
    snapshots: tuple[SnapshotRecord, ...] = ()
    """What a rollback can lead to, the oldest first; none: the state before the first task on this VM. More than one
    only until the guest has answered after the newest was taken."""
    saved_state_expected: bool = False
    """It was saved when we stopped: another state found at the start is a rollback."""
    discard: bool = False
    """What runs or is saved of it now is not to be gone on with: its guest is dead, or the job went back."""

    @property
    def snapshot(self) -> str:
        """Name of the newest one; empty: there is none."""
        return self.snapshots[-1].name if self.snapshots else ""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a start needs to know to go on."""

    job_digest: Sha256
    """SHA-256 of the job file, hex."""
    result: str = ""
    """Name of the result; empty standalone."""
    inputs_unzipped: bool = False
    """The archives of unzip_input are unpacked."""
    unzip_done: Count = 0
    tasks_done: Count = 0
    outputs_zipped: bool = False
    """The archive of zip_output is written."""
    cpu_time_s: Seconds = 0.0
    """Of all tasks so far, up to this checkpoint."""
    elapsed_s: Seconds = 0.0
    """Un-suspended run time of the job so far."""
    task_elapsed_s: Seconds = 0.0
    """The same of the task that is being done; of a guest task, while its program ran."""
    fraction_done: Annotated[float, between(0, 1)] = 0.0
    snapshots_made: Count = 0
    """Number of the last snapshot; names are never used twice."""
    current: GuestProgress | None = None
    vms: tuple[VmRecord, ...] = ()
    temporary_exits: Mapping[str, Count] = field(default_factory=dict)
    """Temporary exits in a row for each fault, since the last progress."""
    left_running: tuple[Count, ...] = ()
    """Indices of host tasks that are done and whose processes still ran: after a restart these are gone."""
    attempts: Mapping[str, Count] = field(default_factory=dict)
    """The highest attempt that was sent of each guest task, by its index. No rollback takes it back."""
    rollbacks: Count = 0
    """How often the job went back to an older state of a VM."""
    rolled_back_to: Count = 0
    """The last time: the number of the snapshot; 0: the VM was made anew."""

    def vm(self, virtualmachine: str) -> VmRecord | None:
        return next((vm for vm in self.vms if vm.virtualmachine == virtualmachine), None)

    def with_vm(self, record: VmRecord) -> Checkpoint:
        """This checkpoint with `record` in place of the one for the same VM."""
        others = tuple(vm for vm in self.vms if vm.name != record.name)
        return replace(self, vms=(*others, record))

    def without_vm(self, name: str) -> Checkpoint:
        return replace(self, vms=tuple(vm for vm in self.vms if vm.name != name))


def to_bytes(checkpoint: Checkpoint) -> bytes:
    """The file's content."""
    value = {"version": VERSION, **asdict(checkpoint)}
    if not checkpoint.left_running:  # so that versions which do not know it read the file
        del value["left_running"]
    return (json.dumps(value, indent=1) + "\n").encode()


def from_bytes(content: bytes) -> Checkpoint:
    """Read strictly: every field there, of its type and in its range, and nothing else. Raises Damaged."""
    if len(content) > SIZE_LIMIT:
        raise Damaged(f"{len(content)} bytes, more than a checkpoint has")
    value = jsonfile.parse(content)
    version = jsonfile.typed(_Versioned, value).version
    if version not in (_FIRST_VERSION, VERSION):
        raise Damaged(f"version {version}; this program reads {VERSION}")
    value = {"left_running": [], **value}
    del value["version"]
    checkpoint = _from_first_version(value) if version == _FIRST_VERSION else _from_object(value)
    _check(checkpoint)
    return checkpoint


@dataclass(frozen=True, slots=True)
class _Versioned:
    version: Count


def _from_object(value: object) -> Checkpoint:
    return jsonfile.typed(Checkpoint, value, exact=True)


@dataclass(frozen=True, slots=True)
class _FirstVmRecord:
    """Of the first version: a VM has the name of one snapshot, to which the checkpoint belongs; "": it has none."""

    virtualmachine: str
    name: Name
    ours: bool
    saved_state_expected: bool
    snapshot: str


def _from_first_version(value: dict[str, Any]) -> Checkpoint:
    """Raises Damaged."""
    vms = jsonfile.typed(tuple[_FirstVmRecord, ...], value.get("vms"), "vms", exact=True)
    found = _from_object(value | {"vms": [], "attempts": {}, "rollbacks": 0, "rolled_back_to": 0})
    attempts: dict[str, int] = {}
    if (current := found.current) is not None:
        sent = current.attempt if current.phase is Phase.SENT else current.attempt - 1
        attempts = {str(current.task): sent} if sent else {}
    state = (found.tasks_done, current, found.cpu_time_s, found.task_elapsed_s)
    records = (
        VmRecord(
            vm.virtualmachine,
            vm.name,
            vm.ours,
            (SnapshotRecord(vm.snapshot, True, *state),) if vm.snapshot else (),
            vm.saved_state_expected,
        )
        for vm in vms
    )
    return replace(found, attempts=attempts, vms=tuple(records))


def _check(checkpoint: Checkpoint) -> None:
    """That the parts go together. Raises Damaged."""
    left = checkpoint.left_running
    if list(left) != sorted(set(left)):
        raise Damaged(f"left_running is {str(left)[:80]}")
    if left and left[-1] >= checkpoint.tasks_done:
        raise Damaged("left_running has a task that is not done")
    states = [(checkpoint.current, checkpoint.tasks_done)]
    states += [(snapshot.current, snapshot.tasks_done) for vm in checkpoint.vms for snapshot in vm.snapshots]
    for current, done in states:
        if current is not None and current.task != done:
            raise Damaged("current is not the task after those that are done")


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a start found in the slot."""

    checkpoint: Checkpoint | None
    """None: begin at the beginning."""
    complaints: tuple[str, ...] = ()
    """One line each, for stderr.txt."""
    stale_vms: tuple[VmRecord, ...] = ()
    """VMs of a checkpoint that is not this job's: to be removed."""
    is_older: bool = False
    """The newest generation was damaged; this is the one before it."""
    is_damaged: bool = False
    """No generation can be used, and at least one of them is damaged: what it said is not known."""
    is_carried_over: bool = False
    """The job file was edited: the checkpoint is not in the slot yet as it is here."""


@dataclass(frozen=True, slots=True)
class Carried:
    """What of a checkpoint still counts after the job file was edited."""

    checkpoint: Checkpoint
    lines: tuple[str, ...]
    """What begins again, and why; one line each."""
    stale_vms: tuple[VmRecord, ...]
    """VMs whose state is of no use any more."""


class CheckpointStore:
    """The two files in the slot."""

    def __init__(self, slot: Slot) -> None:
        self._files = TwoGenerations(slot.file(CHECKPOINT), slot.file(PREVIOUS_CHECKPOINT), SIZE_LIMIT, from_bytes)

    def exists(self) -> bool:
        """Whether this slot has a checkpoint at all."""
        return self._files.exists()

    def load(
        self, job_digest: str, result: str, carry_over: Callable[[Checkpoint], Carried | None] = lambda _: None
    ) -> Loaded:
        """The newest generation that can be used for this job and result.

        carry_over: what is still good of a checkpoint that this result had with another job file; None: nothing.

        A damaged one is reported and the older used. When both are damaged the job begins at the beginning: what was
        finished is not known any more, and doing it again is right where skipping would not be. What will never be read
        again (a bad sector, something else than a file) counts as damaged. Raises OSError when a file is there and
        cannot be read for a reason that may pass or that somebody can undo.
        """
        damage: list[str] = []
        complaints: list[str] = []
        stale_vms: list[VmRecord] = []
        for path, checkpoint in self._files.readable(damage):
            carried = None
            if checkpoint.result == result and checkpoint.job_digest != job_digest:
                carried = carry_over(checkpoint)
            if carried is not None:
                checkpoint = carried.checkpoint  # noqa: PLW2901
                complaints.extend(carried.lines)
                stale_vms.extend(carried.stale_vms)
            elif (checkpoint.job_digest, checkpoint.result) != (job_digest, result):
                complaints.append(f"{path.name} belongs to another job file or result; it is not used")
                stale_vms.extend(checkpoint.vms)
                continue
            if damage:
                complaints.append(f"going on from the older {path.name}")
            self._files.found_good(path)
            return Loaded(
                checkpoint,
                (*damage, *complaints),
                tuple(stale_vms),
                is_older=bool(damage),
                is_carried_over=carried is not None,
            )
        if damage or complaints:
            complaints.append("no checkpoint of this job can be used: it begins at the beginning")
        return Loaded(None, (*damage, *complaints), tuple(stale_vms), is_damaged=bool(damage))

    def save(self, checkpoint: Checkpoint) -> None:
        """Make this the newest generation. Durable on return; a crash before that leaves an older one to read.

        Raises OSError; the generations that were there then still are.
        """
        self._files.save(to_bytes(checkpoint))
