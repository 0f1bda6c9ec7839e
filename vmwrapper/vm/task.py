"""A guest task: its files go into the VM, its command runs there exactly once, its results come out.

Owns the `current` part of the checkpoint. The order of its steps is what docs/internals/exactly-once.md
promises: the command's id and attempt are durable before it is sent, the outputs are durable before the task counts as
done, and the agent is told to forget the command after that.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from twisted.internet.defer import Deferred, DeferredList, FirstError
from twisted.internet.task import LoopingCall

from vmcontrol.common.atomicfile import fsync_folder, write_atomically
from vmcontrol.common.beneath import held_folder, open_file
from vmcontrol.common.eventloop import sleep, start, start_logged
from vmcontrol.protocol.command import CommandStatus
from vmwrapper.context.context import JobContext
from vmwrapper.context.waiting import Patience
from vmwrapper.errors import TaskFailed, TemporaryExit
from vmwrapper.job.model import GuestOptions, Task
from vmwrapper.log import quote
from vmwrapper.names import snapshot_number
from vmwrapper.paths import listed, make_folder_for
from vmwrapper.state.accounts import task_fraction
from vmwrapper.state.checkpoint import GuestProgress, Phase
from vmwrapper.state.rollback import go_back, next_attempt
from vmwrapper.vm import decisions, incident
from vmwrapper.vm.checkpoints import GuestCheckpoints
from vmwrapper.vm.decisions import Copy, StartPlan, Watch, Way
from vmwrapper.vm.hostmain import (
    CallFailed,
    GuestSilent,
    HostClient,
    HostError,
    HostGone,
    HostSilent,
    HypervisorTrouble,
    MissingFile,
)
from vmwrapper.vm.machine import GuestFailed, Machine, StateLost, VmTrouble, as_exit
from vmwrapper.vm.sent import Life
from vmwrapper.vm.signs import SILENCE_S

TROUBLE_LIMIT = 3
"""Recoveries without a checkpoint between them; then the computer gets a rest."""
TROUBLE_DELAY_S = 300
UNREACHABLE_PATIENCE_S = float(os.environ.get("VMWRAPPER_TEST_PATIENCE_S", "300"))
"""Un-suspended seconds for which a HostMain that cannot be reached is tried again. The variable is for tests."""
KILLED_LIMIT = 1
"""How often, without a checkpoint between, a program that something killed in the guest is begun again."""
COPY_TRIES = 3
CANCEL_GRACE_S = 15.0
"""For a program to end by itself, as on the host (vmwrapper/process/patience.py, ABORT_S)."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)
_AGAIN_S = 1.0
_CHECKPOINT_LOOK_S = 1.0
CANCEL_SILENCE_S = min(60.0, SILENCE_S)
"""Of silence of a guest to which the end of its time limit cannot be told; then its VM is ended."""
DEAD_LIMIT = 2
"""Temporary exits in a row for a guest that goes silent however it is brought back; then the job has failed."""

log = logging.getLogger(__name__)


class LimitUnheard(Exception):  # noqa: N818
    """The program's time limit is over, and the guest cannot be told."""


class GuestTask:
    """One run of one task, from wherever the checkpoint says that it is."""

    def __init__(
        self,
        context: JobContext,
        machine: Machine,
        task: Task,
        *,
        index: int,
        command_id: str,
        arguments: Sequence[str],
        users: Sequence[str],
    ) -> None:
        """users: for each task of the job the VM that it uses, "" for none."""
        if task.guest is None:
            raise ValueError("not a guest task")
        self._context = context
        self._machine = machine
        self._task = task
        self._options: GuestOptions = task.guest
        self._index = index
        self._arguments = list(arguments)
        self._own_fraction: float | None = None
        self._command_cpu_s = 0.0
        self._cpu_of_earlier_tasks_s = machine.cpu_time_s()
        self._time_limit_reached = False
        self._running = False
        self._users = tuple(users)
        self._checkpoints = GuestCheckpoints(context, machine, self._options)
        self._checkpoints.on_progress = self._forgive
        self._troubles = self._killed = self._unheard = 0
        self._unreachable = Patience(context.control.work_clock.seconds, UNREACHABLE_PATIENCE_S)
        now = context.ledger.now
        if now.current is None or now.current.task != index:  # else its id counts, which an older version may have made
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

    async def host(self) -> HostClient:
        return await self._machine.host()

    def fraction(self) -> float | None:
        return task_fraction(self._own_fraction, self._options.job_duration_s, self._context.accounts.task_elapsed_s)

    def cpu_time_s(self) -> float:
        if self._options.cpu_time_source == "command":
            return self._command_cpu_s
        return self._machine.cpu_time_s() - self._cpu_of_earlier_tasks_s

    # --- the whole task

    async def run(self, finish: Callable[[GuestTask], Coroutine[Any, Any, None]]) -> None:
        """Returns when the outputs are safe on the host and `finish` has made the task count as done.

        What goes wrong in `finish` at HostMain or the VM is recovered from as everywhere else. Raises JobErrors,
        TemporaryExit.
        """
        self._context.accounts.use(self.cpu_time_s)
        ticking = LoopingCall(self._look)
        ticking.clock = self._context.reactor
        ticking.start(_CHECKPOINT_LOOK_S, now=False)
        try:
            while True:
                try:
                    return await self._once(finish)
                except GuestSilent as silent:
                    await self._recover_silent(silent)
                except (HostGone, HostSilent, VmTrouble) as trouble:
                    await self._recover(trouble)
                except HypervisorTrouble as trouble:
                    if not await self._passes_soon(trouble.key, trouble.reason):
                        raise as_exit(trouble) from trouble
                except TemporaryExit as leaving:
                    if not await self._passes_soon(leaving.fault, leaving.reason):
                        raise
                except HostError as error:
                    if await self._still_up():
                        raise TemporaryExit(
                            f"HostMain could not do its work: {error}", fault="hostmain", delay_s=TROUBLE_DELAY_S
                        ) from error
                    await self._recover(error)
        finally:
            ticking.stop()
            self._running = False
            self._context.accounts.settle()

    async def _passes_soon(self, fault: str, reason: str) -> bool:
        """After a step that failed for what the computer lacks, with the VM up: whether to try again, after a while."""
        self._running = False
        await self._checkpoints.settled()
        return await self._still_up() and await self._machine.held_up.passes(fault, reason)

    async def _still_up(self) -> bool:
        try:
            host = await self._machine.host()
            return await host.state(self._machine.name) in decisions.LIVE
        except HostError:
            return False

    async def _recover_silent(self, silent: GuestSilent) -> None:
        """After a question that the guest did not answer: one that is only slow is asked again, and nothing is lost."""
        if not await self._still_up():
            await self._recover(silent)
            return
        log.warning("%s", silent)
        self._unheard += 1
        try:
            answers = self._unheard <= TROUBLE_LIMIT and await self._machine.guest.answers(patient=True)
        except HostError as error:
            await self._recover(error)
            return
        if not answers:
            await self._recover(GuestFailed(incident.unheard(self._machine.guest.console(), str(silent)), silent=True))

    async def _recover(self, trouble: Exception) -> None:
        """After the VM, its agent or HostMain went away: the next try brings the VM up in the newest state."""
        self._running = False
        await self._checkpoints.settled()
        if await self._passes(trouble):
            return
        log.warning("%s", trouble)
        if isinstance(trouble, GuestFailed):
            self._machine.guest.quote_console()
            await self._give_up_what_leads_there(trouble)
        self._troubles += 1
        if self._troubles > TROUBLE_LIMIT:
            await self._machine.discard()
            raise TemporaryExit(
                f"The virtual machine failed {self._troubles} times in a row: {trouble}",
                fault="vm-trouble",
                delay_s=TROUBLE_DELAY_S,
            ) from trouble
        if isinstance(trouble, VmTrouble) and await self._still_up():
            await self._machine.discard()  # it runs, but nobody in it answers
        self._machine.is_down()
        await sleep(self._context.reactor, _AGAIN_S if self._troubles > 1 else 0)

    async def _give_up_what_leads_there(self, trouble: GuestFailed) -> None:
        """The second time in a row: what the VM was brought back to is no good. An older state, or a rest."""
        if not self._machine.went_back:
            return
        record = self._machine.record
        if record.snapshots and not (len(record.snapshots) == 1 and record.snapshots[0].proven):
            log.warning("snapshot %s leads there again: back to the state before it", record.snapshot)
            ledger = self._context.ledger
            ledger.keep(ledger.now.with_vm(replace(record, snapshots=record.snapshots[:-1], discard=True)))
        elif trouble.silent:
            await self._machine.discard()
            back = f"its snapshot {record.snapshot}" if record.snapshot else "the beginning"
            raise TemporaryExit(
                f"The virtual machine does not go on, not even from {back}: {trouble}",
                fault="guest-dead",
                delay_s=TROUBLE_DELAY_S,
                limit=DEAD_LIMIT,
            ) from trouble

    def _forgive(self) -> None:
        self._troubles = self._killed = self._unheard = 0

    async def _passes(self, trouble: Exception) -> bool:
        """Whether nothing is broken, and the next try only has to wait for what passes by itself.

        Raises TemporaryExit when HostMain cannot be reached for minutes; the VM is kept.
        """
        if not isinstance(trouble, HostGone | HostSilent):
            return await self._machine.held_up.is_so()
        if self._unreachable.is_new:
            log.warning("%s; nothing is given up, it is tried again", trouble)
        pause_s = self._unreachable.next_pause_s()
        if pause_s is None:
            raise TemporaryExit(
                f"The part of this job that drives the virtual machine cannot be reached: {trouble}",
                fault="hostmain-unreachable",
                delay_s=TROUBLE_DELAY_S,
            ) from trouble
        await sleep(self._context.reactor, pause_s)
        return True

    async def _once(self, finish: Callable[[GuestTask], Coroutine[Any, Any, None]]) -> None:
        self._machine.on_rollback = self._before_rollback
        await self._machine.bring_up()
        host = await self._machine.host()
        known = await self._tidy(host)
        step = decisions.next_step(self.progress, known)
        if isinstance(step, Watch):
            log.info("the guest has %s (attempt %d): %s", self._task.application, step.attempt, known and known.state)
            self._set_current(replace(self.progress, attempt=max(step.attempt, 1), phase=Phase.SENT))
        else:
            await self._send(host, step)
        try:
            result = await self._watch(host)
        except LimitUnheard as unheard:
            await self._end_unheard(unheard)
        else:
            await self._collect(result)
        await finish(self)

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

    async def _tidy(self, host: HostClient) -> CommandStatus | None:
        """What the agent knows of our command; every other command is cancelled or forgotten."""
        name = self._machine.name
        commands = await host.commands(name)
        for stranger in decisions.foreign(commands, self.progress.command_id):
            if stranger.state == "running":
                log.warning("cancelling command %s, which is not the current one", stranger.id)
                await self._cancel(host, stranger.id)
            await host.acknowledge(name, stranger.id)
        return next((command for command in commands if command.id == self.progress.command_id), None)

    async def _cancel(self, host: HostClient, id: str) -> CommandStatus:
        """Have a command ended and wait for its end."""
        view = await host.cancel(self._machine.name, id, CANCEL_GRACE_S)
        while view.state == "running":
            view = await host.wait_command(self._machine.name, id, view.version)
        return view

    # --- in

    async def _send(self, host: HostClient, step: decisions.Send) -> None:
        if step.rollback:
            log.warning(
                "rollback: %s is started again, attempt %d: %s", self._task.application, step.attempt, step.rollback
            )
        self._set_current(replace(self.progress, attempt=step.attempt, phase=Phase.PREPARING))
        if step.copy_files:
            for copy in decisions.files_in(self._task):
                await self._copy_in(copy)
        self._context.timeline.mark("files in")
        await self._context.control.may_work()
        ledger = self._context.ledger
        attempts = {**ledger.now.attempts, str(self._index): step.attempt}
        ledger.commit(current=replace(self.progress, phase=Phase.SENT), attempts=attempts)
        request = decisions.request(self._task, self.progress, self._arguments, step.attempt)
        log.info("running %s in the guest (%s, attempt %d)", self._task.application, request["id"], step.attempt)
        view = await host.run(self._machine.name, request)
        if view.state == "refused":
            raise GuestFailed(f"the guest refuses the command: {view.detail}")

    async def _copy_in(self, copy: Copy) -> None:
        if fault := self._context.fault_of_input(copy.logical):
            raise decisions.bad_input(self._context.source, self._task, copy.logical, copy.what, fault)
        local = self._context.path(copy.logical)
        try:
            await self._transfer(lambda host: host.put_file(self._machine.name, str(local), copy.remote))
        except MissingFile as missing:  # it went, or its disk has let us down, after the look above
            fault = f"cannot be copied into the guest: {missing.reason or 'it cannot be read'}"
            raise decisions.bad_input(self._context.source, self._task, copy.logical, copy.what, fault) from missing

    async def _transfer(self, move: Callable[[HostClient], Any]) -> None:
        """Copy a file; again when it broke off, for a suspension can do that."""
        for left in reversed(range(COPY_TRIES)):
            await self._context.control.may_work()
            host = await self._machine.host()
            try:
                await move(host)
            except (MissingFile, HypervisorTrouble):
                raise
            except HostError as error:
                if not left or not await self._still_up():
                    raise
                log.warning("%s; trying again", error)
                await sleep(self._context.reactor, _AGAIN_S)
            else:
                return

    # --- while it runs

    async def _watch(self, host: HostClient) -> Mapping[str, Any]:
        """Until the command has ended: its result. Raises LimitUnheard, GuestFailed, VmTrouble, HostErrors."""
        self._running = True
        self._context.accounts.program_runs(True)
        self._context.timeline.mark("run")
        start_logged(self._machine.guest.note_boot(), "the guest's uptime")
        waits: list[Deferred[Any]] = [start(self._finished(host)), start(self._ended()), start(self._silent())]
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
        host = await self._machine.host()
        trouble = (await host.info(self._machine.name)).trouble
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
        log.warning("%s has run for its time_limit of %s s: it is ended", self._task.application, limit_s)
        self._time_limit_reached = True
        while True:
            host = await self._machine.host()
            try:
                await host.cancel(self._machine.name, self.progress.command_id, CANCEL_GRACE_S)
            except GuestSilent as silent:
                log.warning("the guest could not be told that: %s", silent)
                if await self._machine.guest.is_silent(CANCEL_SILENCE_S):
                    raise LimitUnheard(str(silent)) from silent
                await self._context.control.may_work()
                await sleep(self._context.reactor, _AGAIN_S)
            except CallFailed as error:  # an agent of protocol 1 cannot end a command
                log.warning(
                    "%s cannot be ended in the guest, its own end is waited for: %s", self._task.application, error
                )
                break
            else:
                break
        await Deferred()

    async def _end_unheard(self, unheard: LimitUnheard) -> None:
        """The limit is over and the guest is dead: its VM is ended. Raises TaskFailed if anything in it is needed."""
        await self._checkpoints.settled()
        self._machine.guest.quote_console()
        name, limit = self._task.application, self._task.time_limit_s
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

    async def _finished(self, host: HostClient) -> Mapping[str, Any]:
        name, progress, version = self._machine.name, self.progress, 0
        while True:
            view = await host.wait_command(name, progress.command_id, version)
            version = view.version
            if view.fraction_done is not None:
                self._own_fraction = view.fraction_done
            self._command_cpu_s = max(self._command_cpu_s, view.cpu_time_s)
            if view.state == "finished":
                return view.result or {}
            if view.state != "running":
                asked = await host.query(name, progress.command_id)
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
            what = f"{self._task.application} at {self._context.accounts.elapsed_s:.0f} s"
            self._checkpoints.look(self.progress, what)

    async def count_as_done(self) -> None:
        """The VM is needed later: a snapshot of it with which this task counts as done."""
        await self._checkpoints.after_task(self._index)

    # --- out

    async def _collect(self, result: Mapping[str, Any]) -> None:
        """Outputs to the host, durable; then what the result means."""
        self._complain_of_kill(result)
        failure = decisions.verdict(self._task, result, time_limit_reached=self._time_limit_reached)
        log.info(
            "%s ended in the guest after %.2f s, %.2f s of CPU time",
            self._task.application,
            float(result.get("elapsed_s") or 0.0),
            float(result.get("cpu_time_s") or 0.0),
        )
        written: list[Path] = []
        try:
            for element, path in (("stdout", self._task.stdout_filename), ("stderr", self._task.stderr_filename)):
                source = str(result.get(f"{element}_path") or "")
                if path and source:
                    written.append(await self._copy_out(source, path))
                elif path:  # an agent of protocol 1 keeps no files
                    written.append(self._write_out(str(result.get(element.removeprefix("std")) or ""), path))
            if failure is None:
                for copy in decisions.files_out(self._task):
                    written.append(await self._copy_out(copy.remote, copy.logical))
        except MissingFile as missing:
            failure = failure or await self._judge_missing(missing)
        except (HostError, TemporaryExit):
            if failure is None:
                raise
        self._command_cpu_s = max(self._command_cpu_s, float(result.get("cpu_time_s") or 0.0))
        if failure is not None:
            lines = decisions.tail(str(result.get("stderr_tail") or result.get("err") or ""))
            quote(f"{self._task.application} stderr", lines, at_the_end=True)
            raise failure
        for local in written:
            _fsync(local, self._context.names.base)
        self._context.timeline.mark("files out")

    def _complain_of_kill(self, result: Mapping[str, Any]) -> None:
        """VmTrouble when something killed the program in the guest, and it may be begun again."""
        killed = decisions.was_killed(result, time_limit_reached=self._time_limit_reached)
        if killed and self._killed < KILLED_LIMIT and self._machine.record.ours:
            self._killed += 1
            raise VmTrouble(f"{self._task.application} was killed (signal 9) in the guest, which has memory left")

    async def _judge_missing(self, missing: MissingFile) -> TaskFailed:
        """A file that the program has not made; VmTrouble when it went with the agent that had known the command."""
        host = await self._machine.host()
        if (await host.query(self._machine.name, self.progress.command_id)).state != "finished":
            raise VmTrouble("the guest's agent was started anew before all results had been copied") from missing
        if missing.reason:
            return TaskFailed(
                f"{missing.path} cannot be copied from the guest after {self._task.application} has ended: "
                f"{missing.reason}"
            )
        return TaskFailed(
            f"{missing.path} is missing in the guest after {self._task.application} has ended; "
            f"there is: {listed(missing.listing)}"
        )

    async def _copy_out(self, remote: str, logical: str) -> Path:
        local = self._place_for(logical)
        await self._transfer(lambda host: host.get_file(self._machine.name, remote, str(local)))
        return local

    def _write_out(self, content: str, logical: str) -> Path:
        local = self._place_for(logical)
        try:
            with held_folder(local.parent, self._context.names.base) as folder:
                write_atomically(folder / local.name, content.encode(errors="replace"))
        except OSError as error:
            raise _cannot_write(local, error) from error
        return local

    def _place_for(self, logical: str) -> Path:
        """Where an output goes: the project's file is meant, not the client's link to it. Its folders are made."""
        try:
            local = self._context.names.target(logical)
            make_folder_for(local, self._context.slot_folder)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise TaskFailed(
                    f"{self._context.source}:{self._task.line}: {logical} cannot be written: it {error.strerror}"
                ) from error
            raise _cannot_write(Path(logical), error) from error
        return local

    async def forget(self, command_id: str) -> None:
        """The agent may forget a command that counts as done; if it is not told now the next task's start does it."""
        try:
            await (await self._machine.host()).acknowledge(self._machine.name, command_id)
        except HostError as error:
            log.info("the agent was not told that %s is done: %s", command_id, error)


def _cannot_write(local: Path, error: OSError) -> TemporaryExit:
    if error.errno in _NO_ROOM:  # waited for while the VM is up (vmwrapper.vm.held_up)
        reason = f"{local} cannot be written ({error.strerror}): free some space on BOINC's disk"
        return TemporaryExit(reason, fault="output-file", delay_s=TROUBLE_DELAY_S)
    reason = f"{local} cannot be written: {error.strerror}"
    return TemporaryExit(reason, fault="output-place", delay_s=TROUBLE_DELAY_S)


def _fsync(path: Path, base: Path | None) -> None:
    fd = open_file(path, base, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    fsync_folder(path.parent)
