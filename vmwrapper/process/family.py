"""Everything that comes of one program on the host: seen, stopped, let go on, counted and ended as one.

With a control group, which every program gets that runs for some seconds, the kernel does it. Without one a program's
processes are its descendants, and the orphans among our own children that carry its mark in their environment (we are a
child subreaper on Linux) or were seen to be its processes. What gets away then: nothing while we live; after a kill -9
of ours, a process that has both left its parent and cleared its environment.

The ways to know them: `vmwrapper.process.trackers`. All programs of a run together: `vmwrapper.process.programs`.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

from vmcontrol.common import proctable
from vmcontrol.common.eventloop import Event, start_logged
from vmcontrol.common.proctable import Entry
from vmcontrol.common.supervisor import TermOrder
from vmcontrol.common.threads import in_thread
from vmwrapper.process import orphans
from vmwrapper.process.cgroups import Group
from vmwrapper.process.ending import gone, kill_all
from vmwrapper.process.patience import Patience
from vmwrapper.process.program import Running
from vmwrapper.process.trackers import GroupTracker, MarkTracker, Tracker, TreeTracker

AGAIN_S = 0.02
"""A tree that is not stopped yet, because a process hangs in the kernel, is looked at again so often."""
AGAIN_COUNT = 50
GROUP_AFTER_S = 2.0
"""A program that has run so long gets a control group: moving it there costs more than a short one takes."""
_LOOKS = 200
"""At our children while one of them is gone already: it may have left the next one of a chain."""
_CALM_LOOKS = 3
STRAGGLERS_S = 0.2
"""A process that ends so soon after its program was only late, and not left running."""
_LOOK_AGAIN_S = 0.25
"""Between looks at what is being ended, while the system tells of no end."""

log = logging.getLogger(__name__)


class Run(Protocol):
    """What a family needs of its run."""

    reactor: Any
    stop_signal: int | None
    lost_cpu_s: float
    ended_cpu_s: float

    def make_group(self, name: str) -> Group | None: ...
    def forget(self, family: ProcessFamily) -> None: ...
    def lives(self, family: ProcessFamily) -> bool: ...
    def has_seen(self, entry: Entry, *, but: ProcessFamily | None = None) -> bool: ...


class ProcessFamily:
    """One program with all its descendants."""

    def __init__(self, run: Run, mark: str, *, multi_process: bool) -> None:
        self._run = run
        self.mark = mark
        """Value of RUN_MARK in its environment."""
        self._marks = MarkTracker(mark, lambda entry: run.has_seen(entry, but=self))
        self._tree = TreeTracker(self._marks, stop_signal=run.stop_signal, multi_process=multi_process)
        self._group = GroupTracker(0)
        self._cgroup: Group | None = None
        self._joined_at = (0.0, 0.0)
        """When it got its control group: CPU time of what lived, and of our children that had ended."""
        self._running: Running | None = None
        self._wants_stop = False
        self._patience: Patience | None = None
        """While it is being ended."""
        self._ended = Event()
        self._joining: Any = None

    def started(self, running: Running) -> None:
        self._running = running
        self._tree.root, self._group = running.pid, GroupTracker(running.pid)
        self._joining = self._run.reactor.callLater(
            GROUP_AFTER_S, lambda: start_logged(self._join(), "a control group")
        )

    def drop(self) -> None:
        """The program could not be started."""
        self._run.forget(self)

    # --- who belongs to it

    def _trackers(self) -> list[Tracker]:
        """From the surest on."""
        return [self._group, *([self._cgroup] if self._cgroup is not None else []), self._tree]

    def members(self) -> list[Entry]:
        """Its living processes, parents first."""
        return next(found for tracker in self._trackers() if (found := tracker.members()) is not None)

    def _all_members(self) -> list[Entry]:
        """The same, where none must be missed: the system's list is no moment's, and a chain of forks can pass it by.

        Our own children are known in far less time than a fork takes, and each of that chain becomes one.
        """
        if found := self.members():
            return found
        calm = 0
        for _ in range(_LOOKS):
            orphans.collect_orphans()
            if not orphans.adopted() or calm == _CALM_LOOKS:
                break
            own = self._marks.members()
            if own:
                return own
            calm = calm + 1 if own is not None else 0
        return self.members() if orphans.adopted() is None else []

    def has_seen(self, key: tuple[int, float]) -> bool:
        """Whether this was one of its processes at the last look."""
        return key in self._marks.seen

    def has_seen_pid(self, pid: int) -> bool:
        """The same for a process that has ended and was waited for."""
        return any(pid == seen for seen, _ in self._marks.seen)

    # --- CPU time and memory

    def usage(self) -> tuple[float, int]:
        """CPU time and memory of what lives. With a control group also the time of children that nobody waited for."""
        tree = self._tree.look()
        living = sum(entry.cpu_time_s for entry in tree)
        return living + self._lost_cpu_s(living), sum(entry.memory_bytes for entry in tree)

    def _lost_cpu_s(self, living_s: float) -> float:
        """What the control group counts beyond all that is known otherwise."""
        if self._cgroup is None:
            return 0.0
        lived, ended = self._joined_at
        return max(0.0, lived + self._cgroup.cpu_time_s() - living_s - (self._run.ended_cpu_s - ended))

    async def _join(self) -> None:
        """The program is no short one: give it a control group, if that can be."""
        group = self._run.make_group(self.mark.rpartition(orphans.HOST_MARK)[2])
        if group is None:
            return
        before = (self.usage()[0], self._run.ended_cpu_s)

        def take_in() -> bool:
            joined = group.take_in(lambda: [entry.pid for entry in self._tree.members()])
            if not joined:
                group.remove()  # here, for it may wait
            return joined

        if not await in_thread(self._run.reactor, take_in):
            return
        if self._run.lives(self):
            self._cgroup, self._joined_at = group, before
            if self._wants_stop:
                group.stop()
        else:
            group.kill()
            group.remove()

    # --- stop and go on

    def stop(self) -> None:
        """Stop all its processes. At once for all but those that hang in the kernel."""
        self._wants_stop = True
        self._stop(AGAIN_COUNT)

    def _stop(self, times: int) -> None:
        if not self._wants_stop:
            return
        trackers = self._trackers() if self._run.stop_signal is None else [self._tree]
        if any(tracker.stop() for tracker in trackers):
            return
        if times:
            self._run.reactor.callLater(AGAIN_S, self._stop, times - 1)
        else:
            left = [entry.pid for entry in self.members() if not entry.is_stopped]
            log.warning("not all processes could be stopped: %s", left)

    def go_on(self) -> None:
        """Let those go on that `stop` has stopped."""
        self._wants_stop = False
        for tracker in self._trackers():
            tracker.go_on()

    # --- end

    async def left_running(self) -> list[Entry]:
        """The program has ended: what of it runs on, which stays known, counted and stopped with the rest.

        When that is nothing it is over. One that is only late is waited for.
        """
        if self._is_over():
            return []
        members = self._all_members()
        if members:
            await gone(self._run.reactor, members, STRAGGLERS_S)
            members = self._all_members()
        self._release()
        if not members:
            self._forget()
        return members

    async def end(self, patience: Patience) -> None:
        """End all of it as `vmwrapper.process.patience` says, also what is started meanwhile. Nothing is left then.

        While it is being ended already, from now on with this patience: it may be stopped, and its clock with it.
        """
        while self._patience is not None:
            self._patience = patience
            self.go_on()
            await self._ended.wait()
        if not self._run.lives(self) or self._is_over():
            return
        self._patience = patience
        self._ended.clear()
        try:
            if patience.left_s > 0:
                self.go_on()
                await self._ask_to_end()
            await self._kill()
            self._release()
            self._forget()
        finally:  # also when it was cancelled, and is ended by somebody else
            self._patience = None
            self._ended.set()

    async def wait_ended(self) -> None:
        """Until `end`, which somebody else called, has returned there."""
        if self._run.lives(self):
            await self._ended.wait()

    def is_there(self) -> bool:
        """Whether any of it still runs; when not it is over. For one whose program has ended."""
        if self._run.lives(self) and not self._all_members():
            self._forget()
        return self._run.lives(self)

    def _is_over(self) -> bool:
        """Whether it has ended and certainly left nothing: the rule, made cheap."""
        if self._joining is not None and self._joining.active():
            self._joining.cancel()
        if self._is_running() or self._cgroup is not None or orphans.adopted() != []:
            return False
        self._release()
        self._run.forget(self)
        return True

    def _is_running(self) -> bool:
        """Whether the program itself has not ended."""
        return self._running is None or self._running.ended is None

    async def _ask_to_end(self) -> None:
        """TERM, in the right order, until nothing is left or the patience is used up."""
        reactor = self._run.reactor
        members = self.members()
        order = TermOrder(self._tree.root, members, reactor.seconds() + Patience.others_s())
        while members and self._left_s() > 0:
            if not self._wants_stop:  # suspended meanwhile: it would be let go on
                for entry in order.due(members, reactor.seconds(), main_ended=not self._is_running()):
                    proctable.ask_to_end(entry)
            await gone(reactor, members[:1], min(_LOOK_AGAIN_S, max(0.01, self._left_s())))
            members = self._all_members()

    def _left_s(self) -> float:
        return self._patience.left_s if self._patience is not None else 0.0

    async def _kill(self) -> None:
        def kill(members: list[Entry]) -> None:
            if not any(tracker.kill() for tracker in self._trackers()):
                for entry in members:
                    proctable.kill(entry)

        kill([])
        if await kill_all(self._run.reactor, self._all_members, kill) and self._running is not None:
            await self._running.wait()

    def _release(self) -> None:
        if self._running is not None and self._tree.root:
            self._tree.root = 0
            self._group.release()
            self._running.release()
            self._run.ended_cpu_s += self._running.cpu_time_s
        orphans.collect_orphans()

    def _forget(self) -> None:
        orphans.collect_orphans()  # as long as it is known whose they are
        self._run.forget(self)
        if self._cgroup is not None:
            self._run.lost_cpu_s += self._lost_cpu_s(0.0)
            self._cgroup.remove()
            self._cgroup = None
