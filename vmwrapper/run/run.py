"""One run of the wrapper: everything is connected here, and every way to end goes through here.

    run             the program: never returns to its caller
    run_job         the same, returning how the process is to end; for programs that drive us, such as tests

Owns the reactor's run, the signals, and the order of the end: first the programs and VMs, then what is written down,
then the client's files, then we go. `vmwrapper.run.sequence` owns what is done before that, `vmwrapper.run.reports`
what is told.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from twisted.internet.defer import CancelledError, Deferred, DeferredList, FirstError

from vmcontrol.common import frozen, umask, virtualbox
from vmcontrol.common.eventloop import Event, LimitReached, start, start_logged, the_reactor, with_limit
from vmcontrol.common.logthrottle import LAST
from vmcontrol.common.proctable import own_age_s
from vmcontrol.common.slotfiles import FINISH_FILE, JOB_FILE, LINKS, STDERR, TEMPORARY_EXIT_FILE
from vmcontrol.protocol.vmends import VmEnd
from vmwrapper.boinc.runtime import BoincError, InitData, Runtime
from vmwrapper.context.context import JobContext
from vmwrapper.context.control import Control
from vmwrapper.context.logical_names import LogicalNames, guest_has_left_traces
from vmwrapper.context.readiness import Readiness
from vmwrapper.context.timeline import Timeline
from vmwrapper.display import Display
from vmwrapper.errors import Aborted, BadInput, JobError, Quit, TemporaryExit, translate_os_errors
from vmwrapper.exit_status import ExitStatus
from vmwrapper.job import filenames, parse
from vmwrapper.job.macros import Macros
from vmwrapper.job.model import Job
from vmwrapper.log import OUTCOME, set_up, versions
from vmwrapper.options import RunOptions
from vmwrapper.process import leftovers, trees
from vmwrapper.process.patience import ABORT_S, QUIT_S, Patience
from vmwrapper.process.programs import HostPrograms
from vmwrapper.run import carryover, cleanup
from vmwrapper.run.cleanup import delete_vms, remove_vm_files, written
from vmwrapper.run.ending import Ending, counted, failed, leave, temporary_exit
from vmwrapper.run.reports import Reports
from vmwrapper.run.sequence import JobSequence
from vmwrapper.slot import Slot
from vmwrapper.state import reserve
from vmwrapper.state.accounts import Accounts
from vmwrapper.state.checkpoint import Carried, Checkpoint, CheckpointStore, Loaded
from vmwrapper.state.ledger import Ledger

if TYPE_CHECKING:
    from vmwrapper.vm.services import Management

INTERNAL_DELAY_S = 60
MOST_CPU_S = 1e9
"""More CPU time than a job can have used: thirty years."""
_CANCEL_LIMIT_S = 5.0

log = logging.getLogger(__name__)


def run(options: RunOptions) -> NoReturn:
    """Run the job and end the process."""
    leave(run_job(options))


def run_job(options: RunOptions, *, host_main: Sequence[str] | None = None) -> Ending:
    """Run the job in the current directory. host_main: a command in place of our own HostMain (tests)."""
    program_umask = umask.tighten()
    slot = Slot(Path.cwd())
    display = Display()
    stderr_file = set_up(None if options.under_client else slot.file(STDERR), display)
    from vmwrapper.boinc.choose import open_runtime

    try:
        runtime: Runtime = open_runtime(options.boinc_runtime, slot.folder)
    except BoincError as error:
        log.error("%s", error)
        return Ending(ExitStatus.INIT_FAILURE)
    try:
        runtime.init()
    except BoincError as error:
        return temporary_exit(runtime, options, TemporaryExit(str(error), fault="slot-in-use", delay_s=60))
    try:
        versions(runtime.description)
        for warning in options.warnings:
            log.warning("%s", warning)
        names = LogicalNames(slot)
        try:
            for complaint in names.load():
                log.warning("%s", complaint)
            job = _read_job(options, names, slot)
        except JobError as error:
            return failed(runtime, error)
        except OSError as error:
            why = TemporaryExit(
                f"The slot's list of links cannot be read: {error}", fault="checkpoint-file", delay_s=600
            )
            return temporary_exit(runtime, options, why)
        return Run(
            options,
            runtime,
            slot,
            names,
            job,
            display=display,
            stderr_file=stderr_file,
            host_main=host_main,
            program_umask=program_umask,
        ).run()
    finally:
        display.end()
        runtime.close()


def _read_job(options: RunOptions, names: LogicalNames, slot: Slot) -> Job:
    name = str(options.job_file or JOB_FILE)
    job = parse.parse_file(slot.folder / names.resolve(name), name)
    for one in sorted(filenames.written_by_guests(job)):
        if any(names.is_same(one, ours) for ours in (name, *filenames.configurations(job))):
            raise BadInput(f"{name}: a guest's file would be written over {one}, by which this job is run")
    for warning in job.warnings:
        log.warning("%s", warning)
    return job


class Run:
    """The run of one job."""

    def __init__(
        self,
        options: RunOptions,
        runtime: Runtime,
        slot: Slot,
        names: LogicalNames,
        job: Job,
        *,
        display: Display,
        stderr_file: Path | None,
        host_main: Sequence[str] | None,
        program_umask: int,
    ) -> None:
        """program_umask: as we were started, for programs of the job."""
        self._program_umask = program_umask
        self._options = options
        self._runtime = runtime
        self._slot = slot
        self._names = names
        self._job = job
        self._display = display
        self._stderr_file = stderr_file
        self._host_main = host_main
        self._init_data = runtime.init_data()
        self._reactor = the_reactor()
        self._timeline = Timeline(self._reactor, self._reactor.seconds() - own_age_s())
        self._ready = Readiness(self._timeline)
        self._control = Control(runtime, self._reactor)
        self._process_list = leftovers.ProcessList(slot)
        self._store = CheckpointStore(slot)
        self._management: Management | None = None
        self._ending = Ending(ExitStatus.TEMPORARY_BY_HAND)

    def run(self) -> Ending:
        """Everything, on the reactor."""
        try:
            loaded = self._store.load(self._job.digest, self._init_data.result_name, self._carry_over)
            if loaded.is_carried_over and loaded.checkpoint is not None:
                self._store.save(loaded.checkpoint)
        except OSError as error:
            why = TemporaryExit(f"The checkpoint cannot be read: {error}", fault="checkpoint-file", delay_s=600)
            return temporary_exit(self._runtime, self._options, why)
        job_file = self._names.resolve(str(self._options.job_file or JOB_FILE))
        carryover.keep_job(self._slot, self._slot.folder / job_file, self._job.digest)
        for complaint in loaded.complaints:
            log.warning("%s", complaint)
        checkpoint = loaded.checkpoint or Checkpoint(self._job.digest, self._init_data.result_name)
        if checkpoint.tasks_done > len(self._job.tasks) or checkpoint.unzip_done > len(self._job.unzip_tasks):
            checkpoint = Checkpoint(self._job.digest, self._init_data.result_name, vms=checkpoint.vms)
        if self._is_finished(checkpoint):
            log.info("this slot is finished already")
            return self._finished()
        try:
            self._find_links_again(checkpoint, loaded)
        except BadInput as error:
            return failed(self._runtime, error)
        except OSError as error:
            why = TemporaryExit(f"The slot's list of links cannot be written: {error}", fault="disk", delay_s=600)
            return temporary_exit(self._runtime, self._options, why)
        for name in (FINISH_FILE, TEMPORARY_EXIT_FILE):
            with contextlib.suppress(OSError):
                self._slot.file(name).unlink(missing_ok=True)
        told_s = self._init_data.wu_cpu_time
        if checkpoint.cpu_time_s < told_s < MOST_CPU_S:  # the checkpoint is lost, or older: what was told stays told
            checkpoint = replace(checkpoint, cpu_time_s=told_s)
        self._wire(checkpoint, loaded)
        self._reactor.callWhenRunning(self._begin)
        self._reactor.run()
        return self._ending

    def _carry_over(self, checkpoint: Checkpoint) -> Carried | None:
        old = carryover.kept_job(self._slot, checkpoint.job_digest, self._job.source)
        return None if old is None else carryover.carry_over(old, self._job, checkpoint)

    def _find_links_again(self, checkpoint: Checkpoint, loaded: Loaded) -> None:
        """A guest may have run and which links there were before is not known: a list was lost, or none was made.

        Raises BadInput, OSError.
        """
        if self._names.established:
            return
        vms = bool(checkpoint.vms or loaded.strangers or checkpoint.current or checkpoint.snapshots_made)
        done = any(task.guest is not None for task in self._job.tasks[: checkpoint.tasks_done])
        unknown = self._job.needs_vm(0) and (loaded.is_older or loaded.is_damaged)
        if vms or done or unknown or guest_has_left_traces(self._slot):
            self._names.recover(
                filenames.mentioned(self._job),
                filenames.written_by_guests(self._job),
                project_dir=self._init_data.project_dir,
                result=self._init_data.result_name,
                why=f"{LINKS} {'is damaged' if self._names.was_lost else 'is missing'}",
            )

    def _is_finished(self, checkpoint: Checkpoint) -> bool:
        """Nothing is left to do or to clean up: only the finish file may be missing."""
        return (
            checkpoint.tasks_done == len(self._job.tasks)
            and checkpoint.unzip_done == len(self._job.unzip_tasks)
            and checkpoint.inputs_unzipped >= bool(self._job.unzip_inputs)
            and checkpoint.outputs_zipped >= (self._job.zip_output is not None)
            and not checkpoint.vms
            and self._store.exists()
        )

    def _finished(self) -> Ending:
        if not self._slot.file(FINISH_FILE).exists():
            try:
                self._runtime.finish(0)
            except (OSError, BoincError) as error:
                why = TemporaryExit(f"The finish file cannot be written: {error}", fault="finish-file", delay_s=600)
                return temporary_exit(self._runtime, self._options, why)
        return Ending(ExitStatus.DONE)

    # --- wiring

    def _wire(self, checkpoint: Checkpoint, loaded: Loaded) -> None:
        """All objects are made and connected here."""
        accounts = self._accounts = Accounts(
            self._control.work_clock,
            cpu_time_s=checkpoint.cpu_time_s,
            elapsed_s=checkpoint.elapsed_s,
            task_elapsed_s=checkpoint.task_elapsed_s,
        )
        self._ledger = Ledger(self._store, checkpoint, accounts)
        self._host_programs = HostPrograms(
            self._reactor,
            self._process_list.token,
            note_group=self._process_list.note_group,
            stop_signal=getattr(signal, "SIGTSTP", None) if self._options.use_tstp else None,
        )
        accounts.count_host(self._host_programs.cpu_time_s)
        self._control.listen(self._host_programs.set_suspended)
        context = JobContext(
            reactor=self._reactor,
            source=self._job.source,
            slot_folder=self._slot.folder,
            names=self._names,
            program_umask=self._program_umask,
            environment=dict(os.environ),
            stderr_file=self._stderr_file,
            control=self._control,
            ledger=self._ledger,
            accounts=accounts,
            timeline=self._timeline,
            process_list=self._process_list,
            host_programs=self._host_programs,
            init_data=self._init_data,
            macros=self._macros(),
            time_to_checkpoint=self._runtime.time_to_checkpoint,
            checkpoint_completed=self._runtime.checkpoint_completed,
            checkpoint_abandoned=self._runtime.end_critical_section,
        )
        self._sequence = JobSequence(
            context,
            self._job,
            extra_args=self._options.extra_args,
            passed_args=self._options.passed_args,
            under_client=self._options.under_client,
            init_data=self._init_data,
            nthreads=self._options.nthreads,
            make_management=lambda: self._make_management(fresh=loaded.checkpoint is None),
            ready=self._ready,
            strangers=loaded.strangers,
        )
        self._sequence.cpu_share = lambda: cpu_share(self._init_data)
        self._control.on_network = self._on_network
        self._control.on_preferences = self._on_preferences
        self._reports = Reports(
            self._runtime,
            self._slot,
            self._job,
            context,
            options=self._options,
            sequence=self._sequence,
            display=self._display,
            waits_for=self._waits_for,
        )
        self._ledger.fraction = self._reports.fraction

    def _waits_for(self) -> str:
        if self._management is None or self._management.is_ending:
            return ""
        stage = str(self._ready)
        return stage if "waiting" in stage else ""

    def _macros(self) -> Macros:
        """samples/wrapper/wrapper.cpp, macro_substitute: the client's device comes before --device."""
        device = self._init_data.gpu_device_num
        if device < 0 and self._options.device is not None:
            device = self._options.device
        return Macros(
            project_dir=str(self._init_data.project_dir or "."),
            nthreads=1 if self._options.nthreads is None else self._options.nthreads,
            pwd=str(self._slot.folder),
            gpu_device_num=device,
        )

    def _make_management(self, *, fresh: bool) -> Management:
        from vmwrapper.vm.services import Management, make_secret

        with translate_os_errors("The slot cannot be written", fault="checkpoint-file"):
            make_secret(self._slot, anew=fresh)
        wanted = [task.guest.hypervisor for task in self._job.tasks if task.guest and task.guest.hypervisor != "auto"]
        self._management = Management(
            self._reactor,
            slot=self._slot,
            source=self._job.source,
            tasks=self._job.vmmanage_tasks,
            names=self._names,
            control=self._control,
            process_list=self._process_list,
            ready=self._ready,
            hypervisor=wanted[0] if wanted else "auto",
            disk_bound=self._init_data.rsc_disk_bound,
            host_main=self._host_main,
        )
        self._ledger.on_progress = self._management.forgive_deaths
        self._management.on_hypervisor = self._on_hypervisor
        start_logged(self._watch_management(self._management), "VMmanage tasks")
        return self._management

    async def _watch_management(self, management: Management) -> None:
        await management.failed.wait()
        self._work.cancel()

    # --- the run

    def _begin(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            signal.signal(number, self._on_signal)
        if self._virtualbox_may_run():
            trees.adopt_nothing()
        else:
            trees.become_subreaper()
        self._control.start()
        start_logged(self._whole(), "the run").addBoth(lambda _: self._reactor.stop())

    def _virtualbox_may_run(self) -> bool:
        """Whether VirtualBox's service may be started for this job; then we adopt nothing until another one is used.

        That service makes itself an orphan, runs the VMs of all slots, and is not ours. Adopted by us it would be this
        task's to the client, with all those VMs: in its accounts, and in what it kills when the task has quit.
        """
        now = self._ledger.now
        if not self._job.needs_vm(now.tasks_done) and not now.vms and not self._sequence.has_strangers:
            return False
        if any(task.guest and task.guest.hypervisor == "qemu" for task in self._job.tasks):
            return False
        return virtualbox.program() is not None

    @staticmethod
    def _on_hypervisor(name: str) -> None:
        """VirtualBox's service, if it was asked for its opinion, is somebody else's child by now."""
        if name != "VirtualBox":
            trees.become_subreaper()

    def _on_signal(self, number: int, _frame: object) -> None:
        why = Quit(f"signal {signal.Signals(number).name}", by_signal=number)
        self._reactor.callFromThread(self._control.ask_to_end, why)

    async def _whole(self) -> None:
        outcome: Exception | None = None
        try:
            outcome = await self._until_outcome()
            if isinstance(outcome, TemporaryExit):
                outcome = counted(self._ledger, self._slot, outcome)
            self._ending = await self._end(outcome)
        except CancelledError:
            raise
        except Exception as error:
            log.exception("internal error while ending")
            if not isinstance(outcome, JobError | TemporaryExit):
                outcome = counted(self._ledger, self._slot, _internal(error))
            self._ending = self._told(outcome)
        finally:
            self._control.stop()

    def _told(self, outcome: JobError | TemporaryExit) -> Ending:
        if isinstance(outcome, JobError):
            return failed(self._runtime, outcome)
        return temporary_exit(self._runtime, self._options, outcome)

    async def _until_outcome(self) -> Exception | None:
        """Do the work until it is done (None), has failed, or is to end."""
        self._work: Deferred[Any] = start(self._do_work())
        asked: Deferred[Any] = start(_wait(self._control.end_asked.wait()))
        try:
            await DeferredList([self._work, asked], fireOnOneCallback=True, fireOnOneErrback=True, consumeErrors=True)
        except FirstError as error:
            failure = error.subFailure.value
            if isinstance(failure, CancelledError) and self._management is not None:
                try:
                    self._management.raise_failure()
                except Exception as reason:  # noqa: BLE001 (this is the outcome, whatever it is)
                    return reason
            if not isinstance(failure, Exception):
                raise
            return self._judged(failure)
        finally:
            asked.cancel()
        if self._control.ending is None:
            return None
        self._work.cancel()
        with contextlib.suppress(Exception):
            await with_limit(self._reactor, _CANCEL_LIMIT_S, "the work in hand", self._settled(self._work))
        return self._control.ending

    async def _settled(self, work: Deferred[Any]) -> None:
        await DeferredList([work], consumeErrors=True)

    def _judged(self, failure: Exception) -> Exception:
        if self._control.ending is not None:
            return self._control.ending  # what fails while everything is being ended is no failure of the job
        if isinstance(failure, JobError | TemporaryExit):
            return failure
        log.error("internal error", exc_info=failure)
        return _internal(failure)

    async def _do_work(self) -> None:
        await leftovers.clear(self._reactor, self._slot)
        for name in frozen.remove_stale(self._slot.folder):
            log.info("removed %s, which a killed run had unpacked", name)
        with translate_os_errors("The slot cannot be written", fault="checkpoint-file"):
            self._process_list.begin()
        reserve.keep(self._slot)
        self._reports.start()
        await self._sequence.run()

    def _on_preferences(self) -> None:
        """init_data.xml was written anew."""
        self._init_data = self._runtime.reread_init_data()
        log.info("preferences have changed: %g %% of the processors' time", self._init_data.cpu_usage_limit)
        machine = self._sequence.machine
        if machine is not None:
            machine.set_cpu_share(cpu_share(self._init_data))

    def _on_network(self, suspended: bool) -> None:
        machine = self._sequence.machine
        if machine is not None:
            start_logged(machine.set_network(connected=not suspended), "network of the VM")

    # --- ends

    async def _end(self, outcome: Exception | None) -> Ending:
        match outcome:
            case None:
                return await self._end_done()
            case JobError():
                await self._end_everything(save=False)
                self._reports.report_used()
                return self._told(outcome)
            case Aborted():
                await self._end_everything(save=False)
                self._reports.report_used()
                self._runtime.deliver()
                return Ending(ExitStatus.ABORTED_BY_CLIENT)
            case TemporaryExit():
                await self._end_everything(save=True)
                return self._told(outcome)
            case Quit():
                await self._end_everything(save=True)
                if isinstance(self._control.ending, Aborted):  # the client has changed its mind meanwhile
                    remove_vm_files(self._slot, self._ledger)
                    return Ending(ExitStatus.ABORTED_BY_CLIENT)
                return Ending(ExitStatus.DONE, outcome.by_signal)
            case _:
                raise outcome

    async def _end_done(self) -> Ending:
        await self._end_everything(save=False)
        self._timeline.mark("done")
        written(lambda: self._ledger.progressed(self._ledger.now))
        self._reports.report_done()
        for line in self._sequence.output_links.complaints():
            log.warning("%s", line, extra=LAST)
        log.info("done: %s", self._timeline, extra=OUTCOME)
        try:
            self._runtime.finish(0)
        except (OSError, BoincError) as error:
            why = TemporaryExit(f"The finish file cannot be written: {error}", fault="finish-file", delay_s=600)
            return temporary_exit(self._runtime, self._options, why)
        return Ending(ExitStatus.DONE)

    async def _end_everything(self, *, save: bool) -> None:
        """All programs and VMs; what the next start has to know is written down before this returns."""
        patience = self._control.patience or Patience(self._reactor, QUIT_S if save else ABORT_S)
        if not save:
            self._reports.stop()
        _, ends = await _together(self._end_programs(patience), self._end_vms(patience, save=save))
        self._accounts.settle()
        self._reports.stop()
        trees.end_orphans(self._process_list.token, everything=True)
        self._host_programs.close()
        if save:
            written(lambda: self._write_saved(ends))
        else:
            remove_vm_files(self._slot, self._ledger)
            reserve.give_up(self._slot)
        self._process_list.end()

    async def _end_programs(self, patience: Patience) -> None:
        """Those on the host: the task's first, for it may need the others in order to save."""
        program, over = self._sequence.host_program, Event()

        async def end_task() -> None:
            try:
                if program is not None:
                    await program.end(patience)
            finally:
                over.set()

        async def end_others() -> None:
            with contextlib.suppress(LimitReached):
                await with_limit(self._reactor, patience.others_s(), "the task's end", over.wait())
            await _together(self._sequence.left.end(patience), self._sequence.host_side.end_daemons(patience))

        await _together(end_task(), end_others())

    async def _end_vms(self, patience: Patience, *, save: bool) -> Mapping[str, VmEnd]:
        """VMs and VMmanage tasks; what HostMain says of each VM, by name."""
        if not save:
            await delete_vms(self._reactor, self._management, self._ledger)
        if self._management is None:
            return {}
        return await self._management.end(save=save, limit_s=patience.left_s)

    def _write_saved(self, ends: Mapping[str, VmEnd]) -> None:
        """What is kept: all of it, unless the VM of the task in hand was not saved: then what its snapshot holds."""
        now = self._ledger.now
        running = self._sequence.machine
        live = running.name if running is not None and running.is_live else ""
        kept = cleanup.after_the_end(now, ends, live, lost_s=self._accounts.cpu_time_s - now.cpu_time_s)
        for line in kept.saved:
            log.info("%s", line)
        for line in kept.lost:
            log.warning("%s", line)
        if running is None or cleanup.was_saved(ends, running.record):
            self._ledger.saved(kept.checkpoint, task_goes_on=self._sequence.host_task is None)
        elif kept.checkpoint != now:
            self._ledger.keep(kept.checkpoint)
        self._reports.report()  # the client's next start begins with the CPU time of the last one that it knows
        self._runtime.deliver()


def cpu_share(data: InitData) -> int:
    """Percent of its processors that a VM may use, 1 to 100.

    The client throttles all other programs itself, by suspending them for parts of each second. Those whose plan class
    says VirtualBox it leaves alone (client/client_types.cpp, RESULT::dont_throttle): they cap their VM.
    """
    if "vbox" not in data.plan_class:
        return 100
    return max(1, min(100, round(data.cpu_usage_limit)))


def _internal(error: Exception) -> TemporaryExit:
    """A fault of ours: perhaps it does not come again."""
    why = f"Internal error: {type(error).__name__}: {error}"
    return TemporaryExit(why, fault="internal", delay_s=INTERNAL_DELAY_S)


async def _together(*works: Coroutine[Deferred[Any], Any, object]) -> list[Any]:
    """Side by side, each to its end; their results. Raises what one of them raised."""
    outcomes: Any = await DeferredList([start(work) for work in works], consumeErrors=True)
    for good, value in outcomes:
        if not good:
            raise value.value
    return [value for _, value in outcomes]


async def _wait(deferred: Deferred[None]) -> None:
    await deferred
