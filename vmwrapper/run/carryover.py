"""A job file that was edited between two starts: how much of what is done still counts. Pure, but for the kept copy.

What a task means counts, not how the file says it: a comment, white space, the order of elements, tasks that were
appended change nothing of what is done. From the first task that means something else the job is done again, and so
are all tasks on a virtual machine whose state has seen such a task. To know what the file said before, a copy of it is
kept in the slot; the checkpoint names the file that it was written for by its SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from vmcontrol.common.atomicfile import write_atomically
from vmcontrol.common.slotfiles import JOB_COPY
from vmwrapper.errors import BadInput
from vmwrapper.job import meaning, parse
from vmwrapper.job.model import Job, Program
from vmwrapper.slot import Slot
from vmwrapper.state.checkpoint import Carried, Checkpoint, VmRecord

log = logging.getLogger(__name__)


def carry_over(old: Job, new: Job, checkpoint: Checkpoint) -> Carried:
    """The checkpoint of the old job file as one of the new."""
    lines: list[str] = []
    unzip_done = _still_done("unzip task", old.unzip_tasks, new.unzip_tasks, checkpoint.unzip_done, lines)
    inputs_unzipped = checkpoint.inputs_unzipped and set(new.unzip_inputs) <= set(old.unzip_inputs)
    if checkpoint.inputs_unzipped > inputs_unzipped:
        lines.append("<unzip_input> has changed: its archives are unpacked")
    done = _still_done("task", old.tasks, new.tasks, checkpoint.tasks_done, lines)
    goes_on = done == checkpoint.tasks_done and _is_same(old.tasks, new.tasks, done)
    if done == checkpoint.tasks_done < len(new.tasks) and not goes_on and done < len(old.tasks):
        lines.append(f"task {done + 1} has changed ({_what(old.tasks[done], new.tasks[done])}): it begins again")
    vms = list(checkpoint.vms)
    stale_vms: list[VmRecord] = []
    while (lost := next((vm for vm in vms if not _is_good(vm, old, new, checkpoint, done, goes_on)), None)) is not None:
        vms.remove(lost)
        stale_vms.append(lost)
        first = _first_on(lost.virtualmachine, new)
        if first is not None and first < done:
            lines.append(f"the state of the virtual machine {lost.virtualmachine} is gone: back to task {first + 1}")
            done = first
        goes_on = goes_on and done == checkpoint.tasks_done
    keeps_command = goes_on and checkpoint.current is not None and bool(vms)
    carried = replace(
        checkpoint,
        job_digest=new.digest,
        inputs_unzipped=inputs_unzipped,
        unzip_done=unzip_done,
        tasks_done=done,
        outputs_zipped=checkpoint.outputs_zipped and done == len(new.tasks) and old.zip_output == new.zip_output,
        task_elapsed_s=checkpoint.task_elapsed_s if goes_on else 0.0,
        current=checkpoint.current if keeps_command else None,
        vms=tuple(vms),
        left_running=tuple(index for index in checkpoint.left_running if index < done),
    )
    lines.insert(0, f"{new.source} was edited since the last start: tasks that are done stay done: {done}")
    return Carried(carried, tuple(lines), tuple(stale_vms))


def _still_done(kind: str, old: Sequence[Program], new: Sequence[Program], done: int, lines: list[str]) -> int:
    """How many of those that were done are there and mean the same."""
    same = sum(1 for _ in takewhile(lambda index: _is_same(old, new, index), range(min(done, len(old)))))
    if same == len(new) < done:
        lines.append(f"there are only {same} of the {done} {kind}s that were done")
    elif same < done:
        what = _what(old[same], new[same]) if same < min(len(old), len(new)) else kind
        lines.append(f"{kind} {same + 1} has changed ({what}): from it on all begin again")
    return same


def _is_same(old: Sequence[Program], new: Sequence[Program], index: int) -> bool:
    return index < min(len(old), len(new)) and not meaning.differences(old[index], new[index])


def _what(old: Program, new: Program) -> str:
    return ", ".join(f"<{element}>" for element in meaning.differences(old, new)) or "task"


def _is_good(  # noqa: PLR0917 (of one caller)
    vm: VmRecord, old: Job, new: Job, checkpoint: Checkpoint, done: int, goes_on: bool
) -> bool:
    """Whether its state has seen only tasks that are still done, and the one that goes on, and it has all its disks."""
    if _containers(vm, old) != _containers(vm, new):
        return False
    seen = [
        index
        for index, task in enumerate(old.tasks[: checkpoint.tasks_done + 1])
        if task.guest is not None and task.guest.virtualmachine == vm.virtualmachine
    ]
    return all(index < done or (goes_on and index == done) for index in seen)


def _containers(vm: VmRecord, job: Job) -> list[str]:
    """The disks that it has besides its image."""
    guests = (task.guest for task in job.tasks if task.guest is not None)
    found = dict.fromkeys(guest.container for guest in guests if guest.virtualmachine == vm.virtualmachine)
    return [name for name in found if name]


def _first_on(virtualmachine: str, job: Job) -> int | None:
    return next(
        (
            index
            for index, task in enumerate(job.tasks)
            if task.guest is not None and task.guest.virtualmachine == virtualmachine
        ),
        None,
    )


# --- the copy


def kept_job(slot: Slot, digest: str, source: str) -> Job | None:
    """The job file as it was, of this SHA-256; None when it is not known any more."""
    try:
        found = parse.examine_file(slot.file(JOB_COPY), source)
    except BadInput:
        return None
    return found.job if found.job is not None and found.job.digest == digest else None


def keep_job(slot: Slot, path: Path, digest: str) -> None:
    """Keep a copy of the job file, unless it is there already. It is missed only when somebody edits the file."""
    target = slot.file(JOB_COPY)
    try:
        with contextlib.suppress(OSError), target.open("rb") as kept:
            if hashlib.file_digest(kept, "sha256").hexdigest() == digest:
                return
        with path.open("rb") as file:
            content = file.read(parse.MAX_BYTES)
        if hashlib.sha256(content).hexdigest() == digest:
            write_atomically(target, content)
    except OSError as error:
        log.warning("no copy of the job file can be kept (%s): if it is edited, all begins again", error.strerror)
