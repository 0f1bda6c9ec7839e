"""Checkpoints of a guest task: a snapshot of a guest that answers, which counts when the guest has answered after it.

Owns when the next one is due, and the order: the guest answers; snapshot; the checkpoint names it beside the one before
it; the guest answers again; the checkpoint names it alone; checkpoint_completed for the client; the older snapshot
goes. So there is always a snapshot after which its guest has answered, unless the disk has no room for two
(`has_room`).
"""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
from dataclasses import replace
from typing import Any

from twisted.internet.defer import Deferred

from vmcontrol.common.diskusage import disk_usage
from vmcontrol.common.eventloop import is_over, sleep, start_logged
from vmwrapper.context.background import in_background
from vmwrapper.context.context import JobContext
from vmwrapper.errors import TemporaryExit
from vmwrapper.job.model import GuestOptions
from vmwrapper.names import snapshot_number
from vmwrapper.state.checkpoint import GuestProgress, SnapshotRecord
from vmwrapper.state.rollback import proven, with_snapshot
from vmwrapper.vm.machine import Machine
from vmwrapper.vm.trouble import GuestFailed, HostMainError

_FAILED_CHECKPOINT_S = 60.0
"""Shortest time until a checkpoint that failed is tried again: the client goes on wanting one."""
_SPREAD = 0.25
"""Part of the checkpoint interval by which it is lengthened at random, so that slots do not all snapshot at once."""
_MIB = 1 << 20

log = logging.getLogger(__name__)


class GuestCheckpoints:
    """Of one guest task."""

    def __init__(self, context: JobContext, machine: Machine, options: GuestOptions) -> None:
        self._context = context
        self._machine = machine
        self._options = options
        self._interval_s = spread(options.minimum_checkpoint_interval_s)
        self._due = context.control.work_clock.seconds() + self._interval_s
        self._under_way: Deferred[object] | None = None

    def look(self, progress: GuestProgress, what: str) -> None:
        """Once a second while the command runs. what: describes the snapshot."""
        clock = self._context.control.work_clock
        if (
            not is_over(self._under_way)
            or self._context.control.suspended
            or self._context.control.ending is not None
            or self._options.disable_automatic_checkpoints
            or clock.seconds() < self._due
            or not self._context.runtime.time_to_checkpoint()
        ):
            return
        self._due = clock.seconds() + self._interval_s
        self._under_way = start_logged(self._checkpoint(progress, what), "checkpoint")

    @property
    def is_under_way(self) -> bool:
        """Whether a snapshot may be being taken, which has no number yet."""
        return not is_over(self._under_way)

    async def settled(self) -> None:
        """Until none is under way: a step of it may be at the hypervisor."""
        while not is_over(self._under_way):
            await sleep(self._context.reactor, 0.05)

    async def _checkpoint(self, progress: GuestProgress, what: str) -> None:
        try:
            await self._take(progress.task, progress, what)
            self._counts()
            self._machine.drop_old_snapshots()
        except (HostMainError, TemporaryExit, GuestFailed) as error:
            log.warning("no checkpoint this time: %s", error)
            self._context.runtime.end_critical_section()
            clock = self._context.control.work_clock
            self._due = clock.seconds() + max(self._interval_s, _FAILED_CHECKPOINT_S)
        except BaseException:
            self._context.runtime.end_critical_section()
            raise
        else:
            self._context.runtime.checkpoint_completed()

    async def after_task(self, index: int) -> None:
        """A snapshot of a VM that later tasks need, and with it task `index` counts as done.

        Raises HostMainErrors, GuestFailed.
        """
        await self._take(index + 1, None, f"after task {index + 1}", patient=True)
        self._context.accounts.begin_task()
        self._counts(tasks_done=index + 1, current=None)

    async def _take(self, tasks_done: int, current: GuestProgress | None, what: str, *, patient: bool = False) -> None:
        """A snapshot, named by the checkpoint, after which the guest has answered."""
        machine, ledger, accounts = self._machine, self._context.ledger, self._context.accounts
        if not await machine.guest.answers(patient=patient):
            raise GuestFailed("the guest does not answer; no snapshot is taken of it", silent=True)
        if machine.record.snapshots and not machine.record.snapshots[-1].proven:
            self._counts()
        elapsed_s = accounts.task_elapsed_s if current is not None else 0.0
        entry = SnapshotRecord("", False, tasks_done, current, round(accounts.cpu_time_s, 3), round(elapsed_s, 3))
        if machine.record.snapshots and not await self._has_room():
            log.info("there is no room for two snapshots: the older one goes first, while the guest answers")
            await machine.make_room()
        name = await machine.snapshot(what)
        number = max(ledger.now.snapshots_made, snapshot_number(name) or 0)
        record = with_snapshot(machine.record, replace(entry, name=name))
        ledger.keep(replace(ledger.now.with_vm(record), snapshots_made=number))
        if not await machine.guest.answers(patient=patient):
            raise GuestFailed(f"the guest does not answer since snapshot {name} was taken", silent=True)

    def _counts(self, **changes: Any) -> None:
        """The guest has answered since its newest snapshot was taken: a rollback leads there, and nowhere else."""
        ledger, record = self._context.ledger, proven(self._machine.record)
        ledger.progressed(replace(ledger.now.with_vm(record), **changes), cpu_time_s=record.snapshots[-1].cpu_time_s)
        self._machine.went_back = False

    async def _has_room(self) -> bool:
        """Whether another snapshot of this VM fits into the slot's bounds beside the one that is there."""
        if not self._machine.record.ours:
            return True  # its files are not in the slot
        folder, size = self._context.slot_folder, self._options.settings.memory_mb * _MIB
        if resident := self._machine.memory_bytes():
            size = min(size, resident)  # what the guest has never touched is not in a snapshot
        used = await in_background(self._context.reactor, self._context.control, lambda _: disk_usage(folder))
        with contextlib.suppress(OSError):
            return has_room(used, size, shutil.disk_usage(folder).free, self._context.init_data.rsc_disk_bound)
        return True


def has_room(used: int, size: int, free: int, bound: float) -> bool:
    """Whether `size` more bytes fit. used: by the slot. free: on its disk. bound: of the job; 0: none."""
    return size <= free and (bound <= 0 or used + size <= bound)


def spread(interval_s: float) -> float:
    """An interval, a little longer by chance."""
    return interval_s * (1 + _SPREAD * random.random())  # noqa: S311 (nobody gains from guessing it)
