"""The checkpoint of a slot: what the job has finished, and which state of which VM belongs to it.

Owns `vmwrapper_checkpoint.json` and `vmwrapper_checkpoint.previous.json`. The model is pure and frozen: a new state of
the job is a new `Checkpoint`, and it counts from the moment `CheckpointStore.save` has returned. Never holds what
another part is asked for: the state of a VM, or what became of a command.

    CheckpointDamaged       a file is not a checkpoint of this version; `str` says what is wrong with it
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from vmcontrol.common import jsonfile
from vmcontrol.common.slotfiles import CHECKPOINT, PREVIOUS_CHECKPOINT
from vmwrapper.slot import Slot
from vmwrapper.state.generations import NeverReadable, TwoGenerations

VERSION = 2
_FIRST_VERSION = 1
"""Of before a VM's snapshots had entries of their own; still read, so that a running job survives an upgrade."""
SIZE_LIMIT = 1 << 20
"""Bytes. Ours have a few hundred; more than this is no checkpoint."""


class CheckpointDamaged(Exception):  # noqa: N818 (named for what was found)
    """Not a checkpoint that this version can use."""


class Phase(StrEnum):
    """How far the command of a guest task may have come."""

    PREPARING = "preparing"
    """It was never sent with this attempt."""
    SENT = "sent"
    """It may have been sent: only the agent knows what became of it."""


@dataclass(frozen=True, slots=True)
class GuestProgress:
    """The command of the guest task that is being done."""

    task: int
    """Index in the job."""
    command_id: str
    attempt: int = 1
    """Grows after a rollback to a state that does not know the command."""
    phase: Phase = Phase.PREPARING


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """A snapshot of a VM, and the state of the job to which going back to it leads."""

    name: str
    proven: bool
    """Its guest has answered after it was taken."""
    tasks_done: int
    current: GuestProgress | None = None
    """The command that ran in the guest; None: between two tasks."""
    cpu_time_s: float = 0.0
    """Of the whole job, as in `Checkpoint`."""
    task_elapsed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class VmRecord:
    """A VM that this slot uses. Written before the VM is made, dropped after it was deleted."""

    virtualmachine: str
    """Its name in the job file."""
    name: str
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

    job_digest: str
    """SHA-256 of the job file, hex."""
    result: str = ""
    """Name of the result; empty by hand."""
    inputs_unzipped: bool = False
    """The archives of unzip_input are unpacked."""
    unzip_done: int = 0
    tasks_done: int = 0
    outputs_zipped: bool = False
    """The archive of zip_output is written."""
    cpu_time_s: float = 0.0
    """Of all tasks so far, up to this checkpoint."""
    elapsed_s: float = 0.0
    """Un-suspended run time of the job so far."""
    task_elapsed_s: float = 0.0
    """The same of the task that is being done; of a guest task, while its program ran."""
    fraction_done: float = 0.0
    snapshots_made: int = 0
    """Number of the last snapshot; names are never used twice."""
    current: GuestProgress | None = None
    vms: tuple[VmRecord, ...] = ()
    temporary_exits: Mapping[str, int] = field(default_factory=dict)
    """Temporary exits in a row for each fault, since the last progress."""
    left_running: tuple[int, ...] = ()
    """Indices of host tasks that are done and whose processes still ran: after a restart these are gone."""
    attempts: Mapping[str, int] = field(default_factory=dict)
    """The highest attempt that was sent of each guest task, by its index. No rollback takes it back."""
    rollbacks: int = 0
    """How often the job went back to an older state of a VM."""
    rolled_back_to: int = 0
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
    value: dict[str, Any] = {
        "version": VERSION,
        "job_digest": checkpoint.job_digest,
        "result": checkpoint.result,
        "inputs_unzipped": checkpoint.inputs_unzipped,
        "unzip_done": checkpoint.unzip_done,
        "tasks_done": checkpoint.tasks_done,
        "outputs_zipped": checkpoint.outputs_zipped,
        "cpu_time_s": checkpoint.cpu_time_s,
        "elapsed_s": checkpoint.elapsed_s,
        "task_elapsed_s": checkpoint.task_elapsed_s,
        "fraction_done": checkpoint.fraction_done,
        "snapshots_made": checkpoint.snapshots_made,
        "current": _current_value(checkpoint.current),
        "vms": [
            {
                "virtualmachine": vm.virtualmachine,
                "name": vm.name,
                "ours": vm.ours,
                "snapshots": [
                    {
                        "name": snapshot.name,
                        "proven": snapshot.proven,
                        "tasks_done": snapshot.tasks_done,
                        "current": _current_value(snapshot.current),
                        "cpu_time_s": snapshot.cpu_time_s,
                        "task_elapsed_s": snapshot.task_elapsed_s,
                    }
                    for snapshot in vm.snapshots
                ],
                "saved_state_expected": vm.saved_state_expected,
                "discard": vm.discard,
            }
            for vm in checkpoint.vms
        ],
        "temporary_exits": dict(checkpoint.temporary_exits),
        "attempts": dict(checkpoint.attempts),
        "rollbacks": checkpoint.rollbacks,
        "rolled_back_to": checkpoint.rolled_back_to,
    }
    if checkpoint.left_running:
        value["left_running"] = list(checkpoint.left_running)
    return (json.dumps(value, indent=1) + "\n").encode()


def _current_value(current: GuestProgress | None) -> dict[str, Any] | None:
    if current is None:
        return None
    return {
        "task": current.task,
        "command_id": current.command_id,
        "attempt": current.attempt,
        "phase": current.phase.value,
    }


def from_bytes(content: bytes) -> Checkpoint:
    """Read strictly: every field there, of its type and in its range, and nothing else. Raises CheckpointDamaged."""
    if len(content) > SIZE_LIMIT:
        raise CheckpointDamaged(f"{len(content)} bytes, more than a checkpoint has")
    try:
        value = jsonfile.parse(content)
    except ValueError as error:
        raise CheckpointDamaged(f"not JSON: {error}") from error
    top = _Fields(value, "checkpoint")
    version = top.count("version")
    if version not in (_FIRST_VERSION, VERSION):
        raise CheckpointDamaged(f"version {version}; this program reads {VERSION}")
    old = version == _FIRST_VERSION
    digest = top.text("job_digest")
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise CheckpointDamaged("job_digest is no SHA-256")
    vms = top.listed("vms")
    checkpoint = Checkpoint(
        job_digest=digest,
        result=top.text("result"),
        inputs_unzipped=top.flag("inputs_unzipped"),
        unzip_done=top.count("unzip_done"),
        tasks_done=top.count("tasks_done"),
        outputs_zipped=top.flag("outputs_zipped"),
        cpu_time_s=top.seconds("cpu_time_s"),
        elapsed_s=top.seconds("elapsed_s"),
        task_elapsed_s=top.seconds("task_elapsed_s"),
        fraction_done=top.seconds("fraction_done"),
        snapshots_made=top.count("snapshots_made"),
        current=_read_current(top.value("current")),
        temporary_exits=_read_counts(top.value("temporary_exits"), "temporary_exits"),
        left_running=tuple(top.indices("left_running")) if top.has("left_running") else (),
    )
    if not old:
        checkpoint = replace(
            checkpoint,
            attempts=_read_counts(top.value("attempts"), "attempts"),
            rollbacks=top.count("rollbacks"),
            rolled_back_to=top.count("rolled_back_to"),
        )
    elif (current := checkpoint.current) is not None:
        sent = current.attempt if current.phase is Phase.SENT else current.attempt - 1
        checkpoint = replace(checkpoint, attempts={str(current.task): sent} if sent else {})
    checkpoint = replace(checkpoint, vms=tuple(_read_vm(vm, checkpoint if old else None) for vm in vms))
    top.nothing_else()
    if checkpoint.fraction_done > 1:
        raise CheckpointDamaged(f"fraction_done is {checkpoint.fraction_done}")
    if checkpoint.left_running and checkpoint.left_running[-1] >= checkpoint.tasks_done:
        raise CheckpointDamaged("left_running has a task that is not done")
    if checkpoint.current is not None and checkpoint.current.task != checkpoint.tasks_done:
        raise CheckpointDamaged("current is not the task after those that are done")
    return checkpoint


class _Fields:
    """The fields of one JSON object, each taken once."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise CheckpointDamaged(f"{where} is no object")
        self._left: dict[str, Any] = dict(value)
        self._where = where

    def value(self, name: str) -> Any:
        if name not in self._left:
            raise CheckpointDamaged(f"{self._where} without {name}")
        return self._left.pop(name)

    def _wrong(self, name: str, value: object) -> CheckpointDamaged:
        return CheckpointDamaged(f"{self._where}: {name} is {str(value)[:80]!r}")

    def text(self, name: str) -> str:
        value = self.value(name)
        if not isinstance(value, str):
            raise self._wrong(name, value)
        return value

    def flag(self, name: str) -> bool:
        value = self.value(name)
        if not isinstance(value, bool):
            raise self._wrong(name, value)
        return value

    def count(self, name: str) -> int:
        value = self.value(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 10**9:
            raise self._wrong(name, value)
        return value

    def seconds(self, name: str) -> float:
        value = self.value(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e12 or math.isnan(value):
            raise self._wrong(name, value)
        return float(value)

    def listed(self, name: str) -> list[Any]:
        value = self.value(name)
        if not isinstance(value, list):
            raise self._wrong(name, value)
        return value

    def has(self, name: str) -> bool:
        return name in self._left

    def indices(self, name: str) -> list[int]:
        """Numbers from 0, each larger than the one before it."""
        value = self.listed(name)
        if not all(type(index) is int and 0 <= index <= 10**9 for index in value) or value != sorted(set(value)):
            raise self._wrong(name, value)
        return value

    def nothing_else(self) -> None:
        if self._left:
            raise CheckpointDamaged(f"{self._where} with unknown {', '.join(sorted(self._left))[:80]}")


def _read_current(value: object) -> GuestProgress | None:
    if value is None:
        return None
    fields = _Fields(value, "current")
    try:
        phase = Phase(fields.text("phase"))
    except ValueError as error:
        raise CheckpointDamaged(f"current: {error}") from error
    progress = GuestProgress(fields.count("task"), fields.text("command_id"), fields.count("attempt"), phase)
    fields.nothing_else()
    if progress.attempt < 1 or not progress.command_id:
        raise CheckpointDamaged("current: no attempt or no command_id")
    return progress


def _read_vm(value: object, belongs_to: Checkpoint | None) -> VmRecord:
    """belongs_to: of the first version, in which a VM has the name of one snapshot, to which the checkpoint belongs."""
    fields = _Fields(value, "vm")
    record = VmRecord(
        virtualmachine=fields.text("virtualmachine"),
        name=fields.text("name"),
        ours=fields.flag("ours"),
        saved_state_expected=fields.flag("saved_state_expected"),
    )
    if not record.name:
        raise CheckpointDamaged("vm without a name")
    if belongs_to is None:
        snapshots = tuple(_read_snapshot(one) for one in fields.listed("snapshots"))
        record = replace(record, snapshots=snapshots, discard=fields.flag("discard"))
    elif name := fields.text("snapshot"):
        state = (belongs_to.tasks_done, belongs_to.current, belongs_to.cpu_time_s, belongs_to.task_elapsed_s)
        record = replace(record, snapshots=(SnapshotRecord(name, True, *state),))
    fields.nothing_else()
    return record


def _read_snapshot(value: object) -> SnapshotRecord:
    fields = _Fields(value, "snapshot")
    snapshot = SnapshotRecord(
        name=fields.text("name"),
        proven=fields.flag("proven"),
        tasks_done=fields.count("tasks_done"),
        current=_read_current(fields.value("current")),
        cpu_time_s=fields.seconds("cpu_time_s"),
        task_elapsed_s=fields.seconds("task_elapsed_s"),
    )
    fields.nothing_else()
    if not snapshot.name:
        raise CheckpointDamaged("snapshot without a name")
    if snapshot.current is not None and snapshot.current.task != snapshot.tasks_done:
        raise CheckpointDamaged("snapshot: current is not the task after those that are done")
    return snapshot


def _read_counts(value: object, where: str) -> dict[str, int]:
    if not isinstance(value, dict):
        raise CheckpointDamaged(f"{where} is no object")
    fields = _Fields(value, where)
    return {name: fields.count(name) for name in value}


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a start found in the slot."""

    checkpoint: Checkpoint | None
    """None: begin at the beginning."""
    complaints: tuple[str, ...] = ()
    """One line each, for stderr.txt."""
    strangers: tuple[VmRecord, ...] = ()
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
    strangers: tuple[VmRecord, ...]
    """VMs whose state is of no use any more."""


class CheckpointStore:
    """The two files in the slot."""

    def __init__(self, slot: Slot) -> None:
        self._files = TwoGenerations(slot.file(CHECKPOINT), slot.file(PREVIOUS_CHECKPOINT), SIZE_LIMIT)

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
        complaints: list[str] = []
        strangers: list[VmRecord] = []
        damaged = 0
        for path in self._files.paths:
            try:
                checkpoint = from_bytes(self._files.read(path))
            except FileNotFoundError:
                continue
            except (CheckpointDamaged, NeverReadable) as error:
                damaged += 1
                complaints.append(f"{path.name} is damaged: {error}")
                continue
            carried = None
            if checkpoint.result == result and checkpoint.job_digest != job_digest:
                carried = carry_over(checkpoint)
            if carried is not None:
                checkpoint = carried.checkpoint
                complaints.extend(carried.lines)
                strangers.extend(carried.strangers)
            elif (checkpoint.job_digest, checkpoint.result) != (job_digest, result):
                complaints.append(f"{path.name} belongs to another job file or result; it is not used")
                strangers.extend(checkpoint.vms)
                continue
            if damaged:
                complaints.append(f"going on from the older {path.name}")
            self._files.found_good(path)
            return Loaded(
                checkpoint,
                tuple(complaints),
                tuple(strangers),
                is_older=bool(damaged),
                is_carried_over=carried is not None,
            )
        if complaints:
            complaints.append("no checkpoint of this job can be used: it begins at the beginning")
        return Loaded(None, tuple(complaints), tuple(strangers), is_damaged=bool(damaged))

    def save(self, checkpoint: Checkpoint) -> None:
        """Make this the newest generation. Durable on return; a crash before that leaves an older one to read.

        Raises OSError; the generations that were there then still are.
        """
        self._files.save(to_bytes(checkpoint))
