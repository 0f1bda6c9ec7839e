"""Orphans: processes whose parent, a program of this run, has ended. Found, collected, and killed in the end.

On Linux we are a child subreaper, so they become our children. Where we must not be (VirtualBox's service makes itself
an orphan, and is not ours) they are looked for by their mark: an environment variable that every process of a run has.
Nothing is ever found by its name.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Protocol

from twisted.internet.process import reapProcessHandlers

from vmcontrol.common import proctable, supervisor
from vmcontrol.common.proctable import Entry

RUN_MARK = "VMWRAPPER_RUN"
"""Environment variable that every process of a run carries: a token that no other run has."""
HOST_MARK = ":"
"""Stands in the mark of host programs, between the token and the program's number."""
SHARED = frozenset({"VBoxSVC", "VBoxXPCOMIPCD", "VBoxHeadless", "VirtualBoxVM", "VBoxNetDHCP", "VBoxNetNAT"})
"""Services of VirtualBox that one user's slots share: whoever started them, they are not ours to end."""
_ENDS_BY_ITSELF = "VBoxManage"
"""One that HostMain did not wait for has done what was wanted of it."""
_STABLE_ROUNDS = 10

log = logging.getLogger(__name__)


class OrphanOwner(Protocol):
    """Knows the orphans that host programs have left, which are ended with these."""

    def is_ours(self, pid: int) -> bool: ...
    def collected(self, pid: int, cpu_time_s: float) -> None: ...


_adopts = False
_strays = False
_owner: OrphanOwner | None = None
# Facts about the process, as its children are.


def become_subreaper() -> None:
    """Orphans among our descendants become our children, so that none gets away."""
    global _adopts  # noqa: PLW0603
    _adopts = supervisor.become_subreaper()


def adopt_nothing() -> None:
    """Leave orphans alone for now; they are looked for by their mark.

    For the rest of this process: what was orphaned before a later `become_subreaper` stays somebody else's.
    """
    global _strays  # noqa: PLW0603
    _strays = True


def set_owner(owner: OrphanOwner | None) -> None:
    """From now on `owner` is called for orphans that have ended, and for whether one is its own."""
    global _owner  # noqa: PLW0603
    _owner = owner


def strays_possible() -> bool:
    """Whether there can be orphans of ours that are not our children."""
    return _strays or not _adopts


def adopted() -> list[int] | None:
    """Our children that we did not start, zombies too; None where that takes a scan. A fiftieth of a millisecond."""
    children = proctable.children_of(os.getpid()) if _adopts else None
    return None if children is None else [pid for pid in children if pid not in reapProcessHandlers]


def is_adopted(entry: Entry) -> bool:
    """Whether it is a child of ours that we did not start."""
    return _adopts and entry.parent == os.getpid() and entry.pid not in reapProcessHandlers


def strays(table: proctable.Table) -> list[Entry]:
    """Where orphans need not be our children: what lives and does not descend from us."""
    if not strays_possible():
        return []
    ours = {entry.pid for entry in proctable.below(table, [os.getpid()])}
    return [entry for entry in table.values() if entry.pid not in ours and entry.is_alive]


def mark_of(pid: int) -> str:
    """The mark in its environment; "" when it has none, or none that can be read."""
    import psutil

    try:
        return psutil.Process(pid).environ().get(RUN_MARK, "")
    except (psutil.Error, OSError):
        return ""


def marked(token: str) -> list[Entry]:
    """All processes that carry the mark of a run, ourselves excepted. A scan: for starts and ends only."""
    return [entry for entry in proctable.look().values() if entry.pid != os.getpid() and _carries(entry, token)]


def _carries(entry: Entry, token: str) -> bool:
    return entry.is_alive and mark_of(entry.pid).startswith(token) and proctable.name_of(entry.pid) not in SHARED


def _own_orphans(token: str) -> list[Entry]:
    """Orphans that we adopted, and where strays are possible what carries the mark of this run."""
    pids = adopted()
    if pids is not None and not _strays:
        table = {pid: entry for pid in pids if (entry := proctable.look_at(pid)) is not None}
    else:
        table = proctable.look()
    found = [entry for entry in table.values() if is_adopted(entry) and entry.is_alive]
    found = [entry for entry in found if proctable.name_of(entry.pid) not in SHARED]
    if token:
        marked = [entry for entry in strays(table) if _carries(entry, token)]
        found += [entry for entry in marked if proctable.name_of(entry.pid) != _ENDS_BY_ITSELF]
    return found


def end_orphans(token: str = "", *, everything: bool = False) -> None:
    """KILL and collect what dead VMmanage tasks left, with everything below it.

    token: of this run; without it only what was adopted is found. everything: also what host programs left, which
    `vmwrapper.process.family` sees to as long as they run.
    """
    for _ in range(_STABLE_ROUNDS):
        found = [orphan for orphan in _own_orphans(token) if everything or not _is_hosts(orphan)]
        for orphan in found:
            name = proctable.name_of(orphan.pid)
            log.warning("killing pid %d (%s), which a program that ended has left", orphan.pid, name)
            for member in (orphan, *proctable.descendants(orphan.pid)):
                proctable.kill(member)
        collect_orphans()
        if not found:
            return


def _is_hosts(orphan: Entry) -> bool:
    return HOST_MARK in mark_of(orphan.pid) or (_owner is not None and _owner.is_ours(orphan.pid))


def collect_orphans() -> None:
    """Collect the exit statuses of adopted orphans that have ended. Costs nothing when there are none."""
    while hasattr(os, "waitid"):
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None:
            return
        handler = reapProcessHandlers.get(ended.si_pid)
        if handler is None:
            _collect(ended.si_pid)
            continue
        handler.reapProcess()  # one that we started: whoever did wants to know
        if ended.si_pid in reapProcessHandlers:  # it is kept for its pid, and hides those behind it
            _collect_hidden()
            return


def _collect_hidden() -> None:
    for entry in proctable.look().values():
        if entry.parent == os.getpid() and not entry.is_alive and entry.pid not in reapProcessHandlers:
            _collect(entry.pid)


def _collect(pid: int) -> None:
    if sys.platform == "win32":
        return
    try:
        found, _, usage = os.wait4(pid, os.WNOHANG)
    except ChildProcessError:
        return
    if found and _owner is not None:
        _owner.collected(pid, usage.ru_utime + usage.ru_stime)
