"""Everything that comes of one program on the host: seen, stopped, let go on, counted and ended as one.

With a control group, which every program gets that runs for some seconds, the kernel does it. Without one a program's
processes are its descendants, and the orphans among our own children that carry its mark in their environment (we are a
child subreaper on Linux) or were seen to be its processes. What gets away then: nothing while we live; after a kill -9
of ours, a process that has both left its parent and cleared its environment.

All programs of a run together: `vmwrapper.process.programs`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

from twisted.internet.process import reapProcessHandlers

from vmcontrol.common import proctable
from vmcontrol.common.eventloop import Event, sleep
from vmcontrol.common.proctable import Entry
from vmwrapper.paths import listed
from vmwrapper.process import signalling
from vmwrapper.process.cgroups import Group
from vmwrapper.process.patience import Patience
from vmwrapper.process.trees import (
    HOST_MARK,
    KILL_LIMIT_S,
    RUN_MARK,
    SHARED,
    Running,
    adopted,
    collect_orphans,
    gone,
    nothing_adopted,
    strays_possible,
)

if TYPE_CHECKING:
    import psutil  # else imported where it is used: a host job that leaves nothing running never does

    from vmwrapper.process.programs import HostPrograms

STABLE_ROUNDS = 100
"""Looks at a tree until all of it is stopped. Each stops what was forked since the last; two are the rule."""
AGAIN_S = 0.02
"""A tree that is not stopped by then, because a process hangs in the kernel, is looked at again so often."""
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


class HostGroup:
    """One program with all its descendants."""

    def __init__(self, programs: HostPrograms, mark: str, *, multi_process: bool) -> None:
        self._programs = programs
        self._group: Group | None = None
        self._joined_at = (0.0, 0.0)
        """When it got its control group: CPU time of what lived, and of our children that had ended."""
        self._multi_process = multi_process
        self._running: Running | None = None
        self._stopped: set[int] = set()
        self._wants_stop = False
        self._released = False
        """Nothing is signalled by the program's number any more."""
        self.seen: set[tuple[int, float]] = set()
        """Keys of its processes at the last look: an orphan that clears its environment stays known."""
        self._patience: Patience | None = None
        """While it is being ended."""
        self._ended = Event()
        self._joining: Any = None
        self.mark = mark
        """Value of RUN_MARK in its environment."""

    def started(self, running: Running) -> None:
        self._running = running
        self._joining = self._programs.reactor.callLater(GROUP_AFTER_S, self._join)

    def drop(self) -> None:
        """The program could not be started."""
        self._programs.forget(self)

    def entries(self) -> list[Entry]:
        """Its living processes, parents first."""
        if self._group is not None:
            found = [proctable.look_at(pid) for pid in self._group.pids()]
            return [entry for entry in found if entry is not None and entry.is_alive]
        return [entry for entry in self._tree() if entry.is_alive]

    def _all_entries(self) -> list[Entry]:
        """The same, where none must be missed: the system's list is no moment's, and a chain of forks can pass it by.

        Our own children are known in far less time than a fork takes, and each of that chain becomes one.
        """
        if found := self.entries():
            return found
        calm = 0
        for _ in range(_LOOKS):
            collect_orphans()
            children = adopted()
            if not children or calm == _CALM_LOOKS:
                break
            entries = [proctable.look_at(pid) for pid in children]
            alive = [entry for entry in entries if entry is not None and entry.is_alive]
            if its := [entry for entry in alive if self._is_its(entry)]:
                return its
            calm = calm + 1 if len(alive) == len(children) else 0  # all are known to come of other programs
        return self.entries() if adopted() is None else []

    def _is_its(self, entry: Entry) -> bool:
        """Whether a child of ours that we did not start comes of this program."""
        if entry.key in self.seen:
            return True
        if self._programs.has_seen(entry, but=self):
            return False
        import psutil

        with contextlib.suppress(psutil.Error):
            orphan = psutil.Process(entry.pid)
            mark = _mark_of(orphan)
            return mark == self.mark or (mark is None and orphan.name() not in SHARED)
        return False

    def _tree(self) -> list[Entry]:
        """The same as the table of processes has it, and those that have ended and were not waited for."""
        roots = [self._running.pid] if self._running is not None and not self._released else []
        if not roots and not strays_possible() and not _have_children():
            return []
        table = proctable.look()
        found = proctable.below(table, [*roots, *self._orphans(table)])
        self.seen = {entry.key for entry in found}
        return found

    def _orphans(self, table: proctable.Table) -> list[int]:
        """Our children that we did not start: those with the mark of this program, or that were seen to be its
        processes, or that nobody knows and that have no mark that can be read.

        Where not all orphans are our children also the others with the mark.
        """
        me = os.getpid()
        found = []
        if strays_possible():
            ours = {entry.pid for entry in proctable.below(table, [me])}
            found = [pid for pid in table if pid not in ours and _mark_of_pid(pid) == self.mark]
        for entry in table.values():
            if entry.parent == me and entry.pid not in reapProcessHandlers and self._is_its(entry):
                found.append(entry.pid)
        return found

    def usage(self) -> tuple[float, int]:
        """CPU time and memory of what lives. With a control group also the time of children that nobody waited for."""
        tree = self._tree()
        living = sum(entry.cpu_time_s for entry in tree)
        return living + self._lost_cpu_s(living), sum(entry.memory_bytes for entry in tree)

    def _lost_cpu_s(self, living_s: float) -> float:
        """What the control group counts beyond all that is known otherwise."""
        if self._group is None:
            return 0.0
        lived, ended = self._joined_at
        return max(0.0, lived + self._group.cpu_time_s() - living_s - (self._programs.ended_cpu_s - ended))

    # --- the control group

    def _join(self) -> None:
        """The program is no short one: give it a control group, if that can be."""
        group = self._programs.make_group(self.mark.rpartition(HOST_MARK)[2])
        if group is None:
            return
        before = (self.usage()[0], self._programs.ended_cpu_s)

        def work() -> None:
            joined = group.take_in(lambda: [entry.pid for entry in self._tree() if entry.is_alive])
            if not joined:
                group.remove()  # here, for it may wait
            self._programs.reactor.callFromThread(self._joined, group, before, joined)

        threading.Thread(target=work, name="control group", daemon=True).start()

    def _joined(self, group: Group, before: tuple[float, float], joined: bool) -> None:
        if joined and self._programs.lives(self):
            self._group, self._joined_at = group, before
            if self._wants_stop:
                group.freeze(frozen=True)
        elif joined:
            group.kill()
            group.remove()

    # --- stop and go on

    def stop(self) -> None:
        """Stop all its processes. At once for all but those that hang in the kernel."""
        self._wants_stop = True
        if self._group is None or not self._group.freeze(frozen=True):
            self._stop(AGAIN_COUNT)
        elif self._programs.stop_signal is None:
            self._signal(getattr(signal, "SIGSTOP", 0))  # for one that was just being forked as its tree was moved in

    def go_on(self) -> None:
        """Let those go on that `stop` has stopped, children first, so that no parent wonders about a stopped child."""
        self._wants_stop = False
        if self._group is not None:
            self._group.freeze(frozen=False)
        self._signal(getattr(signal, "SIGCONT", 0))
        for entry in reversed(self.entries()):
            if entry.pid in self._stopped:
                signalling.resume(entry.pid)
        self._stopped.clear()

    def _stop(self, times: int) -> None:
        if not self._wants_stop:
            return
        number = self._programs.stop_signal
        if number is not None:
            members = self.entries()
            for entry in members if self._multi_process else members[:1]:
                self._stopped.add(entry.pid)
                signalling.send(entry.pid, number)
            return
        self._signal(getattr(signal, "SIGSTOP", 0))
        for _ in range(STABLE_ROUNDS):
            new = [entry for entry in self.entries() if not entry.is_stopped]
            if not new:
                return
            for entry in new:
                self._stopped.add(entry.pid)
                signalling.suspend(entry.pid)
        if times:
            self._programs.reactor.callLater(AGAIN_S, self._stop, times - 1)
        else:
            log.warning("not all processes could be stopped: %s", [entry.pid for entry in new])

    def _signal(self, number: int) -> None:
        """A signal to the program's process group: at once to all in it, also to those that are just being forked.

        The group's number cannot be another's: the program's zombie is kept until `end`.
        """
        if number and self._running is not None and self._running.pid and not self._released and hasattr(os, "killpg"):
            with contextlib.suppress(OSError):
                os.killpg(self._running.pid, number)

    # --- end

    async def left_running(self) -> list[Entry]:
        """The program has ended: what of it runs on, which stays known, counted and stopped with the rest.

        When that is nothing it is over. One that is only late is waited for.
        """
        if self._is_over():
            return []
        members = self._all_entries()
        if members:
            await gone(self._programs.reactor, _processes(members), STRAGGLERS_S)
            members = self._all_entries()
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
        if not self._programs.lives(self) or self._is_over():
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
        if self._programs.lives(self):
            await self._ended.wait()

    def is_there(self) -> bool:
        """Whether any of it still runs; when not it is over. For one whose program has ended."""
        if self._programs.lives(self) and not self._all_entries():
            self._forget()
        return self._programs.lives(self)

    def _is_over(self) -> bool:
        """Whether it has ended and certainly left nothing: the rule, made cheap."""
        if self._joining is not None and self._joining.active():
            self._joining.cancel()
        if self._running is None or self._running.ended is None or self._group is not None or not nothing_adopted():
            return False
        self._release()
        self._programs.forget(self)
        return True

    async def _ask_to_end(self) -> None:
        """TERM, in the right order, until nothing is left or the patience is used up."""
        members = self.entries()
        first = {entry.key for entry in members}
        asked: set[tuple[int, float]] = set()
        main = self._running
        if main is not None and main.ended is None:
            signalling.ask_to_end(main.pid)
            asked = {entry.key for entry in members if entry.pid == main.pid}
        reactor = self._programs.reactor
        others_at = reactor.seconds() + Patience.others_s()
        while members and self._left_s() > 0:
            alone, late = main is None or main.ended is not None, reactor.seconds() >= others_at
            for entry in members:
                if entry.key in asked or self._wants_stop:  # suspended meanwhile: it would be let go on
                    continue
                if late or (alone and entry.key in first):
                    asked.add(entry.key)
                    signalling.ask_to_end(entry.pid)
            await gone(reactor, _processes(members[:1]), min(_LOOK_AGAIN_S, max(0.01, self._left_s())))
            members = self._all_entries()

    def _left_s(self) -> float:
        return self._patience.left_s if self._patience is not None else 0.0

    def _forget(self) -> None:
        collect_orphans()  # as long as it is known whose they are
        self._programs.forget(self)
        if self._group is not None:
            self._programs.lost_cpu_s += self._lost_cpu_s(0.0)
            self._group.remove()
            self._group = None

    def _release(self) -> None:
        if self._running is not None and not self._released:
            self._released = True
            self._running.release()
            self._programs.ended_cpu_s += self._running.cpu_time_s
        collect_orphans()

    async def _kill(self) -> None:
        reactor = self._programs.reactor
        end = reactor.seconds() + KILL_LIMIT_S
        self._signal(getattr(signal, "SIGKILL", 0))
        while members := self._all_entries():
            log.info("killing %s", named(members))
            if self._group is None or not self._group.kill():
                for entry in members:
                    signalling.kill(entry.pid)
            await gone(reactor, _processes(members), max(0.0, end - reactor.seconds()))
            self._signal(getattr(signal, "SIGKILL", 0))
            collect_orphans()
            if reactor.seconds() >= end:
                log.warning("%s cannot be ended", named(members))
                return
            await sleep(reactor, 0)
        if self._running is not None and self._running.pid:
            await self._running.wait()


def named(members: list[Entry]) -> str:
    """Some processes, for one line."""
    return listed([f"{proctable.name_of(entry.pid)} (pid {entry.pid})" for entry in members])


def _have_children() -> bool:
    """Whether we have any child at all, which answers most questions for a moment's work."""
    if not hasattr(os, "waitid"):
        return True
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _mark_of(process: psutil.Process) -> str | None:
    import psutil

    try:
        return process.environ().get(RUN_MARK)
    except (psutil.Error, OSError):
        return None


def _mark_of_pid(pid: int) -> str | None:
    import psutil

    try:
        return _mark_of(psutil.Process(pid))
    except psutil.Error:
        return None


def _processes(members: list[Entry]) -> list[psutil.Process]:
    import psutil

    found = []
    for entry in members:
        with contextlib.suppress(psutil.Error):
            found.append(psutil.Process(entry.pid))
    return found
