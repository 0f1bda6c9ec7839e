"""The end of a run: first the programs and VMs, then what is written down, then the client's files.

Owns the order. Which end it is has been decided by `vmwrapper.run.run`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, DeferredList

from vmcontrol.common.eventloop import Event, LimitReached, start, with_limit
from vmcontrol.common.logthrottle import LAST
from vmcontrol.protocol.vmends import VmEnd
from vmwrapper.context.context import JobContext
from vmwrapper.errors import Aborted, JobError, Quit, TemporaryExit
from vmwrapper.exit_status import ExitStatus
from vmwrapper.log import OUTCOME
from vmwrapper.process import orphans
from vmwrapper.process.patience import ABORT_S, QUIT_S, Patience
from vmwrapper.run import cleanup
from vmwrapper.run.cleanup import remove_vm_files, written
from vmwrapper.run.ending import Ending, failed, finished, temporary_exit
from vmwrapper.run.reports import Reports
from vmwrapper.run.sequence import JobSequence
from vmwrapper.state import reserve

if TYPE_CHECKING:
    from vmwrapper.vm.session import GuestSession

log = logging.getLogger(__name__)


class Shutdown:
    """Of one run."""

    def __init__(
        self, context: JobContext, session: GuestSession | None, sequence: JobSequence, reports: Reports
    ) -> None:
        self._context = context
        self._session = session
        self._sequence = sequence
        self._reports = reports

    async def end(self, outcome: Exception | None) -> Ending:
        """End everything. outcome: why; None: the job is done."""
        match outcome:
            case None:
                return await self._end_done()
            case JobError():
                await self._end_everything(save=False)
                self._reports.report_used()
                return self.tell_client(outcome)
            case Aborted():
                await self._end_everything(save=False)
                self._reports.report_used()
                self._context.runtime.deliver()
                return Ending(ExitStatus.ABORTED_BY_CLIENT)
            case TemporaryExit():
                await self._end_everything(save=True)
                return self.tell_client(outcome)
            case Quit():
                await self._end_everything(save=True)
                if isinstance(self._context.control.ending, Aborted):  # the client has changed its mind meanwhile
                    remove_vm_files(self._context.slot, self._context.ledger)
                    return Ending(ExitStatus.ABORTED_BY_CLIENT)
                return Ending(ExitStatus.DONE, outcome.by_signal)
            case _:
                raise outcome

    def tell_client(self, outcome: JobError | TemporaryExit) -> Ending:
        """Write the client's file for this outcome."""
        if isinstance(outcome, JobError):
            return failed(self._context.runtime, outcome)
        return temporary_exit(self._context.runtime, self._context.options, outcome)

    async def _end_done(self) -> Ending:
        await self._end_everything(save=False)
        context = self._context
        context.timeline.mark("done")
        written(lambda: context.ledger.progressed(context.ledger.now))
        self._reports.report_done()
        for line in self._sequence.output_links.complaints():
            log.warning("%s", line, extra=LAST)
        log.info("done: %s", context.timeline, extra=OUTCOME)
        return finished(context.runtime, context.options)

    async def _end_everything(self, *, save: bool) -> None:
        """All programs and VMs; what the next start has to know is written down before this returns."""
        context = self._context
        patience = context.control.patience or Patience(context.reactor, QUIT_S if save else ABORT_S)
        if not save:
            self._reports.stop()
        _, ends = await _together(self._end_programs(patience), self._end_vms(patience, save=save))
        context.accounts.settle()
        self._reports.stop()
        orphans.end_orphans(context.process_list.token, everything=True)
        context.host_programs.close()
        if save:
            written(lambda: self._write_saved(ends))
        else:
            remove_vm_files(context.slot, context.ledger)
            reserve.give_up(context.slot)
        context.process_list.end()

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
                await with_limit(self._context.reactor, patience.others_s(), "the task's end", over.wait())
            await _together(self._sequence.left.end(patience), self._sequence.host_side.end_daemons(patience))

        await _together(end_task(), end_others())

    async def _end_vms(self, patience: Patience, *, save: bool) -> Mapping[str, VmEnd]:
        """VMs and VMmanage tasks; what HostMain says of each VM, by name."""
        if self._session is None:
            return {}
        return await self._session.end(save=save, patience=patience)

    def _write_saved(self, ends: Mapping[str, VmEnd]) -> None:
        """What is kept: all of it, unless the VM of the task in hand was not saved: then what its snapshot holds."""
        ledger, accounts = self._context.ledger, self._context.accounts
        now = ledger.now
        running = self._session.machine if self._session is not None else None
        live = running.name if running is not None and running.is_live else ""
        kept = cleanup.after_the_end(now, ends, live, lost_s=accounts.cpu_time_s - now.cpu_time_s)
        for line in kept.saved:
            log.info("%s", line)
        for line in kept.lost:
            log.warning("%s", line)
        if running is None or cleanup.was_saved(ends, running.record):
            ledger.saved(kept.checkpoint, task_goes_on=self._sequence.host_task is None)
        elif kept.checkpoint != now:
            ledger.keep(kept.checkpoint)
        self._reports.report()  # the client's next start begins with the CPU time of the last one that it knows
        self._context.runtime.deliver()


async def _together(*works: Coroutine[Deferred[Any], Any, object]) -> list[Any]:
    """Side by side, each to its end; their results. Raises what one of them raised."""
    outcomes: Any = await DeferredList([start(work) for work in works], consumeErrors=True)
    for good, value in outcomes:
        if not good:
            raise value.value
    return [value for _, value in outcomes]
