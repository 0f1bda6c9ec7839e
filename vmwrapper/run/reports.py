"""What the client, and a terminal, are told once a second while the job runs.

Owns the fraction done of the job, and the messages that ride on the reports: trickles, graphics status, the sporadic
app's files, messages of and to the guest. A report that fails is made good by the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from twisted.internet.task import LoopingCall

from vmwrapper.boinc.runtime import AppStatus, BoincError, Runtime
from vmwrapper.context.context import JobContext
from vmwrapper.display import Display
from vmwrapper.errors import TemporaryExit
from vmwrapper.job.model import Job
from vmwrapper.options import RunOptions
from vmwrapper.process import trees
from vmwrapper.run.messages import Messages
from vmwrapper.run.sequence import JobSequence
from vmwrapper.run.trickles import GraphicsStatus, SporadicFiles, Teller
from vmwrapper.slot import Slot
from vmwrapper.state.accounts import FractionDone

if TYPE_CHECKING:
    from vmwrapper.vm.machine import Machine
    from vmwrapper.vm.task import GuestTask

REPORT_S = 1.0
FIRST_FRACTION = 0.001
"""Told while a VM boots, as vboxwrapper does: at 0 the client shows an estimate, and goes back at our first figure."""

log = logging.getLogger(__name__)


class Reports:
    """The reports of one run."""

    def __init__(
        self,
        runtime: Runtime,
        slot: Slot,
        job: Job,
        context: JobContext,
        *,
        options: RunOptions,
        sequence: JobSequence,
        display: Display,
        waits_for: Callable[[], str],
    ) -> None:
        """waits_for: which part of the system for VMs is not ready, "" when none is waited for."""
        self._runtime = runtime
        self._job = job
        self._context = context
        self._sequence = sequence
        self._display = display
        self._waits_for = waits_for
        trickle_period_s = options.trickle_s or job.trickle_up_period_s
        self._fraction_done = FractionDone([task.weight for task in job.tasks], context.ledger.now.fraction_done)
        self._teller = Teller(
            runtime,
            context.accounts,
            trickle_period_s=trickle_period_s,
            graphics=GraphicsStatus(slot.folder) if job.enable_graphics_support else None,
            sporadic=SporadicFiles(slot.folder, runtime) if options.sporadic else None,
            fraction=self.fraction,
            status=lambda: context.control.status,
            note=self._note_run_time,
        )
        self._messages = Messages(
            runtime,
            context.reactor,
            slot,
            names=context.names,
            uploads=job.intermediate_upload_files,
            with_snapshots=bool(trickle_period_s),
            guest=self._running_guest,
            figures=lambda: (context.ledger.now.snapshots_made, context.accounts.cpu_time_s, self.fraction()),
        )
        self._remote_desktop = ""
        self._least_fraction = FIRST_FRACTION if _tells_its_progress(job) else 0.0
        self._calls = LoopingCall(self.report)
        self._calls.clock = context.reactor

    def start(self) -> None:
        self._calls.start(REPORT_S, now=True)

    def stop(self) -> None:
        """Harmless when they are stopped."""
        if self._calls.running:
            self._calls.stop()

    def _note_run_time(self) -> bool:
        """On the disk: what is due until now has been told then."""
        try:
            self._context.ledger.commit()
        except TemporaryExit as error:
            log.warning("no trickle-up message yet: %s", error.reason)
            return False
        return True

    def fraction(self) -> float:
        """Of the whole job."""
        return self._fraction_done.update(self._context.ledger.now.tasks_done, self._sequence.task_fraction())

    def report(self) -> None:
        """One report, now."""
        try:
            self._tell_client()
        except (BoincError, OSError) as error:  # the next one may get through
            log.warning("no report: %s", error)
        try:
            trees.collect_orphans()
            self._sequence.left.look()
        except OSError as error:  # no descriptor left for a look at the processes: there is another one in a second
            log.warning("no look at what tasks have left running: %s", error)

    def report_used(self) -> None:
        """What a job that ends without being done has used up to now. The figures only: for the last one."""
        cpu, safe = self._context.accounts.cpu_time_s, self._context.ledger.checkpoint_cpu_time_s
        self._runtime.report_app_status(
            AppStatus(cpu_time=cpu, checkpoint_cpu_time=safe, fraction_done=self.fraction())
        )

    def report_done(self) -> None:
        """The last status says what the client knows anyway as soon as it sees the finish file."""
        self._display.show(1.0, "done")
        cpu = self._context.accounts.cpu_time_s
        self._runtime.report_app_status(AppStatus(cpu_time=cpu, checkpoint_cpu_time=cpu, fraction_done=1.0))

    def _tell_client(self) -> None:
        fraction = self.fraction()
        machine = self._sequence.machine
        programs = self._context.host_programs
        self._runtime.report_app_status(
            AppStatus(
                cpu_time=self._context.accounts.cpu_time_s,
                checkpoint_cpu_time=self._context.ledger.checkpoint_cpu_time_s,
                fraction_done=max(fraction, self._least_fraction),
                other_pid=machine.other_pid if machine is not None else 0,
                working_set_bytes=machine.memory_bytes() if machine else programs.memory_bytes(),
            )
        )
        self._teller.look()
        self._tell_where_the_screen_is(machine)
        self._messages.look()
        self._display.show(fraction, self._what_goes_on())

    def _running_guest(self) -> GuestTask | None:
        task, control = self._sequence.guest_task, self._context.control
        can_answer = task is not None and task.is_running and not control.suspended
        return task if can_answer and control.ending is None else None

    def _tell_where_the_screen_is(self, machine: Machine | None) -> None:
        """The client's "Show VM console": again after each start of the VM, whose port changes."""
        address = machine.remote_desktop_address if machine is not None and machine.is_live else ""
        if address and address != self._remote_desktop:
            log.info("the VM's screen: remote desktop at %s", address)
            self._runtime.remote_desktop_addr(address)
        self._remote_desktop = address

    def _what_goes_on(self) -> str:
        done, count = self._context.ledger.now.tasks_done, len(self._job.tasks)
        if self._context.control.suspended:
            return "suspended"
        machine = self._sequence.machine
        if machine is not None and machine.held_up.reason:
            return f"waiting: {machine.held_up.reason}"
        images = self._sequence.images
        if images is not None and images.unpacking is not None:
            return f"unpacking the image of the virtual machine, {images.unpacking:.0%}"
        return self._waits_for() or f"task {min(done + 1, count)} of {count}"


def _tells_its_progress(job: Job) -> bool:
    """Whether a job with VMs will have a figure of its own."""
    with_figure = any(
        task.fraction_done_filename or (task.guest is not None and task.guest.job_duration_s) for task in job.tasks
    )
    return job.needs_vm(0) and (with_figure or len(job.tasks) > 1)
