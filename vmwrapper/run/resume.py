"""What is in the slot at a start: the job file, and what earlier starts have left.

    open_job    the job, and the links of the slot
    resume      the checkpoint that counts

Called before anything runs. They write only what later starts need to know.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, replace

from vmcontrol.common.slotfiles import FINISH_FILE, JOB_FILE, LINKS, TEMPORARY_EXIT_FILE
from vmwrapper.boinc.runtime import Runtime
from vmwrapper.context.logical_names import LogicalNames, guest_has_left_traces
from vmwrapper.errors import BadInput, TemporaryExit
from vmwrapper.job import filenames, parse
from vmwrapper.job.model import Job
from vmwrapper.options import RunOptions
from vmwrapper.run import carryover
from vmwrapper.slot import Slot
from vmwrapper.state.checkpoint import Carried, Checkpoint, CheckpointStore, Loaded, VmRecord

MOST_CPU_S = 1e9
"""More CPU time than a job can have used: thirty years."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenedJob:
    """A job in its slot, before anything of it runs."""

    options: RunOptions
    runtime: Runtime
    slot: Slot
    names: LogicalNames
    job: Job


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where the job goes on."""

    checkpoint: Checkpoint
    is_finished: bool
    """Nothing is left to do or to clean up: only the finish file may be missing."""
    is_first_run: bool
    """There was no checkpoint of this job."""
    stale_vms: tuple[VmRecord, ...]
    """Of another job in this slot."""


def open_job(options: RunOptions, runtime: Runtime, slot: Slot) -> OpenedJob:
    """Read the job file. Raises BadInput, TemporaryExit."""
    names = LogicalNames(slot)
    try:
        for complaint in names.load():
            log.warning("%s", complaint)
    except OSError as error:
        why = f"The slot's list of links cannot be read: {error}"
        raise TemporaryExit(why, fault="checkpoint-file", delay_s=600) from error
    name = str(options.job_file or JOB_FILE)
    job = parse.parse_file(slot.folder / names.resolve(name), name)
    for one in sorted(filenames.written_by_guests(job)):
        if any(names.is_same(one, ours) for ours in (name, *filenames.configurations(job))):
            raise BadInput(f"{name}: a guest's file would be written over {one}, by which this job is run")
    for warning in job.warnings:
        log.warning("%s", warning)
    return OpenedJob(options, runtime, slot, names, job)


def resume(opened: OpenedJob, store: CheckpointStore) -> Resumed:
    """Load the checkpoint, as one of the job file as it is now. Raises BadInput, TemporaryExit."""
    slot, job, data = opened.slot, opened.job, opened.runtime.init_data()

    def carry_over(checkpoint: Checkpoint) -> Carried | None:
        old = carryover.kept_job(slot, checkpoint.job_digest, job.source)
        return None if old is None else carryover.carry_over(old, job, checkpoint)

    try:
        loaded = store.load(job.digest, data.result_name, carry_over)
        if loaded.is_carried_over and loaded.checkpoint is not None:
            store.save(loaded.checkpoint)
    except OSError as error:
        why = f"The checkpoint cannot be read: {error}"
        raise TemporaryExit(why, fault="checkpoint-file", delay_s=600) from error
    job_file = opened.names.resolve(str(opened.options.job_file or JOB_FILE))
    carryover.keep_job(slot, slot.folder / job_file, job.digest)
    for complaint in loaded.complaints:
        log.warning("%s", complaint)
    checkpoint = loaded.checkpoint or Checkpoint(job.digest, data.result_name)
    if checkpoint.tasks_done > len(job.tasks) or checkpoint.unzip_done > len(job.unzip_tasks):
        checkpoint = Checkpoint(job.digest, data.result_name, vms=checkpoint.vms)
    is_finished = _is_finished(job, checkpoint) and store.exists()
    if not is_finished:
        try:
            _find_links_again(opened, checkpoint, loaded)
        except OSError as error:
            why = f"The slot's list of links cannot be written: {error}"
            raise TemporaryExit(why, fault="disk", delay_s=600) from error
        for name in (FINISH_FILE, TEMPORARY_EXIT_FILE):
            with contextlib.suppress(OSError):
                slot.file(name).unlink(missing_ok=True)
        if checkpoint.cpu_time_s < data.wu_cpu_time < MOST_CPU_S:
            # The checkpoint is lost, or older: what was reported to the client stays.
            checkpoint = replace(checkpoint, cpu_time_s=data.wu_cpu_time)
    return Resumed(checkpoint, is_finished, loaded.checkpoint is None, loaded.stale_vms)


def _is_finished(job: Job, checkpoint: Checkpoint) -> bool:
    return (
        checkpoint.tasks_done == len(job.tasks)
        and checkpoint.unzip_done == len(job.unzip_tasks)
        and checkpoint.inputs_unzipped >= bool(job.unzip_inputs)
        and checkpoint.outputs_zipped >= (job.zip_output is not None)
        and not checkpoint.vms
    )


def _find_links_again(opened: OpenedJob, checkpoint: Checkpoint, loaded: Loaded) -> None:
    """A guest may have run and which links there were before is not known: a list was lost, or none was made.

    Raises BadInput, OSError.
    """
    names, job, data = opened.names, opened.job, opened.runtime.init_data()
    if names.established:
        return
    vms = bool(checkpoint.vms or loaded.stale_vms or checkpoint.current or checkpoint.snapshots_made)
    done = any(task.guest is not None for task in job.tasks[: checkpoint.tasks_done])
    unknown = job.needs_vm(0) and (loaded.is_older or loaded.is_damaged)
    if vms or done or unknown or guest_has_left_traces(opened.slot):
        names.recover(
            filenames.mentioned(job),
            filenames.written_by_guests(job),
            project_dir=data.project_dir,
            result=data.result_name,
            why=f"{LINKS} {'is damaged' if names.was_lost else 'is missing'}",
        )
