"""The system's processes at one moment: who descends from whom, in which state, with how much CPU time and memory.

One scan answers all questions about a tree. On Linux it reads /proc/PID/stat, a few milliseconds for hundreds of
processes; elsewhere psutil is asked. (Imported where it is used: a plain host job on Linux never does.)
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass

_IS_LINUX: bool = sys.platform.startswith("linux")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 1.0
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass(frozen=True, slots=True)
class Entry:
    """One process."""

    pid: int
    parent: int
    process_group: int
    """0 where there is no such thing."""
    state: str
    """A letter as in proc(5): T stopped, Z ended and not waited for. Of one whose first thread alone has ended: that of
    another thread."""
    cpu_time_s: float
    """Its own, and that of children that it has waited for."""
    memory_bytes: int
    began: float = 0.0
    """When it was started, on a clock of the system's: with the pid it names one process for ever."""

    @property
    def key(self) -> tuple[int, float]:
        return self.pid, self.began

    @property
    def is_stopped(self) -> bool:
        return self.state in "Tt"

    @property
    def is_alive(self) -> bool:
        return self.state not in "ZXx"


Table = dict[int, Entry]


def look() -> Table:
    """All processes that can be seen now."""
    if _IS_LINUX:
        return {entry.pid: entry for name in os.listdir("/proc") if name.isdigit() and (entry := look_at(int(name)))}  # noqa: PTH208
    import psutil

    return {entry.pid: entry for pid in psutil.pids() if (entry := look_at(pid))}


def look_at(pid: int) -> Entry | None:
    """One process; None when there is none."""
    if _IS_LINUX:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 (hundreds of times in a scan)
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            return None
        ticks = sum(int(field) for field in fields[11:15])
        state = fields[0].decode()
        if state == "Z" and fields[17] != b"1":
            state = _state_of_threads(pid)
        cpu_s, memory = ticks * _TICK_S, int(fields[21]) * _PAGE
        return Entry(pid, int(fields[1]), int(fields[2]), state, cpu_s, memory, float(fields[19]))
    import psutil

    try:
        process = psutil.Process(pid)
        with process.oneshot():
            times = process.cpu_times()
            status = process.status()
            state = {psutil.STATUS_STOPPED: "T", psutil.STATUS_ZOMBIE: "Z"}.get(status, "S")
            cpu_s, memory = times.user + times.system, process.memory_info().rss
            return Entry(pid, process.ppid(), 0, state, cpu_s, memory, process.create_time())
    except psutil.Error:
        return None


def _state_of_threads(pid: int) -> str:
    """The state of a process whose first thread has ended while others may live (pthread_exit in main)."""
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            with open(f"/proc/{pid}/task/{thread}/stat", "rb") as file:  # noqa: PTH123
                state = file.read().rpartition(b")")[2].split()[0].decode()
            if state not in "ZX":
                return state
    except (OSError, IndexError):
        pass
    return "Z"


def name_of(pid: int) -> str:
    """Its program's name, as ps shows it."""
    import psutil

    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "gone meanwhile"


def own_age_s() -> float:
    """Seconds since this process was started, to a hundredth; 0 where the system does not tell so exactly.

    (psutil's create_time adds the time of the boot, which Linux tells in whole seconds.)
    """
    if not _IS_LINUX:
        return 0.0
    try:
        with open("/proc/self/stat", "rb") as file:  # noqa: PTH123
            started = int(file.read().rpartition(b")")[2].split()[19]) * _TICK_S  # proc(5), starttime
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def below(table: Table, roots: Collection[int]) -> list[Entry]:
    """Those of `roots` that there are and all their descendants, parents first; zombies too."""
    children: dict[int, list[int]] = {}
    for entry in table.values():
        children.setdefault(entry.parent, []).append(entry.pid)
    found: dict[int, Entry] = {}
    fresh = [pid for pid in roots if pid in table]
    while fresh:
        found.update((pid, table[pid]) for pid in fresh)
        fresh = [child for pid in fresh for child in children.get(pid, ()) if child not in found]
    return list(found.values())
