"""What tasks of the host leave running when they have ended: a server for the tasks that follow, or a worker whose
launcher ends first. It goes on with the job, and is waited for at its end.

    Activity        what some processes have done so far (pure once it was looked at)
    LeftRunning     all that finished tasks have left

Owns the part `left_running` of the checkpoint: a restart finds nothing of it any more, so the task that had left it has
to run again as long as there are later ones. Suspension and CPU time are `vmwrapper.process.family`'s business.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from twisted.internet.defer import DeferredList

from vmcontrol.common.eventloop import sleep, start
from vmcontrol.common.proctable import Entry
from vmwrapper.context.context import JobContext
from vmwrapper.errors import TemporaryExit
from vmwrapper.host.task import HostProgram
from vmwrapper.process.ending import named
from vmwrapper.process.patience import ABORT_S, Patience

WAIT_S = 60.0
"""For what is still at work after the last task."""
IDLE_S = 5.0
"""What has neither computed nor written for so long has nothing to finish."""
BUSY = 0.01
"""Part of a processor above which it computes: below are servers that only look for work now and then."""
LOOK_S = 0.5

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Activity:
    """What some processes have done, up to one moment."""

    cpu_time_s: float = 0.0
    written: int = 0
    """Bytes that they have written, to files or others, and that the files have which they have open."""
    waits_for_disk: bool = False

    def is_work_since(self, before: Activity, seconds: float) -> bool:
        """Whether something was done in these seconds. A process that has ended takes its sums with it: that counts."""
        if self.waits_for_disk or self.written != before.written:
            return True
        return abs(self.cpu_time_s - before.cpu_time_s) >= BUSY * seconds

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Activity:
        """As it is now. What cannot be seen of a process counts as nothing."""
        members = list(entries)
        return cls(
            sum(entry.cpu_time_s for entry in members),
            sum(_bytes_written(entry.pid) + _bytes_of_files(entry.pid) for entry in members),
            any(entry.state == "D" for entry in members),
        )


def _bytes_written(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/io").read_text("ascii").splitlines():
            if line.startswith("wchar:"):
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _bytes_of_files(pid: int) -> int:
    """Sizes of the regular files that it has open: others may write them for it."""
    total = 0
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 (names are wanted)
            found = os.stat(f"/proc/{pid}/fd/{number}")  # noqa: PTH116
            total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    except OSError:
        pass
    return total


class LeftRunning:
    """What is left of the tasks that are done."""

    def __init__(self, context: JobContext) -> None:
        self._context = context
        self._programs: dict[int, HostProgram] = {}
        self._to_run_again: list[int] = list(context.ledger.now.left_running)

    def to_run_again(self) -> list[int]:
        """Indices of tasks whose processes went with the last run."""
        return list(self._to_run_again)

    def ran_again(self, index: int) -> None:
        """It has, or need not any more."""
        self._to_run_again = [one for one in self._to_run_again if one != index]

    def add(self, index: int, program: HostProgram) -> None:
        """A task has ended well. Notes and tells what it has left, if anything."""
        if program.left_running:
            log.info("task %d has ended and leaves running: %s", index + 1, named(program.left_running))
            self._programs[index] = program

    def indices(self) -> tuple[int, ...]:
        """For the checkpoint: tasks whose processes run, or will when they have run again."""
        return tuple(sorted({*self._programs, *self._to_run_again}))

    def look(self) -> None:
        """Once a second: what has ended by itself is not waited for, and its task not run again."""
        if not self._programs:
            return
        self._drop_ended()
        ledger = self._context.ledger
        known = tuple(index for index in self.indices() if index < ledger.now.tasks_done)
        if known != ledger.now.left_running:
            try:
                ledger.keep(replace(ledger.now, left_running=known))
            except TemporaryExit as trouble:  # then the task only runs again without need
                log.debug("%s", trouble.reason)

    def _drop_ended(self) -> None:
        for index, program in tuple(self._programs.items()):
            if not program.is_there():
                del self._programs[index]

    async def settle(self) -> None:
        """After the last task: wait for what still works, at most WAIT_S of un-suspended time, and end the rest."""
        clock, control = self._context.control.work_clock, self._context.control
        self._drop_ended()
        if not self._programs:
            return
        log.info("waiting for what tasks have left running, as long as it works, at most %g s", WAIT_S)
        end = clock.seconds() + WAIT_S * Patience.scale
        before, looked_at = Activity.of(self._members()), clock.seconds()
        idle_at = looked_at + IDLE_S * Patience.scale
        while self._programs and clock.seconds() < min(end, idle_at):
            await control.may_work()
            await sleep(clock, LOOK_S * Patience.scale)
            self._drop_ended()
            now, passed = Activity.of(self._members()), clock.seconds() - looked_at
            if now.is_work_since(before, passed):
                idle_at = clock.seconds() + IDLE_S * Patience.scale
            before, looked_at = now, clock.seconds()
        if self._programs:
            why = "it still works" if clock.seconds() >= end else "it neither computes nor writes"
            log.info("%s: ending %s, which a task has left", why, named(self._members()))
            await self.end(Patience(clock, ABORT_S))

    def _members(self) -> list[Entry]:
        return [entry for program in self._programs.values() for entry in program.members()]

    async def end(self, patience: Patience, *, first: int = 0) -> None:
        """End it all, side by side. first: only what this task and later ones have left."""
        chosen = {index: program for index, program in self._programs.items() if index >= first}
        if chosen:
            await DeferredList([start(program.end(patience)) for program in chosen.values()], consumeErrors=True)
        for index in chosen:
            del self._programs[index]

    async def before(self, index: int) -> None:
        """A task is about to run. After a rollback it and later ones had run already: what they left goes first."""
        self._to_run_again = [one for one in self._to_run_again if one < index]
        await self.end(Patience(self._context.control.work_clock, ABORT_S), first=index)
