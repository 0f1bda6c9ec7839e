"""CPU time and memory of a process tree, read from /proc. Linux. Owns nothing, starts nothing, kills on request only.

Plain files instead of psutil: under emulation every import counts, and the guest is Linux.

How nothing is lost or counted twice: each command has a keeper (guest/commands/supervisor.py) that is the child
subreaper of the command's tree. A process that ended and was waited for is in the `cutime` of whoever waited, up to the
keeper's own RUSAGE_CHILDREN; what still lives is read from its `stat`, with the children that it has waited for. Not
counted, as nowhere in Linux without cgroups: children of a program that ignores SIGCHLD, once they have ended.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:  # as typing.TYPE_CHECKING, without importing typing: each keeper starts with this module
    from collections.abc import Iterable

_PROC = "/proc"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Stat:
    """The fields of /proc/PID/stat (proc(5)) that are used here. Times in clock ticks.

    cpu_ticks: utime + stime. waited_ticks: cutime + cstime, of ended children that it has waited for.
    No dataclass: importing those takes longer than all the rest of a keeper.
    """

    __slots__ = ("cpu_ticks", "parent", "pid", "resident_pages", "start_ticks", "state", "waited_ticks")

    def __init__(
        self,
        *,
        pid: int,
        state: str,
        parent: int,
        cpu_ticks: int,
        waited_ticks: int,
        start_ticks: int,
        resident_pages: int,
    ) -> None:
        self.pid = pid
        self.state = state
        self.parent = parent
        self.cpu_ticks = cpu_ticks
        self.waited_ticks = waited_ticks
        self.start_ticks = start_ticks
        self.resident_pages = resident_pages

    @property
    def ended(self) -> bool:
        """A zombie: it has ended and nobody has waited for it yet."""
        return self.state in "ZX"


def parse_stat(text: str) -> Stat:
    """One line of /proc/PID/stat; the program's name may hold blanks and brackets. Raises ValueError."""
    head, bracket, tail = text.rpartition(")")
    pid, _, _ = head.partition(" (")
    fields = tail.split()
    if not bracket or len(fields) < 22:
        raise ValueError(f"not a line of /proc/PID/stat: {text[:80]!r}")
    return Stat(
        pid=int(pid),
        state=fields[0],
        parent=int(fields[1]),
        cpu_ticks=int(fields[11]) + int(fields[12]),
        waited_ticks=max(0, int(fields[13])) + max(0, int(fields[14])),
        start_ticks=int(fields[19]),
        resident_pages=max(0, int(fields[21])),
    )


def read_stat(pid: int) -> Stat | None:
    """None if there is no such process (any more)."""
    try:
        with open(f"{_PROC}/{pid}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123 (hot)
            return parse_stat(file.read())
    except (OSError, ValueError):
        return None


def children_of(stats: Iterable[Stat]) -> dict[int, list[Stat]]:
    """Processes by their parent."""
    table: dict[int, list[Stat]] = {}
    for stat in stats:
        table.setdefault(stat.parent, []).append(stat)
    return table


def select_tree(stats: Iterable[Stat], root: int) -> list[Stat]:
    """All below `root`, without `root`, parents before children."""
    table = children_of(stats)
    found: list[Stat] = []
    waiting = [root]
    seen = {root}
    while waiting:
        for stat in table.get(waiting.pop(), ()):
            if stat.pid not in seen:
                seen.add(stat.pid)
                found.append(stat)
                waiting.append(stat.pid)
    return found


def descendants(root: int) -> list[Stat]:
    """All living processes and zombies below `root`, as they are now."""
    try:
        return _walk(root)
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN, or root itself is gone
        pids = [int(name) for name in os.listdir(_PROC) if name.isdigit()]  # noqa: PTH208 (hot)
        return select_tree([stat for stat in map(read_stat, pids) if stat is not None], root)


def _walk(root: int) -> list[Stat]:
    """By /proc/PID/task/TID/children: reads the tree's processes only. A child belongs to the thread that made it."""
    found: list[Stat] = []
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        try:
            threads = os.listdir(f"{_PROC}/{pid}/task")  # noqa: PTH208 (hot)
        except OSError:
            continue  # it has ended meanwhile; its children are the subreaper's now and found at the next look
        for thread in threads:
            try:
                with open(f"{_PROC}/{pid}/task/{thread}/children", encoding="ascii") as file:  # noqa: PTH123 (hot)
                    children = file.read().split()
            except OSError:
                if pid == root:
                    raise FileNotFoundError from None
                continue
            for child in map(int, children):
                stat = read_stat(child)
                if stat is not None:
                    found.append(stat)
                    waiting.append(child)
    return found


def cpu_seconds(tree: Iterable[Stat]) -> float:
    """CPU time that a tree's living processes and zombies have used, and the ended ones that they have waited for."""
    return sum(stat.cpu_ticks + stat.waited_ticks for stat in tree) / TICKS_PER_S


def resident_bytes(tree: Iterable[Stat]) -> int:
    """Memory of a tree. Pages that its processes share count for each of them."""
    return sum(stat.resident_pages for stat in tree) * PAGE_BYTES


def parse_oom_kills(vmstat: str) -> int:
    """How often the kernel killed for want of memory since boot: `oom_kill` of /proc/vmstat; 0 where it has none."""
    for line in vmstat.splitlines():
        name, _, count = line.partition(" ")
        if name == "oom_kill" and count.strip().isdigit():
            return int(count)
    return 0


def oom_kills() -> int:
    """parse_oom_kills of this machine."""
    try:
        with open(f"{_PROC}/vmstat", encoding="ascii") as file:  # noqa: PTH123
            return parse_oom_kills(file.read())
    except OSError:
        return 0
