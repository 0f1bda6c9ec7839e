"""How a guest task goes on after something went wrong at its VM, the guest or HostMain: waited, asked again, brought up
anew, an older state, a rest for the computer.

`after` returns when the next try is worth it; that begins with `Machine.bring_up`.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace

from vmcontrol.common.eventloop import sleep
from vmwrapper.context.context import JobContext
from vmwrapper.context.waiting import InARow, Patience
from vmwrapper.errors import TemporaryExit
from vmwrapper.vm import decisions, incident
from vmwrapper.vm.checkpoints import GuestCheckpoints
from vmwrapper.vm.machine import Machine
from vmwrapper.vm.trouble import (
    GuestFailed,
    GuestSilent,
    HostMainError,
    HostMainGone,
    HostMainSilent,
    HypervisorTrouble,
    VmTrouble,
    as_exit,
)

TROUBLE_LIMIT = 3
"""Recoveries without a checkpoint between them; then the computer gets a rest."""
TROUBLE_DELAY_S = 300
UNREACHABLE_PATIENCE_S = float(os.environ.get("VMWRAPPER_TEST_PATIENCE_S", "300"))
"""Un-suspended seconds for which a HostMain that cannot be reached is tried again. The variable is for tests."""
DEAD_LIMIT = 2
"""Temporary exits in a row for a guest that goes silent however it is brought back; then the job has failed."""
_AGAIN_S = 1.0

log = logging.getLogger(__name__)


class Recovery:
    """Of one guest task."""

    def __init__(self, context: JobContext, machine: Machine, checkpoints: GuestCheckpoints) -> None:
        self._context = context
        self._machine = machine
        self._checkpoints = checkpoints
        self._troubles = InARow(context.ledger)
        self._unheard = InARow(context.ledger)
        self._unreachable = Patience(context.control.work_clock.seconds, UNREACHABLE_PATIENCE_S)

    async def after(self, error: HostMainError | VmTrouble | TemporaryExit) -> None:
        """Return when the task is to be tried again. Raises how the job ends otherwise."""
        match error:
            case GuestSilent():
                await self._after_silence(error)
            case HostMainGone() | HostMainSilent() | VmTrouble():
                await self._bring_up_anew(error)
            case HypervisorTrouble():
                if not await self._passes_soon(error.key, error.reason):
                    raise as_exit(error) from error
            case TemporaryExit():
                if not await self._passes_soon(error.fault, error.reason):
                    raise error
            case _:
                if await self.still_up():
                    raise TemporaryExit(
                        f"HostMain could not do its work: {error}", fault="hostmain", delay_s=TROUBLE_DELAY_S
                    ) from error
                await self._bring_up_anew(error)

    async def still_up(self) -> bool:
        """Whether the VM runs, as far as is known."""
        try:
            hostmain = await self._machine.hostmain()
            return await hostmain.state(self._machine.name) in decisions.LIVE
        except HostMainError:
            return False

    async def _passes_soon(self, fault: str, reason: str) -> bool:
        """After a step that failed for what the computer lacks, with the VM up: whether to try again, after a while."""
        await self._checkpoints.settled()
        return await self.still_up() and await self._machine.held_up.passes(fault, reason)

    async def _after_silence(self, silent: GuestSilent) -> None:
        """After a question that the guest did not answer: one that is only slow is asked again, and nothing is lost."""
        if not await self.still_up():
            await self._bring_up_anew(silent)
            return
        log.warning("%s", silent)
        try:
            answers = self._unheard.add() <= TROUBLE_LIMIT and await self._machine.guest.answers(patient=True)
        except HostMainError as error:
            await self._bring_up_anew(error)
            return
        if not answers:
            why = incident.unheard(self._machine.guest.console(), str(silent))
            await self._bring_up_anew(GuestFailed(why, silent=True))

    async def _bring_up_anew(self, trouble: Exception) -> None:
        """After the VM, its agent or HostMain went away: the next try brings the VM up in the newest state."""
        await self._checkpoints.settled()
        if await self._passes(trouble):
            return
        log.warning("%s", trouble)
        if isinstance(trouble, GuestFailed):
            self._machine.guest.quote_console()
            await self._give_up_what_leads_there(trouble)
        troubles = self._troubles.add()
        if troubles > TROUBLE_LIMIT:
            await self._machine.discard()
            raise TemporaryExit(
                f"The virtual machine failed {troubles} times in a row: {trouble}",
                fault="vm-trouble",
                delay_s=TROUBLE_DELAY_S,
            ) from trouble
        if isinstance(trouble, VmTrouble) and await self.still_up():
            await self._machine.discard()  # it runs, but nobody in it answers
        self._machine.is_down()
        await sleep(self._context.reactor, _AGAIN_S if troubles > 1 else 0)

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

    async def _passes(self, trouble: Exception) -> bool:
        """Whether nothing is broken, and the next try only has to wait for what passes by itself.

        Raises TemporaryExit when HostMain cannot be reached for minutes; the VM is kept.
        """
        if not isinstance(trouble, HostMainGone | HostMainSilent):
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
