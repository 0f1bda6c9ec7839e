"""A supervisor: a small process that starts one program, is parent and child subreaper of its whole tree, and ends it.

Why a process of its own: every process that the program leaves an orphan becomes the supervisor's child and nobody
else's, whatever the programs do with sessions and environments. So "is anything left" is exact.

What VMmanage tasks (vmwrapper/process/supervisor.py) and commands in the guest (guest/commands/supervisor.py) have in
common; these two add what is said over their pipes, and when TERM comes. Linux. Imports as little as it can.
"""

from __future__ import annotations

import os
import select
import signal
import time

from vmcontrol.common import proctable

TYPE_CHECKING = False
if TYPE_CHECKING:  # without importing typing
    from collections.abc import Iterable

OTHERS_S = 10.0
"""Until all processes of a program get TERM, as lib/proc_control.cpp, kill_descendants."""
KILL_LIMIT_S = 10.0
"""For killing a tree. What is left then hangs in the kernel, or is another user's: it is said, and left."""
_LOOK_AGAIN_S = 0.002
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def become_subreaper() -> bool:
    """Make this process the parent of every orphan below it. False where the kernel has no such thing."""
    import ctypes  # late: start-up time of those who import this module for its constants

    try:
        return bool(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


class TermOrder:
    """Who gets TERM, and when. Pure.

    The main process alone at first, which may have to ask others to save. These get it when the main one has ended, or
    at `others_at`; those that were started meanwhile, perhaps in order to save, at `others_at`.
    """

    def __init__(self, main: int, members: Iterable[proctable.Entry], others_at: float) -> None:
        self._main = main
        self._first = {entry.key for entry in members}
        self._asked: set[tuple[int, float]] = set()
        self.others_at = others_at

    def due(self, members: Iterable[proctable.Entry], now: float, *, main_ended: bool) -> list[proctable.Entry]:
        """Those whose time has come; each once."""
        found = [
            entry
            for entry in members
            if entry.key not in self._asked
            and (now >= self.others_at or (entry.key in self._first if main_ended else entry.pid == self._main))
        ]
        self._asked.update(entry.key for entry in found)
        return found


class Supervisor:
    """One program, from its start to the end of its tree."""

    def __init__(self) -> None:
        self.pid = 0
        """Of the program."""
        self.wait_status: int | None = None
        """As os.waitpid gives it; None: the program has not ended."""
        self._wake = -1

    def begin(self) -> None:
        """Adopt orphans, and wake `wait` at each end of a child."""
        become_subreaper()
        self._wake, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)

    def wait(self, poller: select.poll, limit_s: float | None) -> set[int]:
        """Until something can be read, a child ends, or the limit. The descriptors that can be read."""
        poller.register(self._wake, select.POLLIN)
        ready = {fd for fd, _ in poller.poll(None if limit_s is None else max(0.0, limit_s) * 1000 + 1)}
        if self._wake in ready:
            ready.remove(self._wake)
            os.read(self._wake, 4096)
        return ready

    def reap(self) -> bool:
        """Collect whatever has ended: the program, and orphans that became ours. False: no child is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.pid:
                self.wait_status = status
            self.collected(pid, status)

    def collected(self, pid: int, status: int) -> None:
        """A child has ended."""

    def members(self) -> list[proctable.Entry]:
        """What lives below the supervisor."""
        return [entry for entry in proctable.descendants(os.getpid()) if entry.is_alive]

    def kill_tree(self) -> list[proctable.Entry]:
        """Kill everything below the supervisor; what cannot be killed.

        Stopped first, because a stopped process cannot fork away from its end.
        """
        limit = time.monotonic() + KILL_LIMIT_S
        stopped: set[tuple[int, float]] = set()
        while self.reap():
            members = self.members()
            self.seen(members)
            if time.monotonic() > limit:
                return members
            new = [entry for entry in members if entry.key not in stopped]
            for entry in new:
                proctable.stop(entry)
            stopped.update(entry.key for entry in new)
            if not new:
                for entry in members:
                    proctable.kill(entry)
                stopped.clear()
                time.sleep(_LOOK_AGAIN_S)  # the kernel's time to end them
        return []

    def seen(self, members: list[proctable.Entry]) -> None:
        """A last look at what is about to be killed."""
