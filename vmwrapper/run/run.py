"""One run of the wrapper: everything is connected here, and every way to end goes through here.

    run             the program: never returns to its caller
    run_job         the same, returning how the process is to end; for programs that drive us, such as tests

Owns the reactor's run, the signals, and the decision how the job ends. `vmwrapper.run.resume` finds where it goes on,
`vmwrapper.run.sequence` does the work, `vmwrapper.run.shutdown` ends what runs.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from twisted.internet.defer import CancelledError, Deferred, DeferredList, FirstError

from vmcontrol.common import frozen, umask
from vmcontrol.common.eventloop import start, start_logged, the_reactor, with_limit
from vmcontrol.common.proctable import own_age_s
from vmcontrol.common.slotfiles import FINISH_FILE, STDERR
from vmwrapper.boinc.runtime import BoincError, Runtime
from vmwrapper.context.context import JobContext
from vmwrapper.context.control import Control
from vmwrapper.context.readiness import Readiness
from vmwrapper.context.timeline import Timeline
from vmwrapper.display import Display
from vmwrapper.errors import JobError, Quit, TemporaryExit, translate_os_errors
from vmwrapper.exit_status import ExitStatus
from vmwrapper.log import set_up, versions
from vmwrapper.options import RunOptions
from vmwrapper.process import leftovers, orphans
from vmwrapper.process.programs import HostPrograms
from vmwrapper.run.ending import Ending, failed, finished, leave, record_temporary_exit, temporary_exit
from vmwrapper.run.reports import Reports
from vmwrapper.run.resume import OpenedJob, Resumed, open_job, resume
from vmwrapper.run.sequence import JobSequence
from vmwrapper.run.shutdown import Shutdown
from vmwrapper.slot import Slot
from vmwrapper.state import reserve
from vmwrapper.state.accounts import Accounts, FractionDone
from vmwrapper.state.checkpoint import CheckpointStore
from vmwrapper.state.ledger import Ledger

if TYPE_CHECKING:
    from vmwrapper.vm.session import GuestSession

INTERNAL_DELAY_S = 60
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
        try:
            opened = open_job(options, runtime, slot)
            store = CheckpointStore(slot)
            resumed = resume(opened, store)
        except JobError as error:
            return failed(runtime, error)
        except TemporaryExit as why:
            return temporary_exit(runtime, options, why)
        if resumed.is_finished:
            log.info("this slot is finished already")
            there = slot.file(FINISH_FILE).exists()
            return Ending(ExitStatus.DONE) if there else finished(runtime, options)
        job_run = _connect(
            opened,
            store,
            resumed,
            display=display,
            stderr_file=stderr_file,
            host_main=host_main,
            program_umask=program_umask,
        )
        return job_run.run()
    finally:
        display.end()
        runtime.close()


def _connect(
    opened: OpenedJob,
    store: CheckpointStore,
    resumed: Resumed,
    *,
    display: Display,
    stderr_file: Path | None,
    host_main: Sequence[str] | None,
    program_umask: int,
) -> Run:
    """Make and connect all objects of a run."""
    options, job, checkpoint = opened.options, opened.job, resumed.checkpoint
    reactor = the_reactor()
    control = Control(opened.runtime, reactor)
    timeline = Timeline(reactor, reactor.seconds() - own_age_s())
    process_list = leftovers.ProcessList(opened.slot)
    host_programs = HostPrograms(
        reactor,
        process_list.token,
        note_group=process_list.note_group,
        stop_signal=getattr(signal, "SIGTSTP", None) if options.use_tstp else None,
    )
    control.listen(lambda: host_programs.set_suspended(control.suspended))
    accounts = Accounts(
        control.work_clock,
        host=host_programs.cpu_time_s,
        cpu_time_s=checkpoint.cpu_time_s,
        elapsed_s=checkpoint.elapsed_s,
        task_elapsed_s=checkpoint.task_elapsed_s,
    )
    progress = FractionDone([task.weight for task in job.tasks], checkpoint.fraction_done)
    context = JobContext(
        reactor=reactor,
        options=options,
        runtime=opened.runtime,
        slot=opened.slot,
        names=opened.names,
        job=job,
        program_umask=program_umask,
        stderr_file=stderr_file,
        control=control,
        process_list=process_list,
        host_programs=host_programs,
        accounts=accounts,
        progress=progress,
        ledger=Ledger(store, checkpoint, accounts, progress),
        timeline=timeline,
        ready=Readiness(timeline),
    )
    session = None
    if job.needs_vm(checkpoint.tasks_done) or ((checkpoint.vms or resumed.stale_vms) and job.vmmanage_tasks):
        from vmwrapper.vm.services import Services  # late: other jobs never need it
        from vmwrapper.vm.session import GuestSession

        services = Services(context, is_first_run=resumed.is_first_run, host_main=host_main)
        session = GuestSession(context, services, resumed.stale_vms)
    sequence = JobSequence(context, session)
    reports = Reports(context, session, sequence.left, display)
    return Run(context, session, sequence, reports, Shutdown(context, session, sequence, reports))


class Run:
    """The run of one job on the reactor."""

    def __init__(
        self,
        context: JobContext,
        session: GuestSession | None,
        sequence: JobSequence,
        reports: Reports,
        shutdown: Shutdown,
    ) -> None:
        self._context = context
        self._session = session
        self._sequence = sequence
        self._reports = reports
        self._shutdown = shutdown
        self._ending = Ending(ExitStatus.TEMPORARY_STANDALONE)

    def run(self) -> Ending:
        """Everything, on the reactor."""
        self._context.reactor.callWhenRunning(self._begin)
        self._context.reactor.run()
        return self._ending

    def _begin(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            signal.signal(number, self._on_signal)
        if self._session is not None and self._session.may_start_virtualbox():
            # VirtualBox's service makes itself an orphan, runs the VMs of all slots, and is not ours. Adopted by us it
            # would be this task's to the client, with all those VMs: in its accounts, and in what it kills when the
            # task has quit. We adopt orphans as soon as HostMain says that it uses another hypervisor.
            orphans.adopt_nothing()
        else:
            orphans.become_subreaper()
        self._context.control.start()
        start_logged(self._whole(), "the run").addBoth(lambda _: self._context.reactor.stop())

    def _on_signal(self, number: int, _frame: object) -> None:
        why = Quit(f"signal {signal.Signals(number).name}", by_signal=number)
        self._context.reactor.callFromThread(self._context.control.ask_to_end, why)

    async def _whole(self) -> None:
        outcome: Exception | None = None
        try:
            outcome = await self._until_outcome()
            if isinstance(outcome, TemporaryExit):
                outcome = record_temporary_exit(self._context.ledger, self._context.slot, outcome)
            self._ending = await self._shutdown.end(outcome)
        except CancelledError:
            raise
        except Exception as error:
            log.exception("internal error while ending")
            if not isinstance(outcome, JobError | TemporaryExit):
                outcome = record_temporary_exit(self._context.ledger, self._context.slot, _internal(error))
            self._ending = self._shutdown.tell_client(outcome)
        finally:
            self._context.control.stop()

    async def _until_outcome(self) -> Exception | None:
        """Do the work until it is done (None), has failed, or is to end."""
        work: Deferred[Any] = start(self._do_work())
        others: list[Deferred[Any]] = [start(_wait(self._context.control.end_asked.wait()))]
        if self._session is not None:
            others.append(start(self._session.failure()))
        failure: Exception | None = None
        try:
            await DeferredList([work, *others], fireOnOneCallback=True, fireOnOneErrback=True, consumeErrors=True)
        except FirstError as error:
            if not isinstance(error.subFailure.value, Exception):
                raise
            failure = error.subFailure.value
        finally:
            for other in others:
                other.cancel()
        if failure is None and self._context.control.ending is None:
            return None
        work.cancel()
        with contextlib.suppress(Exception):
            await with_limit(self._context.reactor, _CANCEL_LIMIT_S, "the work in hand", _settled(work))
        return self._judged(failure)

    def _judged(self, failure: Exception | None) -> Exception | None:
        """How the job ends. failure: what failed, None when the client asked for the end."""
        if self._context.control.ending is not None:
            return self._context.control.ending  # what fails while everything is being ended is no failure of the job
        if failure is None or isinstance(failure, JobError | TemporaryExit):
            return failure
        log.error("internal error", exc_info=failure)
        return _internal(failure)

    async def _do_work(self) -> None:
        context = self._context
        await leftovers.clear(context.reactor, context.slot)
        for name in frozen.remove_stale(context.slot_folder):
            log.info("removed %s, which a killed run had unpacked", name)
        with translate_os_errors("The slot cannot be written", fault="checkpoint-file"):
            context.process_list.begin()
        reserve.keep(context.slot)
        self._reports.start()
        await self._sequence.run()


def _internal(error: Exception) -> TemporaryExit:
    """A fault of ours: perhaps it does not come again."""
    why = f"Internal error: {type(error).__name__}: {error}"
    return TemporaryExit(why, fault="internal", delay_s=INTERNAL_DELAY_S)


async def _wait(deferred: Deferred[None]) -> None:
    await deferred


async def _settled(work: Deferred[Any]) -> None:
    await DeferredList([work], consumeErrors=True)
