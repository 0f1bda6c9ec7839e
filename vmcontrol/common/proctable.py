"""The system's processes: who descends from whom, in which state, with how much CPU time and memory; and signals.

The one parser of /proc/PID/stat. On Linux /proc is read, a few milliseconds for hundreds of processes; elsewhere psutil
is asked. Imports as little as it can: under emulation a millisecond of imports is ten, and the supervisor of each guest
command starts with this module.

A process is a pid with the time of its start: the pid alone may be another's meanwhile.
"""

from __future__ import annotations

import os
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # without importing typing
    from collections.abc import Collection, Iterable

_IS_LINUX: bool = sys.platform.startswith("linux")
TICK_S: float = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 1.0
PAGE_BYTES: int = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_STOP, _CONTINUE = getattr(signal, "SIGSTOP", 19), getattr(signal, "SIGCONT", 18)
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


class Entry:
    """One process at one moment. No dataclass: importing those takes longer than all the rest of a supervisor."""

    __slots__ = ("began", "cpu_time_s", "memory_bytes", "parent", "pid", "state")

    def __init__(
        self, pid: int, parent: int, state: str, *, cpu_time_s: float, memory_bytes: int, began: float
    ) -> None:
        self.pid = pid
        self.parent = parent
        self.state = state
        """A letter as in proc(5): T stopped, Z ended and not waited for. Of one whose first thread alone has ended:
        that of another thread."""
        self.cpu_time_s = cpu_time_s
        """Its own, and that of children that it has waited for."""
        self.memory_bytes = memory_bytes
        """Resident; pages that several processes share count for each of them."""
        self.began = began
        """Time of its start: ticks since the boot on Linux, elsewhere seconds since the epoch."""

    @property
    def key(self) -> tuple[int, float]:
        """Names this process for ever."""
        return self.pid, self.began

    @property
    def is_stopped(self) -> bool:
        return self.state in "Tt"

    @property
    def is_alive(self) -> bool:
        return self.state not in "ZXx"


Table = dict[int, Entry]


def parse_stat(line: bytes) -> Entry:
    """One line of /proc/PID/stat; the program's name may hold blanks and brackets. Raises ValueError."""
    head, bracket, tail = line.rpartition(b")")
    fields = tail.split()
    if not bracket or len(fields) < 22:
        raise ValueError(f"not a line of /proc/PID/stat: {line[:80]!r}")
    return Entry(
        int(head.partition(b" (")[0]),
        int(fields[1]),
        fields[0].decode("ascii"),
        cpu_time_s=sum(int(field) for field in fields[11:15]) * TICK_S,
        memory_bytes=int(fields[21]) * PAGE_BYTES,
        began=float(fields[19]),
    )


def look_at(pid: int) -> Entry | None:
    """One process; None when there is none."""
    if not _IS_LINUX:
        return _look_with_psutil(pid)
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 (hundreds of times in a scan)
            entry = parse_stat(file.read())
    except (OSError, ValueError):
        return None
    if not entry.is_alive:
        entry.state = _state_of_threads(pid)
    return entry


def _look_with_psutil(pid: int) -> Entry | None:
    import psutil

    try:
        process = psutil.Process(pid)
        with process.oneshot():
            times, status = process.cpu_times(), process.status()
            running = "S" if psutil.WINDOWS else "R"  # Windows calls every process running
            letters = {psutil.STATUS_STOPPED: "T", psutil.STATUS_ZOMBIE: "Z", psutil.STATUS_RUNNING: running}
            return Entry(
                pid,
                process.ppid(),
                letters.get(status, "S"),
                cpu_time_s=times.user + times.system + times.children_user + times.children_system,
                memory_bytes=process.memory_info().rss,
                began=process.create_time(),
            )
    except psutil.Error:
        return None


def _state_of_threads(pid: int) -> str:
    """The state of a process whose first thread has ended while others may live (pthread_exit in main)."""
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            with open(f"/proc/{pid}/task/{thread}/stat", "rb") as file:  # noqa: PTH123
                state = parse_stat(file.read()).state
            if state not in "ZX":
                return state
    except (OSError, ValueError):
        pass
    return "Z"


def look() -> Table:
    """All processes that can be seen now."""
    if _IS_LINUX:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208
    else:
        import psutil

        pids = psutil.pids()
    return {pid: entry for pid in pids if (entry := look_at(pid)) is not None}


def below(table: Table, roots: Collection[int]) -> list[Entry]:
    """Those of `roots` that there are and all their descendants, parents first; zombies too."""
    children: dict[int, list[int]] = {}
    for entry in table.values():
        children.setdefault(entry.parent, []).append(entry.pid)
    found: Table = {}
    fresh = [pid for pid in roots if pid in table]
    while fresh:
        found.update((pid, table[pid]) for pid in fresh)
        fresh = [child for pid in fresh for child in children.get(pid, ()) if child not in found]
    return list(found.values())


def children_of(pid: int) -> list[int] | None:
    """Its children, zombies too, by small files in place of a scan; None where there are none (CONFIG_PROC_CHILDREN),
    or no such process. A child belongs to the thread that made it."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:  # noqa: PTH123
                found += map(int, file.read().split())
    except OSError:
        return None
    return found


def descendants(root: int) -> list[Entry]:
    """All below `root`, parents first, zombies too. Where the kernel lists children only the tree is read."""
    fresh = children_of(root)
    if fresh is None:
        return [entry for entry in below(look(), [root]) if entry.pid != root]
    found: Table = {}
    while fresh:
        entries = [entry for pid in fresh if pid not in found and (entry := look_at(pid)) is not None]
        found.update((entry.pid, entry) for entry in entries)
        fresh = [child for entry in entries for child in children_of(entry.pid) or ()]
    return list(found.values())


def living(entries: Iterable[Entry]) -> list[Entry]:
    """Those of them that still live, as they are now."""
    now = [(entry, look_at(entry.pid)) for entry in entries]
    return [found for entry, found in now if found is not None and found.key == entry.key and found.is_alive]


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
    me = look_at(os.getpid()) if _IS_LINUX else None
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - me.began * TICK_S) if me is not None else 0.0


# --- signals ----------------------------------------------------------------------------------------------------------


def send(entry: Entry, number: int) -> None:
    """Send a signal to exactly this process. One that has gone, or is not ours to signal, is no error."""
    if not living([entry]):
        return
    if sys.platform == "win32":  # it can do three things to a process
        import psutil

        try:
            process = psutil.Process(entry.pid)
            {_STOP: process.suspend, _CONTINUE: process.resume}.get(number, process.terminate)()
        except psutil.Error:
            pass
        return
    try:  # noqa: SIM105 (contextlib is an import)
        os.kill(entry.pid, number)
    except OSError:
        pass


def ask_to_end(entry: Entry) -> None:
    """TERM, and let it go on: a stopped process would not see it."""
    send(entry, signal.SIGTERM)
    if sys.platform != "win32":
        send(entry, _CONTINUE)


def stop(entry: Entry) -> None:
    send(entry, _STOP)


def resume(entry: Entry) -> None:
    send(entry, _CONTINUE)


def kill(entry: Entry) -> None:
    send(entry, _KILL)
