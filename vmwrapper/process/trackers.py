"""Ways to know the processes of a family, and to reach them: one interface, from the surest to the one that always is.

    GroupTracker     the program's process group: a signal reaches all in it at once, also what is just being forked
    cgroups.Group    a control group, where the system allows one: knows and reaches everything, forks included
    TreeTracker      descendants, as the table of processes has them: found one by one
    MarkTracker      orphans that carry the family's mark in their environment, or were seen to be its processes

Look: HTCondor, src/condor_procd, *_tracker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable

from vmcontrol.common import proctable
from vmcontrol.common.proctable import Entry, Table
from vmwrapper.process import orphans

STABLE_ROUNDS = 100
"""Looks at a tree until all of it is stopped. Each stops what was forked since the last; two are the rule."""

log = logging.getLogger(__name__)


class Tracker:
    """One way. `stop` and `kill` return whether nothing of the family can have been missed; else the next is tried."""

    def members(self) -> list[Entry] | None:
        """Its living processes, parents first. None: this way does not tell."""
        return None

    def stop(self) -> bool:
        """Stop all that it reaches."""
        return False

    def go_on(self) -> None:
        """Let go on what `stop` has stopped."""

    def kill(self) -> bool:
        """KILL all that it reaches."""
        return False


class GroupTracker(Tracker):
    """A process group. Its number is the program's, whose zombie is kept until `release`: it cannot be another's."""

    def __init__(self, number: int) -> None:
        self._number = number

    def _signal(self, name: str) -> None:
        if self._number and hasattr(os, "killpg"):
            with contextlib.suppress(OSError):
                os.killpg(self._number, getattr(signal, name))

    def stop(self) -> bool:
        self._signal("SIGSTOP")
        return False

    def go_on(self) -> None:
        self._signal("SIGCONT")

    def kill(self) -> bool:
        self._signal("SIGKILL")
        return False

    def release(self) -> None:
        """Nothing is signalled by the number any more."""
        self._number = 0


class MarkTracker(Tracker):
    """Orphans of one family."""

    def __init__(self, mark: str, is_another_s: Callable[[Entry], bool]) -> None:
        """is_another_s: whether a process is known to come of another program."""
        self._mark = mark
        self._is_another_s = is_another_s
        self.seen: set[tuple[int, float]] = set()
        """Keys of its processes at the last look: an orphan that clears its environment stays known."""

    def owns(self, child: Entry) -> bool:
        """Whether a child of ours that we did not start is one.

        It is when it was seen, or carries the mark, or when nobody knows it and it has no mark that can be read.
        """
        if child.key in self.seen:
            return True
        if self._is_another_s(child):
            return False
        mark = orphans.mark_of(child.pid)
        return mark == self._mark or (not mark and proctable.name_of(child.pid) not in orphans.SHARED)

    def find(self, table: Table) -> list[int]:
        """Pids, also of those that have ended and were not waited for."""
        found = [entry.pid for entry in orphans.strays(table) if orphans.mark_of(entry.pid) == self._mark]
        return found + [entry.pid for entry in table.values() if orphans.is_adopted(entry) and self.owns(entry)]

    def members(self) -> list[Entry] | None:
        """Its orphans among our children, known in far less time than a fork takes: none of a chain of forks is missed.

        An empty list: that is sure, for each child of ours is known to come of another program.
        """
        children = orphans.adopted()
        entries = None if children is None else [proctable.look_at(pid) for pid in children]
        if entries is None:
            return None
        alive = [entry for entry in entries if entry is not None and entry.is_alive]
        own = [entry for entry in alive if self.owns(entry)]
        return own if own or len(alive) == len(entries) else None


class TreeTracker(Tracker):
    """Descendants of the program and of its orphans."""

    def __init__(self, marks: MarkTracker, *, stop_signal: int | None = None, multi_process: bool = False) -> None:
        """stop_signal: in place of SIGSTOP, for the program alone unless it is `multi_process`."""
        self._marks = marks
        self._stop_signal = stop_signal
        self._multi_process = multi_process
        self._stopped: set[tuple[int, float]] = set()
        self.root = 0
        """Pid of the program; 0 when it may be another's."""

    def look(self) -> list[Entry]:
        """Its processes, and those that have ended and were not waited for."""
        if not self.root and not orphans.strays_possible() and not _have_children():
            return []
        table = proctable.look()
        roots = [self.root] if self.root else []
        found = proctable.below(table, [*roots, *self._marks.find(table)])
        self._marks.seen = {entry.key for entry in found}
        return found

    def members(self) -> list[Entry]:
        return [entry for entry in self.look() if entry.is_alive]

    def stop(self) -> bool:
        if self._stop_signal is not None:
            members = self.members()
            for entry in members if self._multi_process else members[:1]:
                self._stopped.add(entry.key)
                proctable.send(entry, self._stop_signal)
            return True
        for _ in range(STABLE_ROUNDS):
            new = [entry for entry in self.members() if not entry.is_stopped]
            if not new:
                return True
            for entry in new:
                self._stopped.add(entry.key)
                proctable.stop(entry)
        return False

    def go_on(self) -> None:
        """Children first, so that no parent wonders about a stopped child."""
        if not self._stopped:
            return
        for entry in reversed(self.members()):
            if entry.key in self._stopped:
                proctable.resume(entry)
        self._stopped.clear()


def _have_children() -> bool:
    """Whether we have any child at all, which answers most questions for a moment's work."""
    if not hasattr(os, "waitid"):
        return True
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
