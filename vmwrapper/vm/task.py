"""A guest task: its files go into the VM, its command runs there exactly once, its results come out.

Owns the `current` part of the checkpoint. The order of its steps is what docs/internals/exactly-once.md
promises: the command's id and attempt are durable before it is sent, the outputs are durable before the task counts as
done, and only then may the agent forget the command.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from twisted.internet.defer import Deferred, DeferredList, FirstError
from twisted.internet.task import LoopingCall

from vmcontrol.common.eventloop import sleep, start, start_logged
from vmcontrol.protocol.command import CommandStatus
from vmwrapper import names
from vmwrapper.context.context import JobContext
from vmwrapper.context.waiting import InARow
from vmwrapper.errors import TaskFailed, TemporaryExit
from vmwrapper.job import commandline, meaning
from vmwrapper.job.model import GuestOptions
from vmwrapper.log import quote
from vmwrapper.names import snapshot_number
from vmwrapper.paths import listed
from vmwrapper.state.accounts import task_fraction
from vmwrapper.state.checkpoint import GuestProgress, Phase
from vmwrapper.state.rollback import go_back, next_attempt
from vmwrapper.vm import decisions, incident
from vmwrapper.vm.checkpoints import GuestCheckpoints
from vmwrapper.vm.container import ContainerCommand
from vmwrapper.vm.decisions import StartPlan, Watch, Way
from vmwrapper.vm.files import GuestFiles
from vmwrapper.vm.machine import Machine
from vmwrapper.vm.recovery import Recovery
from vmwrapper.vm.sent import Life
from vmwrapper.vm.signs import SILENCE_S
from vmwrapper.vm.trouble import CallFailed, GuestFailed, GuestSilent, HostMainError, MissingFile, StateLost, VmTrouble

if TYPE_CHECKING:
    from vmwrapper.vm.hostmain import HostMainClient

KILLED_LIMIT = 1
"""How often, without a checkpoint between, a program that something killed in the guest is begun again."""
CANCEL_GRACE_S = 15.0
"""For a program to end by itself, as on the host (vmwrapper/process/patience.py, ABORT_S)."""
_AGAIN_S = 1.0
_CHECKPOINT_LOOK_S = 1.0
CANCEL_SILENCE_S = min(60.0, SILENCE_S)
"""Of silence of a guest whose command is to be ended at its time limit; then its VM is ended."""

log = logging.getLogger(__name__)


class LimitUnheard(Exception):  # noqa: N818
    """The program's time limit is over, and the guest does not answer."""


class GuestTask:
    """One run of one task, from wherever the checkpoint says that it is."""

    def __init__(
        self, context: JobContext, machine: Machine, index: int, container: ContainerCommand | None = None
    ) -> None:
        """index: of the task in the job. container: what it runs, where that is not in the guest itself."""
        task = context.job.tasks[index]
        if task.guest is None:
            raise ValueError("not a guest task")
        self._context = context
        self._machine = machine
        self._task = task
        self._options: GuestOptions = task.guest
        self._index = index
        self._container = container
        self._users = decisions.users(context.job)
        self._own_fraction: float | None = None
        self._command_cpu_s = 0.0
        self._cpu_of_earlier_tasks_s = machine.cpu_time_s()
        self._time_limit_reached = False
        self._running = False
        self._killed = InARow(context.ledger)
        self._checkpoints = GuestCheckpoints(context, machine, self._options)
        self._recovery = Recovery(context, machine, self._checkpoints)
        self._files = GuestFiles(context, machine, task, self._recovery)
        now = context.ledger.now
        if now.current is None or now.current.task != index:  # else its id counts, which an older version may have made
            command_id = names.command_id(context.init_data.result_name, index, meaning.digest(task))
            self._set_current(next_attempt(now, GuestProgress(index, command_id)))

    @property
    def progress(self) -> GuestProgress:
        current = self._context.ledger.now.current
        if current is None:
            raise RuntimeError("a guest task without its entry in the checkpoint")
        return current

    def _set_current(self, progress: GuestProgress) -> None:
        self._context.ledger.commit(current=progress)

    @property
    def is_running(self) -> bool:
        """Whether its command runs in the guest now, as far as is known."""
        return self._running

    @property
    def vm(self) -> str:
        """Name of its VM."""
        return self._machine.name

    @property
    def life(self) -> Life:
        """Which life of its command this is."""
        now = self._context.ledger.now
        number = now.snapshots_made + self._checkpoints.is_under_way
        return Life(self.progress.command_id, now.rollbacks, now.rolled_back_to, number)

    @property
    def trigger_files(self) -> Sequence[str]:
        """Files of the guest whose content is to be sent as trickle messages."""
        return self._options.trickle_trigger_files

    async def hostmain(self) -> HostMainClient:
        return await self._machine.hostmain()

    def fraction(self) -> float | None:
        return task_fraction(self._own_fraction, self._options.job_duration_s, self._context.accounts.task_elapsed_s)

    def cpu_time_s(self) -> float:
        if self._options.cpu_time_source == "command":
            return self._command_cpu_s
        return self._machine.cpu_time_s() - self._cpu_of_earlier_tasks_s

    # --- the whole task

    async def run(self) -> None:
        """Returns when the outputs are safe on the host and the task counts as done.

        Raises JobErrors, TemporaryExit, and StateLost when the job has to go back to an earlier task.
        """
        self._context.accounts.use(self.cpu_time_s)
        self._context.progress.follow(self.fraction)
        ticking = LoopingCall(self._look)
        ticking.clock = self._context.reactor
        ticking.start(_CHECKPOINT_LOOK_S, now=False)
        try:
            while True:
                try:
                    return await self._once()
                except (HostMainError, VmTrouble, TemporaryExit) as error:
                    self._running = False
                    await self._recovery.after(error)
        finally:
            ticking.stop()
            self._running = False
            self._context.progress.follow(None)
            self._context.accounts.settle()

    async def _once(self) -> None:
        await self._machine.bring_up(self._before_rollback)
        hostmain = await self._machine.hostmain()
        known = await self._tidy(hostmain)
        step = decisions.next_step(self.progress, known)
        if isinstance(step, Watch):
            log.info("the guest has %s (attempt %d): %s", self._task.title, step.attempt, known and known.state)
            self._set_current(replace(self.progress, attempt=max(step.attempt, 1), phase=Phase.SENT))
        else:
            await self._send(hostmain, step)
        try:
            result = await self._watch(hostmain)
        except LimitUnheard as unheard:
            await self._end_unheard(unheard)
        else:
            await self._collect(result)
        await self._count_as_done()

    def _before_rollback(self, plan: StartPlan) -> None:
        """The VM is about to go back to an older state: the job goes back with it, first on the disk."""
        ledger = self._context.ledger
        now = ledger.now
        if plan.way is Way.BOOT or (plan.way is Way.RESTORE and plan.entry is None):
            current, number = next_attempt(now, self.progress), snapshot_number(plan.snapshot) or 0
            new = replace(now, current=current, rollbacks=now.rollbacks + 1, rolled_back_to=number)
        elif plan.entry is None and not now.attempts:
            return  # nothing was ever sent
        else:
            new = go_back(now, self._users, self._machine.virtualmachine, plan.entry)
        if new.tasks_done != self._index:
            raise StateLost(f"VM {self.vm} goes back to a state of an earlier task", plan.entry)
        ledger.keep(new)
        self._context.accounts.begin_task(new.task_elapsed_s)
        self._own_fraction = None
        self._time_limit_reached = False
        if plan.entry is not None and (lost := self._context.accounts.cpu_time_s - plan.entry.cpu_time_s) >= 1:
            log.info("VM %s: %.0f s of CPU time of the job are done again", self.vm, lost)

    async def _tidy(self, hostmain: HostMainClient) -> CommandStatus | None:
        """What the agent knows of our command; every other command is cancelled or forgotten."""
        name = self._machine.name
        commands = await hostmain.commands(name)
        for other in decisions.foreign(commands, self.progress.command_id):
            if other.state == "running":
                log.warning("cancelling command %s, which is not the current one", other.id)
                await self._cancel(hostmain, other.id)
            await hostmain.acknowledge(name, other.id)
        return next((command for command in commands if command.id == self.progress.command_id), None)

    async def _cancel(self, hostmain: HostMainClient, id: str) -> CommandStatus:
        """Have a command ended and wait for its end."""
        view = await hostmain.cancel(self._machine.name, id, CANCEL_GRACE_S)
        while view.state == "running":
            view = await hostmain.wait_command(self._machine.name, id, view.version)
        return view

    # --- in

    async def _send(self, hostmain: HostMainClient, step: decisions.Send) -> None:
        if step.rollback:
            log.warning("rollback: %s is started again, attempt %d: %s", self._task.title, step.attempt, step.rollback)
        self._set_current(replace(self.progress, attempt=step.attempt, phase=Phase.PREPARING))
        if step.copy_files:
            await self._files.copy_in()
        self._context.timeline.mark("files in")
        await self._context.control.may_work()
        ledger = self._context.ledger
        attempts = {**ledger.now.attempts, str(self._index): step.attempt}
        ledger.commit(current=replace(self.progress, phase=Phase.SENT), attempts=attempts)
        given = self._context.options
        arguments = [*commandline.split(self._task.command_line), *given.extra_args, *given.passed_args]
        request = decisions.request(self._task, self.progress, arguments, step.attempt)
        if self._container is not None:
            request |= self._container.to_struct()
        log.info("running %s in the guest (%s, attempt %d)", self._task.title, request["id"], step.attempt)
        view = await hostmain.run(self._machine.name, request)
        if view.state == "refused":
            raise GuestFailed(f"the guest refuses the command: {view.detail}")

    # --- while it runs

    async def _watch(self, hostmain: HostMainClient) -> Mapping[str, Any]:
        """Until the command has ended: its result. Raises LimitUnheard, GuestFailed, VmTrouble, HostMainErrors."""
        self._running = True
        self._context.accounts.program_runs(True)
        self._context.timeline.mark("run")
        start_logged(self._machine.guest.note_boot(), "the guest's uptime")
        waits: list[Deferred[Any]] = [start(self._finished(hostmain)), start(self._ended()), start(self._silent())]
        if self._task.time_limit_s is not None:
            waits.append(start(self._limit(self._task.time_limit_s)))
        try:
            value, _ = await DeferredList(waits, fireOnOneCallback=True, fireOnOneErrback=True, consumeErrors=True)
        except FirstError as error:
            raise error.subFailure.value or error from None
        finally:
            for wait in waits:
                wait.cancel()
            self._context.accounts.program_runs(False)
            self._running = False
        await self._checkpoints.settled()
        return dict(value)

    async def _ended(self) -> NoReturn:
        """The VM does not run any more."""
        state = await self._machine.died()
        hostmain = await self._machine.hostmain()
        trouble = (await hostmain.info(self._machine.name)).trouble
        why = incident.ended(self._machine.name, self._machine.guest.console(), state, trouble)
        raise (GuestFailed if state == "PoweredOff" else VmTrouble)(why)

    async def _silent(self) -> NoReturn:
        """The guest gives no sign of life."""
        why = await self._machine.guest.silence()
        raise LimitUnheard(why) if self._time_limit_reached else GuestFailed(why, silent=True)

    async def _limit(self, limit_s: float) -> None:
        """The program has run for its time limit: it is ended, and counts as done. Never returns."""
        accounts = self._context.accounts
        await sleep(self._context.control.work_clock, max(0.0, limit_s - accounts.task_elapsed_s))
        log.warning("%s has run for its time_limit of %s s: it is ended", self._task.title, limit_s)
        self._time_limit_reached = True
        while True:
            hostmain = await self._machine.hostmain()
            try:
                await hostmain.cancel(self._machine.name, self.progress.command_id, CANCEL_GRACE_S)
            except GuestSilent as silent:
                log.warning("the guest could not be told that: %s", silent)
                if await self._machine.guest.is_silent(CANCEL_SILENCE_S):
                    raise LimitUnheard(str(silent)) from silent
                await self._context.control.may_work()
                await sleep(self._context.reactor, _AGAIN_S)
            except CallFailed as error:  # an agent of protocol 1 cannot end a command
                log.warning("%s cannot be ended in the guest, its own end is waited for: %s", self._task.title, error)
                break
            else:
                break
        await Deferred()

    async def _end_unheard(self, unheard: LimitUnheard) -> None:
        """The limit is over and the guest is dead: its VM is ended. Raises TaskFailed if anything in it is needed."""
        await self._checkpoints.settled()
        self._machine.guest.quote_console()
        name, limit = self._task.title, self._task.time_limit_s
        said = incident.panic(self._machine.guest.console())
        why = f"the guest's kernel panicked: {said}" if said else str(unheard)
        await self._machine.discard()
        ended = f"{name} has run for its time_limit of {limit} s, and could not be ended ({why}): its VM was ended"
        lost = [copy.remote for copy in decisions.files_out(self._task)]
        if self._machine.virtualmachine in self._users[self._index + 1 :]:
            lost.append("the disk that later tasks need")
        if lost:
            raise TaskFailed(f"{ended}, and with it {', '.join(lost)}")
        log.warning("%s; the task counts as done, without what it wrote to stdout and stderr", ended)

    async def _finished(self, hostmain: HostMainClient) -> Mapping[str, Any]:
        name, progress, version = self._machine.name, self.progress, 0
        while True:
            view = await hostmain.wait_command(name, progress.command_id, version)
            version = view.version
            if view.fraction_done is not None:
                self._own_fraction = view.fraction_done
            self._command_cpu_s = max(self._command_cpu_s, view.cpu_time_s)
            if view.state == "finished":
                return view.result or {}
            if view.state != "running":
                asked = await hostmain.query(name, progress.command_id)
                if asked.state == "finished":
                    return asked.result or {}
                if asked.state != "running":
                    detail = f" ({asked.detail})" if asked.detail else ""
                    why = await self._machine.guest.restarted()
                    raise GuestFailed(f"the guest calls the running command {asked.state}{detail}: {why}")
                version = asked.version

    # --- checkpoints while it runs

    def _look(self) -> None:
        if self._running:
            what = f"{self._task.title} at {self._context.accounts.elapsed_s:.0f} s"
            self._checkpoints.look(self.progress, what)

    # --- out

    async def _collect(self, result: Mapping[str, Any]) -> None:
        """Outputs to the host, durable; then what the result means."""
        self._complain_of_kill(result)
        failure = decisions.verdict(self._task, result, time_limit_reached=self._time_limit_reached)
        log.info(
            "%s ended in the guest after %.2f s, %.2f s of CPU time",
            self._task.title,
            float(result.get("elapsed_s") or 0.0),
            float(result.get("cpu_time_s") or 0.0),
        )
        try:
            written = await self._files.copy_streams_out(result)
            if failure is None:
                written += await self._files.copy_out()
        except MissingFile as missing:
            failure = failure or await self._judge_missing(missing)
        except (HostMainError, TemporaryExit):
            if failure is None:
                raise
        self._command_cpu_s = max(self._command_cpu_s, float(result.get("cpu_time_s") or 0.0))
        if failure is not None:
            lines = decisions.tail(str(result.get("stderr_tail") or result.get("err") or ""))
            quote(f"{self._task.title} stderr", lines, at_the_end=True)
            raise failure
        self._files.make_durable(written)
        self._context.timeline.mark("files out")

    def _complain_of_kill(self, result: Mapping[str, Any]) -> None:
        """VmTrouble when something killed the program in the guest, and it may be begun again."""
        killed = decisions.was_killed(result, time_limit_reached=self._time_limit_reached)
        if killed and self._killed.count < KILLED_LIMIT and self._machine.record.ours:
            self._killed.add()
            raise VmTrouble(f"{self._task.title} was killed (signal 9) in the guest, which has memory left")

    async def _judge_missing(self, missing: MissingFile) -> TaskFailed:
        """A file that the program has not made; VmTrouble when it went with the agent that had known the command."""
        hostmain = await self._machine.hostmain()
        if (await hostmain.query(self._machine.name, self.progress.command_id)).state != "finished":
            raise VmTrouble("the guest's agent was started anew before all results had been copied") from missing
        if missing.reason:
            return TaskFailed(
                f"{missing.path} cannot be copied from the guest after {self._task.title} has ended: {missing.reason}"
            )
        return TaskFailed(
            f"{missing.path} is missing in the guest after {self._task.title} has ended; "
            f"there is: {listed(missing.listing)}"
        )

    async def _count_as_done(self) -> None:
        """The outputs are safe. A snapshot if the VM is still needed, the checkpoint, then the agent may forget."""
        ledger, command_id = self._context.ledger, self.progress.command_id
        self._context.progress.follow(None)
        if self._machine.virtualmachine in self._users[self._index + 1 :]:
            await self._checkpoints.after_task(self._index)
        else:
            self._context.accounts.begin_task()
            ledger.progressed(replace(ledger.now, tasks_done=self._index + 1, current=None))
        self._context.runtime.checkpoint_completed()
        if self._machine.is_live:
            await self._forget(command_id)

    async def _forget(self, command_id: str) -> None:
        """Acknowledge a command that counts as done: the agent forgets it. Else the next task's start does so."""
        try:
            await (await self._machine.hostmain()).acknowledge(self._machine.name, command_id)
        except HostMainError as error:
            log.info("the agent was not told that %s is done: %s", command_id, error)
