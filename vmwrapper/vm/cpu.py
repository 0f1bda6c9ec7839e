"""CPU time and memory of a VM's processes, over all starts of the VM in this run: a sum that never goes back.

A process that is found running counts from then on: what it has used before is in the checkpoint of an earlier run. One
that is looked at anew without having ended (HostMain was not reached for a while) is not counted twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import psutil

from vmwrapper.process import trees


class VmCpuTime:
    """Of one VM."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self._process: psutil.Process | None = None
        self._usage: trees.TreeUsage | None = None
        self._base = 0.0
        """What the process had used when it was found."""
        self._seen = 0.0
        """What it has used since, as far as it was looked at."""
        self._earlier = 0.0
        """Of the starts before."""

    @property
    def is_watched(self) -> bool:
        """Whether there is a process that can be looked at."""
        return self._usage is not None

    def begin(self, pid: int, *, found_running: bool) -> None:
        """The VM runs in this process now; 0: in one that cannot be looked at."""
        process = usage = None
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid) if pid else None
            usage = trees.TreeUsage(self._seconds, process) if process is not None else None
        if process is None or process != self._process:
            self._earlier, self._seen = self._earlier + self._seen, 0.0
            self._base = usage.cpu_time_s() if usage is not None and found_running else 0.0
        self._process, self._usage = process, usage

    def end(self) -> None:
        """The VM does not run any more, as far as is known."""
        self._usage = None

    def told(self, cpu_time_s: float) -> None:
        """What the hypervisor says of the start that goes on, where its process cannot be looked at."""
        self._seen = max(self._seen, cpu_time_s)

    def total_s(self) -> float:
        if self._usage is not None:
            self._seen = max(self._seen, self._usage.cpu_time_s() - self._base)
        return self._earlier + self._seen

    def memory_bytes(self) -> int:
        return self._usage.memory_bytes() if self._usage is not None else 0
