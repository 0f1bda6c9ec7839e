"""One run of the wrapper: everything is connected here, and every way to end goes through here.

    run             the program: never returns to its caller
    run_job         the same, returning how the process is to end; for programs that drive us, such as tests

Owns the reactor's run, the signals, the reports to the client, and the order of the end: first the programs and VMs,
then what is written down, then the client's files, then we go. `vmwrapper.sequence` owns what is done before that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from twisted.internet.defer import CancelledError, Deferred, DeferredList, FirstError
from twisted.internet.task import LoopingCall

from vmcontrol import frozen
from vmcontrol.eventloop import LimitReached, start, start_logged, the_reactor, with_limit
from vmwrapper import leftovers, names, processes, reserve
from vmwrapper.accounts import Accounts, FractionDone
from vmwrapper.arguments import RunOptions
from vmwrapper.boinc.api import AppStatus, BoincError, InitData, Runtime
from vmwrapper.checkpoint import Checkpoint, CheckpointStore, Loaded
from vmwrapper.control import Control
from vmwrapper.errors import Aborted, JobError, Quit, SubTaskFailed, TemporaryExit
from vmwrapper.exitcodes import ExitStatus
from vmwrapper.hostgroup import HostPrograms
from vmwrapper.job import parse
from vmwrapper.job.macros import Macros
from vmwrapper.job.model import Job
from vmwrapper.ledger import Ledger
from vmwrapper.log import flush, set_up, versions
from vmwrapper.messages import Messages
from vmwrapper.progress import Display, Timeline
from vmwrapper.readiness import Readiness
from vmwrapper.sequence import JobSequence
from vmwrapper.slot import FINISH_FILE, JOB_FILE, STDERR, TEMPORARY_EXIT_FILE, Slot
from vmwrapper.surroundings import Surroundings
from vmwrapper.telling import GraphicsStatus, SporadicFiles, Teller

if TYPE_CHECKING:
    from vmwrapper.guesttask import GuestTask
    from vmwrapper.machine import Machine
    from vmwrapper.vmmanage import Management

REPORT_S = 1.0
FIRST_FRACTION = 0.001
"""Told while a VM boots, as vboxwrapper does: at 0 the client shows an estimate, and goes back at our first figure."""
TEMPORARY_EXIT_LIMIT = 5
"""For the same fault in a row; then the job has failed (208)."""
INTERNAL_DELAY_S = 60
DELETE_LIMIT_S = 15.0
"""For deleting the VMs at a failure or an abort; what is left then is removed with its files."""
_CANCEL_LIMIT_S = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ending:
    """How the process is to end: with a status, or, by hand or at TERM, by a signal."""

    status: int
    by_signal: int | None = None


def run(options: RunOptions) -> NoReturn:
    """Run the job and end the process."""
    leave(run_job(options))


def leave(ending: Ending) -> NoReturn:
    """End the process as asked for."""
    flush()
    frozen.end()
    if ending.by_signal is not None and os.name == "posix":
        signal.signal(ending.by_signal, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {ending.by_signal})
        os.kill(os.getpid(), ending.by_signal)
    os._exit(ending.status)  # all is written and flushed; Python's own clean-up would only cost time


def run_job(options: RunOptions, *, host_main: Sequence[str] | None = None) -> Ending:
    """Run the job in the current directory. host_main: a command in place of our own HostMain (tests)."""
    slot = Slot(Path.cwd())
    display = Display()
    set_up(None if options.under_client else slot.file(STDERR), display)
    from vmwrapper.boinc.choose import open_runtime

    try:
        runtime: Runtime = open_runtime(options.boinc_runtime, slot.folder)
    except BoincError as error:
        log.error("%s", error)
        return Ending(ExitStatus.INIT_FAILURE)
    try:
        runtime.init()
    except BoincError as error:
        return _temporary_exit(runtime, options, TemporaryExit(str(error), fault="slot-in-use", delay_s=60))
    try:
        versions(runtime.description)
        try:
            job = _read_job(options, runtime, slot)
        except JobError as error:
            return _failed(runtime, error)
        return Run(options, runtime, slot, job, display=display, host_main=host_main).run()
    finally:
        display.end()
        runtime.close()


def _read_job(options: RunOptions, runtime: Runtime, slot: Slot) -> Job:
    path = runtime.resolve_filename(str(options.job_file or JOB_FILE))
    job = parse.parse(parse.read(slot.folder / path), str(options.job_file or JOB_FILE))
    for warning in job.warnings:
        log.warning("%s", warning)
    return job


def _failed(runtime: Runtime, error: JobError) -> Ending:
    log.error("%s", error)
    try:
        runtime.finish(int(error.status), str(error))
    except (OSError, BoincError) as trouble:
        log.error("the finish file cannot be written: %s", trouble)
    return Ending(int(error.status))


def _temporary_exit(runtime: Runtime, options: RunOptions, why: TemporaryExit) -> Ending:
    if not options.under_client:
        log.error("temporary exit, try again in %d s: %s", why.delay_s, why.reason)
        return Ending(ExitStatus.TEMPORARY_BY_HAND)
    log.error("temporary exit for %d s: %s", why.delay_s, why.reason)
    try:
        reserve.write_with(Slot(Path.cwd()), lambda: runtime.temporary_exit(why.delay_s, why.reason))
    except (OSError, BoincError) as error:
        log.error("the temporary-exit file cannot be written: %s", error)
        return Ending(ExitStatus.STATEFILE_WRITE)
    return Ending(ExitStatus.DONE)


class Run:
    """The run of one job."""

    def __init__(
        self,
        options: RunOptions,
        runtime: Runtime,
        slot: Slot,
        job: Job,
        *,
        display: Display,
        host_main: Sequence[str] | None,
    ) -> None:
        self._options = options
        self._runtime = runtime
        self._slot = slot
        self._job = job
        self._display = display
        self._host_main = host_main
        self._init_data = runtime.init_data()
        self._reactor = the_reactor()
        self._timeline = Timeline(self._reactor)
        self._ready = Readiness(self._timeline)
        self._control = Control(runtime, self._reactor)
        self._process_list = leftovers.ProcessList(slot)
        self._store = CheckpointStore(slot)
        self._management: Management | None = None
        self._ending = Ending(ExitStatus.TEMPORARY_BY_HAND)

    def run(self) -> Ending:
        """Everything, on the reactor."""
        try:
            loaded = self._store.load(self._job.digest, self._init_data.result_name)
        except OSError as error:
            why = TemporaryExit(f"The checkpoint cannot be read: {error}", fault="checkpoint-file", delay_s=600)
            return _temporary_exit(self._runtime, self._options, why)
        for complaint in loaded.complaints:
            log.warning("%s", complaint)
        checkpoint = loaded.checkpoint or Checkpoint(self._job.digest, self._init_data.result_name)
        if checkpoint.tasks_done > len(self._job.tasks) or checkpoint.unzip_done > len(self._job.unzip_tasks):
            checkpoint = Checkpoint(self._job.digest, self._init_data.result_name, vms=checkpoint.vms)
        if self._is_finished(checkpoint):
            log.info("this slot is finished already")
            return self._finished()
        for name in (FINISH_FILE, TEMPORARY_EXIT_FILE):
            with contextlib.suppress(OSError):
                self._slot.file(name).unlink(missing_ok=True)
        self._wire(checkpoint, loaded)
        self._reactor.callWhenRunning(self._begin)
        self._reactor.run()
        return self._ending

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
                return _temporary_exit(self._runtime, self._options, why)
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
        self._ledger.fraction = self._fraction
        self._fraction_done = FractionDone([task.weight for task in self._job.tasks], checkpoint.fraction_done)
        self._host_programs = HostPrograms(
            self._reactor,
            self._process_list.token,
            note_group=self._process_list.note_group,
            stop_signal=getattr(signal, "SIGTSTP", None) if self._options.use_tstp else None,
        )
        self._control.listen(self._host_programs.set_suspended)
        around = Surroundings(
            reactor=self._reactor,
            source=self._job.source,
            slot_folder=self._slot.folder,
            resolve=self._runtime.resolve_filename,
            environment=dict(os.environ),
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
            around,
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
        self._teller = Teller(
            self._runtime,
            accounts,
            trickle_period_s=self._options.trickle_s or self._job.trickle_up_period_s,
            graphics=GraphicsStatus(self._slot.folder) if self._job.enable_graphics_support else None,
            sporadic=SporadicFiles(self._slot.folder, self._runtime) if self._options.sporadic else None,
            fraction=self._fraction,
            status=lambda: self._control.status,
        )
        self._sequence.cpu_share = lambda: cpu_share(self._init_data)
        self._reports = LoopingCall(self._report)
        self._reports.clock = self._reactor
        self._control.on_network = self._on_network
        self._control.on_preferences = self._on_preferences
        self._messages = Messages(
            self._runtime,
            self._reactor,
            self._slot,
            uploads=self._job.intermediate_upload_files,
            with_snapshots=bool(self._options.trickle_s or self._job.trickle_up_period_s),
            guest=self._running_guest,
            figures=lambda: (self._ledger.now.snapshots_made, self._accounts.cpu_time_s, self._fraction()),
        )
        self._remote_desktop = ""
        self._least_fraction = FIRST_FRACTION if _tells_its_progress(self._job) else 0.0

    def _macros(self) -> Macros:
        """samples/wrapper/wrapper.cpp, macro_substitute: the client's device comes before --device."""
        device = self._init_data.gpu_device_num
        if device < 0 and self._options.device is not None:
            device = self._options.device
        return Macros(
            project_dir=str(self._init_data.project_dir or "."),
            nthreads=self._options.nthreads or 1,
            pwd=str(self._slot.folder),
            gpu_device_num=device,
        )

    def _make_management(self, *, fresh: bool) -> Management:
        from vmwrapper.vmmanage import Management, make_secret

        try:
            make_secret(self._slot, anew=fresh)
        except OSError as error:
            raise TemporaryExit(
                f"The slot cannot be written ({error.strerror})", fault="checkpoint-file", delay_s=600
            ) from error
        wanted = [task.guest.hypervisor for task in self._job.tasks if task.guest and task.guest.hypervisor != "auto"]
        self._management = Management(
            self._reactor,
            slot=self._slot,
            tasks=self._job.vmmanage_tasks,
            resolve=self._runtime.resolve_filename,
            control=self._control,
            process_list=self._process_list,
            ready=self._ready,
            hypervisor=wanted[0] if wanted else "auto",
            host_main=self._host_main,
        )
        start_logged(self._watch_management(self._management), "VMmanage tasks")
        return self._management

    async def _watch_management(self, management: Management) -> None:
        await management.failed.wait()
        self._work.cancel()

    # --- the run

    def _begin(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            signal.signal(number, self._on_signal)
        if not self._virtualbox_may_run():
            processes.become_subreaper()
        self._control.start()
        start_logged(self._whole(), "the run").addBoth(lambda _: self._reactor.stop())

    def _virtualbox_may_run(self) -> bool:
        """Whether VirtualBox's service may be started for a job that has no other programs on the host than HostMain.

        That service makes itself an orphan, runs the VMs of all slots, and is not ours. Adopted by us it would be this
        task's to the client, with all those VMs: in its accounts, and in what it kills when the task has quit.
        """
        others = self._job.daemons or any(task.guest is None for task in self._job.tasks)
        if others or not all(task.is_host_main for task in self._job.vmmanage_tasks):
            return False
        if not self._job.needs_vm(0) or any(task.guest and task.guest.hypervisor == "qemu" for task in self._job.tasks):
            return False
        from vmcontrol.hypervisors.vboxmanage import find

        return find() is not None

    def _on_signal(self, number: int, _frame: object) -> None:
        why = Quit(f"signal {signal.Signals(number).name}", by_signal=number)
        self._reactor.callFromThread(self._control.ask_to_end, why)

    async def _whole(self) -> None:
        try:
            outcome = await self._until_outcome()
            self._ending = await self._end(outcome)
        except CancelledError:
            raise
        except Exception as error:
            log.exception("internal error while ending")
            why = TemporaryExit(f"internal error: {error}", fault="internal", delay_s=INTERNAL_DELAY_S)
            self._ending = _temporary_exit(self._runtime, self._options, why)
        finally:
            self._control.stop()

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
        return TemporaryExit(
            f"Internal error: {type(failure).__name__}: {failure}", fault="internal", delay_s=INTERNAL_DELAY_S
        )

    async def _do_work(self) -> None:
        await leftovers.clear(self._reactor, self._slot)
        for name in frozen.remove_stale(self._slot.folder):
            log.info("removed %s, which a killed run had unpacked", name)
        try:
            self._process_list.begin()
        except OSError as error:
            raise TemporaryExit(
                f"The slot cannot be written ({error.strerror}): free some space on BOINC's disk",
                fault="checkpoint-file",
                delay_s=600,
            ) from error
        reserve.keep(self._slot)
        self._reports.start(REPORT_S, now=True)
        await self._sequence.run()

    # --- reports

    def _fraction(self) -> float:
        return self._fraction_done.update(self._ledger.now.tasks_done, self._sequence.task_fraction())

    def _report(self) -> None:
        try:
            self._tell_client()
        except (BoincError, OSError) as error:  # the next one may get through
            log.warning("no report: %s", error)
        processes.collect_orphans()

    def _tell_client(self) -> None:
        fraction = self._fraction()
        machine = self._sequence.machine
        self._runtime.report_app_status(
            AppStatus(
                cpu_time=self._accounts.cpu_time_s,
                checkpoint_cpu_time=self._ledger.checkpoint_cpu_time_s,
                fraction_done=max(fraction, self._least_fraction),
                other_pid=machine.other_pid if machine is not None else 0,
                working_set_bytes=machine.memory_bytes() if machine else self._host_programs.memory_bytes(),
            )
        )
        self._teller.look()
        self._tell_where_the_screen_is(machine)
        self._messages.look()
        self._display.show(fraction, self._what_goes_on())

    def _running_guest(self) -> GuestTask | None:
        task = self._sequence.guest_task
        can_answer = task is not None and task.is_running and not self._control.suspended
        return task if can_answer and self._control.ending is None else None

    def _tell_where_the_screen_is(self, machine: Machine | None) -> None:
        """The client's "Show VM console": again after each start of the VM, whose port changes."""
        address = machine.remote_desktop_address if machine is not None and machine.is_live else ""
        if address and address != self._remote_desktop:
            log.info("the VM's screen: remote desktop at %s", address)
            self._runtime.remote_desktop_addr(address)
        self._remote_desktop = address

    def _on_preferences(self) -> None:
        """init_data.xml was written anew."""
        self._init_data = self._runtime.reread_init_data()
        log.info("preferences have changed: %g %% of the processors' time", self._init_data.cpu_usage_limit)
        machine = self._sequence.machine
        if machine is not None:
            machine.set_cpu_share(cpu_share(self._init_data))

    def _what_goes_on(self) -> str:
        done, count = self._ledger.now.tasks_done, len(self._job.tasks)
        if self._control.suspended:
            return "suspended"
        images = self._sequence.images
        if images is not None and images.unpacking is not None:
            return f"unpacking the image of the virtual machine, {images.unpacking:.0%}"
        if self._management is not None and "waiting" in str(self._ready):
            return str(self._ready)
        return f"task {min(done + 1, count)} of {count}"

    def _on_network(self, suspended: bool) -> None:
        machine = self._sequence.machine
        if machine is not None:
            start_logged(machine.set_network(connected=not suspended), "network of the VM")

    # --- ends

    async def _end(self, outcome: Exception | None) -> Ending:
        if isinstance(outcome, TemporaryExit) and outcome.counted:
            count = self._ledger.now.temporary_exits.get(outcome.fault, 0) + 1
            if count > TEMPORARY_EXIT_LIMIT:
                outcome = SubTaskFailed(f"given up after {TEMPORARY_EXIT_LIMIT} tries: {outcome.reason}")
            else:
                counts = {**self._ledger.now.temporary_exits, outcome.fault: count}
                self._write(lambda: self._ledger.commit(temporary_exits=counts))
        match outcome:
            case None:
                return await self._end_done()
            case JobError():
                await self._end_everything(save=False)
                return _failed(self._runtime, outcome)
            case Aborted():
                await self._end_everything(save=False)
                return Ending(ExitStatus.ABORTED_BY_CLIENT)
            case TemporaryExit():
                await self._end_everything(save=True)
                return _temporary_exit(self._runtime, self._options, outcome)
            case Quit():
                await self._end_everything(save=True)
                if isinstance(self._control.ending, Aborted):  # the client has changed its mind meanwhile
                    self._remove_vm_files()
                    return Ending(ExitStatus.ABORTED_BY_CLIENT)
                return Ending(ExitStatus.DONE, outcome.by_signal)
            case _:
                raise outcome

    async def _end_done(self) -> Ending:
        await self._end_everything(save=False)
        self._timeline.mark("done")
        self._write(lambda: self._ledger.progressed(self._ledger.now))
        self._fraction_is_one()
        log.info("done: %s", self._timeline)
        try:
            self._runtime.finish(0)
        except (OSError, BoincError) as error:
            why = TemporaryExit(f"The finish file cannot be written: {error}", fault="finish-file", delay_s=600)
            return _temporary_exit(self._runtime, self._options, why)
        return Ending(ExitStatus.DONE)

    def _fraction_is_one(self) -> None:
        """The last status says what the client knows anyway as soon as it sees the finish file."""
        self._display.show(1.0, "done")
        cpu = self._accounts.cpu_time_s
        self._runtime.report_app_status(AppStatus(cpu_time=cpu, checkpoint_cpu_time=cpu, fraction_done=1.0))

    async def _end_everything(self, *, save: bool) -> None:
        """All programs and VMs; what the next start has to know is written down before this returns."""
        if self._reports.running and not save:
            self._reports.stop()
        program = self._sequence.host_program
        if program is not None:
            await program.end()
        await self._sequence.host_side.end_daemons()
        if not save:
            await self._delete_vms()
        saved = False
        if self._management is not None:
            saved = await self._management.end(save=save)
        if self._reports.running:
            self._reports.stop()
        processes.end_orphans(everything=True)
        self._host_programs.close()
        if save:
            self._write(lambda: self._write_saved(saved))
        else:
            self._remove_vm_files()
            reserve.give_up(self._slot)
        self._process_list.end()

    def _write_saved(self, saved: bool) -> None:
        now = self._ledger.now
        running = self._sequence.machine
        if running is not None and saved and running.is_live:
            now = now.with_vm(replace(running.record, saved_state_expected=True))
            log.info("VM %s is saved", running.name)
        if running is None or saved:
            self._ledger.saved(now, task_goes_on=self._sequence.host_task is None)
            self._report()  # the client's next start begins with the CPU time of the last checkpoint that it knows
            self._runtime.deliver()
        elif running.is_live:
            log.warning("VM %s was not saved: the next start goes back to its snapshot", running.name)

    async def _delete_vms(self) -> None:
        """Through HostMain, as long as it answers; the files in the slot go in any case."""
        management, vms = self._management, self._ledger.now.vms
        if management is None or not management.running or not vms:
            return
        try:
            await with_limit(self._reactor, DELETE_LIMIT_S, "deleting the VMs", self._delete(management))
        except CancelledError:
            raise
        except (LimitReached, Exception) as error:  # noqa: BLE001 (the end goes on)
            log.warning("not all VMs could be deleted: %s", error)

    async def _delete(self, management: Management) -> None:
        host = await management.host()
        for vm in self._ledger.now.vms:
            await (host.delete(vm.name) if vm.ours else host.release(vm.name))
            self._write(lambda name=vm.name: self._ledger.keep(self._ledger.now.without_vm(name)))  # type: ignore[misc]

    def _remove_vm_files(self) -> None:
        if self._slot.vm_folder.is_dir():
            for path in self._slot.vm_folder.iterdir():
                if path.name.startswith((names.VM_PREFIX, ".")):  # another name: a VM that was there before us
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._slot.vm_folder.rmdir()
        if self._ledger.now.vms:
            self._write(lambda: self._ledger.keep(replace(self._ledger.now, vms=())))

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except TemporaryExit as error:
            log.error("%s", error.reason)


def cpu_share(data: InitData) -> int:
    """Percent of its processors that a VM may use, 1 to 100.

    The client throttles all other programs itself, by suspending them for parts of each second. Those whose plan class
    says VirtualBox it leaves alone (client/client_types.cpp, RESULT::dont_throttle): they cap their VM.
    """
    if "vbox" not in data.plan_class:
        return 100
    return max(1, min(100, round(data.cpu_usage_limit)))


def _tells_its_progress(job: Job) -> bool:
    """Whether a job with VMs will have a figure of its own."""
    with_figure = any(
        task.fraction_done_filename or (task.guest is not None and task.guest.job_duration_s) for task in job.tasks
    )
    return job.needs_vm(0) and (with_figure or len(job.tasks) > 1)


async def _wait(deferred: Deferred[None]) -> None:
    await deferred
