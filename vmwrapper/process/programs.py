"""All programs of a run on the host, together: stopped and let go on, their CPU time and memory, their control group.

Owns the sum of the CPU time of what has ended, with orphans that were waited for (`orphans.set_owner`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from vmcontrol.common import proctable
from vmcontrol.common.proctable import Entry
from vmwrapper.process import cgroups
from vmwrapper.process.cgroups import Group
from vmwrapper.process.family import ProcessFamily
from vmwrapper.process.orphans import HOST_MARK, set_owner

LOOK_S = 0.9
"""CPU time and memory are reported once a second."""


class HostPrograms:
    """The programs of a run."""

    def __init__(
        self, reactor: Any, token: str, *, stop_signal: int | None = None, note_group: Callable[[str], None]
    ) -> None:
        """stop_signal: SIGTSTP in place of SIGSTOP (--use_tstp). note_group: write down the run's control group."""
        self.reactor = reactor
        self.token = token
        self.stop_signal = stop_signal
        self._note_group = note_group
        self._group: Group | None = None
        self._may_group = stop_signal is None  # a program that is to see the signal must not be frozen before
        self.lost_cpu_s = 0.0
        """Of processes that had ended and that nobody had waited for; only a control group knows."""
        self.ended_cpu_s = 0.0
        """Of programs and orphans that have ended, with the children that they had waited for."""
        self.are_alone = True
        """No VMmanage task was started in this run: every orphan comes of a host program."""
        self._count = 0
        self._living: list[ProcessFamily] = []
        self._seen_cpu_s, self._seen_memory, self._look_at = 0.0, 0, 0.0
        self._suspended = False
        set_owner(self)

    def begin(self, *, multi_process: bool) -> ProcessFamily:
        """For a program that is about to be started."""
        self._count += 1
        family = ProcessFamily(self, f"{self.token}{HOST_MARK}{self._count}", multi_process=multi_process)
        self._living.append(family)
        return family

    def forget(self, family: ProcessFamily) -> None:
        with contextlib.suppress(ValueError):
            self._living.remove(family)
        self._look_at = 0.0

    def lives(self, family: ProcessFamily) -> bool:
        return family in self._living

    def has_seen(self, entry: Entry, *, but: ProcessFamily | None = None) -> bool:
        """Whether this process is known to come of one of the programs (other than `but`)."""
        return any(family.has_seen(entry.key) for family in self._living if family is not but)

    def is_ours(self, pid: int) -> bool:
        """Whether an orphan is known to come of a host program that is not over."""
        entry = proctable.look_at(pid)
        return entry is not None and self.has_seen(entry)

    def collected(self, pid: int, cpu_time_s: float) -> None:
        """An orphan has ended, and was waited for. One that nobody had seen is ours if nothing else runs."""
        if self.are_alone or any(family.has_seen_pid(pid) for family in self._living):
            self.ended_cpu_s += cpu_time_s

    def make_group(self, name: str) -> Group | None:
        """A control group for one program; None where that is not possible."""
        if self._may_group and self._group is None:
            self._group = cgroups.open_group(self.token)
            try:
                if self._group is not None:
                    self._note_group(str(self._group.folder))
            except OSError:
                self.close()
            self._may_group = self._group is not None
        return self._group.child(name) if self._group is not None else None

    def set_suspended(self, suspended: bool) -> None:
        """Stop everything, or let it go on."""
        if suspended != self._suspended:
            self._suspended = suspended
            for family in self._living:
                if suspended:
                    family.stop()
                else:
                    family.go_on()

    def cpu_time_s(self) -> float:
        """Of all host programs of this run so far, those that have ended included. As last looked at."""
        self._look()
        return self._seen_cpu_s

    def memory_bytes(self) -> int:
        """Resident memory of all that live, as last looked at."""
        self._look()
        return self._seen_memory

    def _look(self) -> None:
        """Look at the living, but not so often that looking takes more than a hundredth of a processor.

        What ended meanwhile is seen at the next look too: its time must not count as a living one's and an ended one's.
        """
        now = self.reactor.seconds()
        if self._living and now < self._look_at:
            return
        began = time.perf_counter()
        seen = [family.usage() for family in self._living]
        self._seen_cpu_s = self.ended_cpu_s + self.lost_cpu_s + sum(cpu for cpu, _ in seen)
        self._seen_memory = sum(memory for _, memory in seen)
        self._look_at = now + max(LOOK_S, 100 * (time.perf_counter() - began)) if seen else 0.0

    def close(self) -> None:
        """The run is over."""
        set_owner(None)
        if self._group is not None:
            self._group.remove()
            self._group = None
