"""One VM of the job: brought up in the right state, paused and resumed, snapshotted, saved, deleted.

Owns the VM's record in the checkpoint. The state of the VM is always asked of the hypervisor (through HostMain), and
nothing is done to it while another step on it is under way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import Deferred, DeferredLock

from vmcontrol.common.eventloop import LimitReached, is_over, start_logged, with_limit
from vmcontrol.protocol import vmlimits
from vmwrapper.context.context import JobContext
from vmwrapper.context.readiness import Requirement
from vmwrapper.errors import BadInput, TemporaryExit
from vmwrapper.job.model import GuestOptions
from vmwrapper.names import snapshot_name, snapshot_number
from vmwrapper.paths import is_file
from vmwrapper.state.checkpoint import VmRecord
from vmwrapper.vm import decisions, incident
from vmwrapper.vm.cpu import VmCpuTime
from vmwrapper.vm.decisions import StartPlan, Way
from vmwrapper.vm.held_up import HeldUp
from vmwrapper.vm.services import Services
from vmwrapper.vm.signs import GuestSigns
from vmwrapper.vm.trouble import (
    CallFailed,
    GuestFailed,
    HostMainError,
    HypervisorTrouble,
    Refused,
    StateLost,
    VmTrouble,
    as_exit,
)
from vmwrapper.vm.wishes import Wishes

if TYPE_CHECKING:
    from vmwrapper.vm.hostmain import HostMainClient

RETRY_DELAY_S = 300
"""Seconds until a VM that would not come up is tried again."""
_PERFORMANCE_EVERY_S = 10.0
"""Between questions for CPU time where the VM's process cannot be looked at."""

T = TypeVar("T")
log = logging.getLogger(__name__)


class Machine:
    """A VM while tasks use it."""

    def __init__(  # noqa: PLR0917 (of one caller)
        self,
        context: JobContext,
        services: Services,
        options: GuestOptions,
        record: VmRecord,
        image: Path | None,
        disks: Sequence[Path] = (),
    ) -> None:
        """record: as it is in the checkpoint, or as it is to be there once the VM is made. disks: of containers."""
        self._context = context
        self.name = record.name
        self.virtualmachine = record.virtualmachine
        self._first_record = record
        self._image = image
        self._disks = tuple(map(str, disks))
        self._options = options
        self.hostmain = services.hostmain
        self._lock = DeferredLock()
        self._wishes = Wishes(
            context, record.name, has_network=options.settings.network, hostmain=services.hostmain, locked=self._locked
        )
        self._cpu = VmCpuTime(context.reactor.seconds)
        self.held_up = HeldUp(context, record.name, services.hostmain)
        self.guest = GuestSigns(context, record.name, services.hostmain)
        self.other_pid = 0
        """To be reported to the client: the VM's process, when it does not descend from us."""
        self.remote_desktop_address = ""
        self._performance: Deferred[object] | None = None
        self._asked_at = float("-inf")
        self.went_back = False
        """It was brought up from a snapshot, or made anew, and the job has not got further since."""
        self._way = Way.CREATE

    @property
    def record(self) -> VmRecord:
        """Its record, newest on disk."""
        return next((vm for vm in self._context.ledger.now.vms if vm.name == self.name), self._first_record)

    def _keep(self, record: VmRecord) -> None:
        self._context.ledger.keep(self._context.ledger.now.with_vm(record))

    # --- up

    async def bring_up(self, on_rollback: Callable[[StartPlan], None]) -> None:
        """Bring it to Running with its agent connected, in the newest consistent state.

        Calls on_rollback first if that state may predate the last command; it may raise StateLost. Raises VmTrouble
        when the VM dies before its agent comes, TemporaryExit when the agent does not come, TemporaryExit and
        SubTaskFailed for the computer's trouble.
        """
        await self._context.control.may_work()
        try:
            if self.is_live:
                await self._locked(self.held_up.wait())
            await self._locked(self._start(on_rollback))
        except HypervisorTrouble as trouble:
            raise as_exit(trouble) from trouble
        await self._wait_agent()

    async def _start(self, on_rollback: Callable[[StartPlan], None]) -> None:
        hostmain = await self.hostmain()
        record = self.record
        available = await hostmain.available()
        if record not in self._context.ledger.now.vms:
            if record.ours and self.name in available:
                log.warning("VM %s is there, but no checkpoint tells what is in it: it is deleted", self.name)
                await hostmain.delete(self.name)
                available.remove(self.name)
            self._keep(record)  # before it exists: the next start finds and removes it
        state, snapshots, unusable = await self._look_at(hostmain, record) if self.name in available else (None, (), "")
        if state is None and not record.ours:
            raise BadInput(
                f"there is no virtual machine {self.name}, and the job file names no <image> to make it from"
            )
        plan = decisions.plan_start(record, state, snapshots, unusable)
        self._tell(plan, known=state is not None or record.saved_state_expected)
        if record.saved_state_expected:
            self._keep(replace(record, saved_state_expected=False))
        if record.snapshot and plan.way in (Way.CREATE, Way.RECREATE):
            raise StateLost(f"VM {self.name} has lost its snapshot {record.snapshot}: {plan.why}")
        if plan.rolled_back:
            on_rollback(plan)
        self.went_back = plan.way in (Way.RESTORE, Way.RECREATE)
        self._way = plan.way
        self.guest.begins()
        await self._carry_out(hostmain, plan)
        if self.record.discard:
            self._keep(replace(self.record, discard=False))
        info = await hostmain.info(self.name)
        self._wishes.live = True
        self._cpu.begin(info.pid or 0, found_running=plan.way is Way.TAKE_OVER)
        self.other_pid = 0 if info.vm_is_descendant else info.pid or 0
        self.remote_desktop_address = info.remote_desktop_address or ""
        self._context.ready.reached(Requirement.VM)
        self.drop_old_snapshots()
        await self._wishes.began(hostmain, paused=info.state == "Paused")

    async def _look_at(self, hostmain: HostMainClient, record: VmRecord) -> tuple[str | None, Sequence[str], str]:
        """State, snapshots and what makes it unusable of the VM, which is there.

        Off when nothing that it holds is to be gone on with.
        """
        if not record.ours:
            await hostmain.take(self.name)
        if record.discard:
            await hostmain.power_off(self.name)
        info = await hostmain.info(self.name)
        return info.state, info.snapshots, info.unusable

    def _tell(self, plan: decisions.StartPlan, *, known: bool) -> None:
        """Why it is brought up in this way, unless it just goes on. known: something of it was there before."""
        if plan.way is not Way.TAKE_OVER:
            self.is_down()
        if known and not self.is_live:
            log.info("VM %s: %s", self.name, plan.why)

    async def _carry_out(self, hostmain: HostMainClient, plan: decisions.StartPlan) -> None:
        if plan.way is Way.TAKE_OVER:
            state = await hostmain.wait_vm(self.name, ["Running", "Paused", *decisions.DEAD])
            if state not in ("Running", "Paused"):
                raise VmTrouble(f"VM {self.name} is {state}")
            return
        if plan.way is Way.RECREATE:
            await hostmain.delete(self.name)
        if plan.way in (Way.CREATE, Way.RECREATE):
            if self._image is None or not is_file(self._image):
                raise BadInput(f"the image {self._image or self._options.image} is not there")
            settings = replace(self._options.settings, cpus=await self._cpus(hostmain), disks=self._disks)
            try:
                made = await hostmain.define(self.name, str(self._image.absolute()), settings)
            except Refused as refused:
                raise BadInput(f"the virtual machine cannot be made: {refused}") from refused
            except CallFailed as error:  # there is no VM yet that could have failed
                why = f"The virtual machine could not be made: {error}"
                raise TemporaryExit(why, fault="vm-not-made", delay_s=RETRY_DELAY_S) from error
            if not made:
                log.warning("VM %s was there although HostMain did not list it", self.name)
            log.info("VM %s is made from %s", self.name, self._image.name)
        if plan.way is Way.RESTORE:
            await hostmain.restore_snapshot(self.name, plan.snapshot)
        await hostmain.start(self.name)

    def _ncpus(self) -> float:
        return self._context.options.nthreads or self._context.init_data.ncpus

    async def _cpus(self, hostmain: HostMainClient) -> int:
        """How many processors it gets. Logs what is odd about that, or about its memory."""
        import psutil  # late: it takes 20 ms, in which HostMain can start

        wanted = decisions.wanted_cpus(self._options, self._ncpus())
        most = await hostmain.max_cpus() if wanted > vmlimits.SAFE_CPUS else wanted
        cpus, line = decisions.capped_cpus(self._options, wanted, most)
        there = {"there_mb": psutil.virtual_memory().total // 1024 // 1024, "there_cpus": psutil.cpu_count() or 1}
        for warning in [line, *vmlimits.more_than_there_is(self._options.settings.memory_mb, cpus, **there)]:
            if warning:
                log.warning("%s", warning)
        return cpus

    async def _wait_agent(self) -> None:
        """Until the agent is there, at most boot_timeout of un-suspended time."""
        limit = self._options.boot_timeout_s
        try:
            await with_limit(self._context.control.work_clock, limit, "the guest agent", self._agent_there())
        except LimitReached as error:
            if self._way not in (Way.CREATE, Way.RECREATE, Way.BOOT):  # it did not boot: what it goes on from is dead
                raise GuestFailed(
                    f"the guest did not answer within {limit:g} s after it was brought back", silent=True
                ) from error
            self.guest.quote_console()
            await self.discard()
            raise TemporaryExit(
                f"The virtual machine was started, but the program in it did not answer within {limit:g} s. "
                "The computer may be too slow or too busy for it",
                fault="guest-silent",
                delay_s=RETRY_DELAY_S,
            ) from error
        self._context.ready.reached(Requirement.AGENT)

    async def _agent_there(self) -> None:
        while True:
            hostmain = await self.hostmain()
            if await hostmain.wait_guest(self.name):
                return
            state = await hostmain.state(self.name)
            if state not in decisions.LIVE:
                raise VmTrouble(f"before its agent came: {incident.ended(self.name, self.guest.console(), state, '')}")

    async def died(self) -> str:
        """Wait until the VM does not run any more; its state then, or what is known."""
        while True:
            hostmain = await self.hostmain()
            state = await hostmain.wait_vm(self.name, decisions.ENDED)
            if state in decisions.ENDED:
                return state

    def is_down(self) -> None:
        """Note that it does not run any more."""
        self._wishes.over()
        self._cpu.end()
        self.other_pid = 0
        self._context.ready.gone(Requirement.VM, Requirement.AGENT)

    @property
    def is_live(self) -> bool:
        """Whether it was last seen running or paused."""
        return self._wishes.live

    # --- snapshots

    async def snapshot(self, description: str) -> str:
        """A new snapshot; its name. It counts once a checkpoint names it. Raises HostMainErrors."""
        return await self._locked(self._snapshot(description))

    async def _snapshot(self, description: str) -> str:
        hostmain = await self.hostmain()
        number = max([self._context.ledger.now.snapshots_made, *map(_number, [self.record.snapshot])]) + 1
        name = snapshot_name(number)
        began = self._context.reactor.seconds()
        try:
            await hostmain.save_snapshot(self.name, name, description)
        except HostMainError:
            await self._look_whether_it_stands(hostmain)
            raise
        log.info("snapshot %s of VM %s in %.2f s", name, self.name, self._context.reactor.seconds() - began)
        return name

    async def _look_whether_it_stands(self, hostmain: HostMainClient) -> None:
        """After a snapshot that failed: a VM that did not go on is resumed."""
        try:
            self._wishes.look_again(paused=(await hostmain.info(self.name)).state == "Paused")
        except HostMainError as error:
            log.info("VM %s: not known whether it goes on: %s", self.name, error)

    def drop_old_snapshots(self) -> None:
        """Delete our snapshots that the checkpoint does not name. Nobody waits: what stays goes after the next one."""
        start_logged(self._drop_old_snapshots(), f"old snapshots of {self.name}")

    async def _drop_old_snapshots(self) -> None:
        try:
            await self._locked(self._drop_snapshots(every=False))
        except HostMainError as error:
            log.warning("VM %s: an old snapshot stays for now: %s", self.name, error)

    async def make_room(self) -> None:
        """Delete all our snapshots, for a new one does not fit beside them. Raises HostMainErrors."""
        await self._locked(self._drop_snapshots(every=True))

    async def _drop_snapshots(self, *, every: bool) -> None:
        hostmain = await self.hostmain()
        kept = () if every else {snapshot.name for snapshot in self.record.snapshots}
        info = await hostmain.info(self.name)
        for name in info.snapshots:
            if snapshot_number(name) is not None and name not in kept:
                await hostmain.delete_snapshot(self.name, name)

    # --- down

    async def save(self) -> None:
        """Bring it to Saved: no task needs it now, a later one does."""
        await self._locked(self._save())

    async def _save(self) -> None:
        hostmain = await self.hostmain()
        await hostmain.save_state(self.name)
        self.is_down()
        self._keep(replace(self.record, saved_state_expected=True))

    async def discard(self) -> None:
        """Switch it off without keeping its memory; the checkpoint says so first."""
        self.is_down()
        if self.record in self._context.ledger.now.vms:
            self._keep(replace(self.record, discard=True, saved_state_expected=False))
        try:
            await (await self.hostmain()).power_off(self.name)
        except HostMainError as error:
            log.warning("VM %s could not be switched off: %s", self.name, error)

    async def remove(self) -> None:
        """Delete it with its media, or release it when it was there before us: no task needs it any more."""
        self.is_down()
        hostmain = await self.hostmain()
        if self.record.ours:
            await hostmain.delete(self.name)
        else:
            await hostmain.release(self.name)
        self._context.ledger.keep(self._context.ledger.now.without_vm(self.name))
        self.close()

    def close(self) -> None:
        """Stop following the client's wishes."""
        self._wishes.close()

    # --- CPU time

    def cpu_time_s(self) -> float:
        """CPU seconds of the VM's processes since this object was made, over all its starts. Never goes back."""
        if (
            self.is_live
            and not self._cpu.is_watched
            and is_over(self._performance)
            and self._context.reactor.seconds() - self._asked_at > _PERFORMANCE_EVERY_S
        ):
            self._asked_at = self._context.reactor.seconds()
            self._performance = start_logged(self._ask_performance(), "performance data")
        return self._cpu.total_s()

    async def _ask_performance(self) -> None:
        try:
            figures = await (await self.hostmain()).performance(self.name)
            self._cpu.told(figures.get("cpu_time_s", 0.0))
        except HostMainError as error:
            log.debug("no performance data: %s", error)

    def memory_bytes(self) -> int:
        return self._cpu.memory_bytes()

    async def _locked(self, work: Coroutine[Any, Any, T]) -> T:
        """One step on the VM at a time."""
        try:
            await self._lock.acquire()
        except BaseException:
            work.close()
            raise
        try:
            return await work
        finally:
            self._lock.release()


def _number(name: str) -> int:
    return snapshot_number(name) or 0
