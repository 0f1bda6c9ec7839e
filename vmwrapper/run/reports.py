"""What the client, and a terminal, get once a second while the job runs.

With the reports go trickles, graphics status, the sporadic app's files, messages of and to the guest. A report that
fails is made good by the next one.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from twisted.internet.task import LoopingCall

from vmwrapper.boinc.runtime import AppStatus, BoincError
from vmwrapper.context.context import JobContext
from vmwrapper.display import Display
from vmwrapper.errors import TemporaryExit
from vmwrapper.host.left_running import LeftRunning
from vmwrapper.job.model import Job
from vmwrapper.process import orphans
from vmwrapper.run.messages import Messages
from vmwrapper.run.trickles import GraphicsStatus, SporadicFiles, Trickles

if TYPE_CHECKING:
    from vmwrapper.vm.machine import Machine
    from vmwrapper.vm.session import GuestSession

REPORT_S = 1.0
FIRST_FRACTION = 0.001
"""While a VM boots, as by vboxwrapper: at 0 the client shows an estimate, and goes back at our first figure."""

log = logging.getLogger(__name__)


class Reports:
    """The reports of one run."""

    def __init__(self, context: JobContext, session: GuestSession | None, left: LeftRunning, display: Display) -> None:
        self._context = context
        self._session = session
        self._left = left
        self._display = display
        job, runtime = context.job, context.runtime
        trickle_period_s = context.options.trickle_s or job.trickle_up_period_s
        self._trickles = Trickles(runtime, trickle_period_s, context.accounts.elapsed_s, self._note_run_time)
        self._graphics = GraphicsStatus(context.slot_folder) if job.enable_graphics_support else None
        self._sporadic = SporadicFiles(context.slot_folder, runtime) if context.options.sporadic else None
        self._messages = Messages(context, session)
        self._remote_desktop = ""
        self._least_fraction = FIRST_FRACTION if _has_figures(job) else 0.0
        self._calls = LoopingCall(self.report)
        self._calls.clock = context.reactor

    def start(self) -> None:
        self._calls.start(REPORT_S, now=True)

    def stop(self) -> None:
        """Harmless when they are stopped."""
        if self._calls.running:
            self._calls.stop()

    def _note_run_time(self) -> bool:
        """Write the run time down: a trickle that is due until now has been sent then. Whether that worked."""
        try:
            self._context.ledger.commit()
        except TemporaryExit as error:
            log.warning("no trickle-up message yet: %s", error.reason)
            return False
        return True

    def report(self) -> None:
        """One report, now."""
        try:
            self._report()
        except (BoincError, OSError) as error:  # the next one may get through
            log.warning("no report: %s", error)
        try:
            orphans.collect_orphans()
            self._left.look()
        except OSError as error:  # no descriptor left for a look at the processes: there is another one in a second
            log.warning("no look at what tasks have left running: %s", error)

    def report_used(self) -> None:
        """What a job that ends without being done has used up to now. The figures only: for the last one."""
        cpu, safe = self._context.accounts.cpu_time_s, self._context.ledger.checkpoint_cpu_time_s
        self._context.runtime.report_app_status(
            AppStatus(cpu_time=cpu, checkpoint_cpu_time=safe, fraction_done=self._context.ledger.fraction())
        )

    def report_done(self) -> None:
        """The last status says what the client knows anyway as soon as it sees the finish file."""
        self._display.show(1.0, "done")
        cpu = self._context.accounts.cpu_time_s
        self._context.runtime.report_app_status(AppStatus(cpu_time=cpu, checkpoint_cpu_time=cpu, fraction_done=1.0))

    def _report(self) -> None:
        context, accounts = self._context, self._context.accounts
        fraction = context.ledger.fraction()
        machine = self._session.machine if self._session is not None else None
        context.runtime.report_app_status(
            AppStatus(
                cpu_time=accounts.cpu_time_s,
                checkpoint_cpu_time=context.ledger.checkpoint_cpu_time_s,
                fraction_done=max(fraction, self._least_fraction),
                other_pid=machine.other_pid if machine is not None else 0,
                working_set_bytes=(machine or context.host_programs).memory_bytes(),
            )
        )
        self._trickles.look(accounts.elapsed_s)
        if self._sporadic is not None:
            self._sporadic.look()
        if self._graphics is not None:
            self._graphics.write(accounts, context.ledger.fraction(), context.control.status)
        self._report_screen(machine)
        self._messages.look()
        self._display.show(fraction, self._what_goes_on())

    def _report_screen(self, machine: Machine | None) -> None:
        """The client's "Show VM console": again after each start of the VM, whose port changes."""
        address = machine.remote_desktop_address if machine is not None and machine.is_live else ""
        if address and address != self._remote_desktop:
            log.info("the VM's screen: remote desktop at %s", address)
            self._context.runtime.remote_desktop_addr(address)
        self._remote_desktop = address

    def _what_goes_on(self) -> str:
        if self._context.control.suspended:
            return "suspended"
        done, count = self._context.ledger.now.tasks_done, len(self._context.job.tasks)
        waits_for = self._session.waits_for() if self._session is not None else ""
        return waits_for or f"task {min(done + 1, count)} of {count}"


def _has_figures(job: Job) -> bool:
    """Whether a job with VMs will have a figure of its own for its fraction done."""
    with_figure = any(
        task.fraction_done_filename or (task.guest is not None and task.guest.job_duration_s) for task in job.tasks
    )
    return job.needs_vm(0) and (with_figure or len(job.tasks) > 1)
