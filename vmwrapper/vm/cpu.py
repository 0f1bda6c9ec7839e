"""CPU time and memory of a VM's processes, over all starts of the VM in this run: a sum that never goes back.

A process that is found running counts from then on: what it has used before is in the checkpoint of an earlier run. One
that is looked at anew without having ended (HostMain was not reached for a while) is not counted twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from vmcontrol.common import proctable
from vmcontrol.common.proctable import Entry

MEMBERS_S = 10.0
"""Between two looks at who belongs to it, which can take a scan of the whole computer. What a process that came and
went in between used is counted by the parent that waited for it."""


class VmCpuTime:
    """Of one VM."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self._process: Entry | None = None
        self._is_watched = False
        self._members: list[Entry] = []
        self._look_at = -math.inf
        self._base = 0.0
        """What the process had used when it was found."""
        self._seen = 0.0
        """What it has used since, as far as it was looked at."""
        self._earlier = 0.0
        """Of the starts before."""

    @property
    def is_watched(self) -> bool:
        """Whether there is a process that can be looked at."""
        return self._is_watched

    def begin(self, pid: int, *, found_running: bool) -> None:
        """The VM runs in this process now; 0: in one that cannot be looked at."""
        process, before = proctable.look_at(pid) if pid else None, self._process
        self._process, self._is_watched = process, process is not None
        self._look_at = -math.inf
        if process is None or before is None or process.key != before.key:
            self._earlier, self._seen = self._earlier + self._seen, 0.0
            self._base = self._used_s() if found_running else 0.0

    def end(self) -> None:
        """The VM does not run any more, as far as is known."""
        self._is_watched = False

    def told(self, cpu_time_s: float) -> None:
        """What the hypervisor says of the start that goes on, where its process cannot be looked at."""
        self._seen = max(self._seen, cpu_time_s)

    def total_s(self) -> float:
        if self._is_watched:
            self._seen = max(self._seen, self._used_s() - self._base)
        return self._earlier + self._seen

    def memory_bytes(self) -> int:
        return sum(entry.memory_bytes for entry in self._living())

    def _used_s(self) -> float:
        return sum(entry.cpu_time_s for entry in self._living())

    def _living(self) -> list[Entry]:
        """The process and what it has started, as they are now."""
        if self._process is None or not self._is_watched:
            return []
        if self._seconds() >= self._look_at:
            self._members = [self._process, *proctable.descendants(self._process.pid)]
            self._look_at = self._seconds() + MEMBERS_S
        return proctable.living(self._members) if proctable.living([self._process]) else []
