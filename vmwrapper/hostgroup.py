"""Everything that comes of one program on the host: seen, stopped, let go on, counted and ended as one.

With a control group, which every program gets that runs for some seconds, the kernel does it. Without one a program's
processes are its descendants, and the orphans among our own children that carry its mark in their environment (we are a
child subreaper on Linux). What gets away then: nothing while we live; after a kill -9 of ours, a process that has both
left its parent and cleared its environment.

    HostPrograms    all programs of a run: CPU time, memory, stop and go on
    HostGroup       one of them, until nothing of it is left
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
from twisted.internet.process import reapProcessHandlers

from vmcontrol.eventloop import sleep
from vmwrapper import cgroups, proctable
from vmwrapper.cgroups import Group
from vmwrapper.processes import (
    HOST_MARK,
    KILL_LIMIT_S,
    RUN_MARK,
    SHARED,
    TERM_GRACE_S,
    Running,
    collect_orphans,
    gone,
    nothing_adopted,
    strays_possible,
)
from vmwrapper.proctable import Entry

STABLE_ROUNDS = 100
"""Looks at a tree until all of it is stopped. Each stops what was forked since the last; two are the rule."""
AGAIN_S = 0.02
"""A tree that is not stopped by then, because a process hangs in the kernel, is looked at again so often."""
AGAIN_COUNT = 50
LOOK_S = 0.9
"""CPU time and memory are reported once a second."""
GROUP_AFTER_S = 2.0
"""A program that has run so long gets a control group: moving it there costs more than a short one takes."""

log = logging.getLogger(__name__)


class HostPrograms:
    """The programs of a run."""

    def __init__(
        self, reactor: Any, token: str, *, stop_signal: int | None = None, note_group: Callable[[str], None]
    ) -> None:
        """stop_signal: SIGTSTP in place of SIGSTOP (--use_tstp). note_group: write down the run's control group."""
        self.reactor = reactor
        self.token = token
        self.stop_signal = stop_signal
        self._note_group = note_group
        self._group: Group | None = None
        self._may_group = stop_signal is None  # a program that is to see the signal must not be frozen before
        self.lost_cpu_s = 0.0
        """Of processes that had ended and that nobody had waited for; only a control group knows."""
        self._count = 0
        self._living: list[HostGroup] = []
        self._seen_cpu_s, self._seen_memory, self._look_at = 0.0, 0, 0.0
        self._suspended = False

    def begin(self, *, multi_process: bool) -> HostGroup:
        """For a program that is about to be started."""
        self._count += 1
        group = HostGroup(self, f"{self.token}{HOST_MARK}{self._count}", multi_process=multi_process)
        self._living.append(group)
        return group

    def forget(self, group: HostGroup) -> None:
        with contextlib.suppress(ValueError):
            self._living.remove(group)
        self._look_at = 0.0

    def lives(self, group: HostGroup) -> bool:
        return group in self._living

    def make_group(self, name: str) -> Group | None:
        """A control group for one program; None where that is not possible."""
        if self._may_group and self._group is None:
            self._group = cgroups.open_group(self.token)
            try:
                if self._group is not None:
                    self._note_group(str(self._group.folder))
            except OSError:
                self.close()
            self._may_group = self._group is not None
        return self._group.child(name) if self._group is not None else None

    def set_suspended(self, suspended: bool) -> None:
        """Stop everything, or let it go on."""
        if suspended != self._suspended:
            self._suspended = suspended
            for group in self._living:
                if suspended:
                    group.stop()
                else:
                    group.go_on()

    def cpu_time_s(self) -> float:
        """Of all host programs of this run so far, those that have ended included. As last looked at."""
        self._look()
        return self._seen_cpu_s

    def memory_bytes(self) -> int:
        """Resident memory of all that live, as last looked at."""
        self._look()
        return self._seen_memory

    def _look(self) -> None:
        """Look at the living, but not so often that looking takes more than a hundredth of a processor.

        What ended meanwhile is seen at the next look too: its time must not count as a living one's and an ended one's.
        """
        now = self.reactor.seconds()
        if self._living and now < self._look_at:
            return
        began = time.perf_counter()
        seen = [group.usage() for group in self._living]
        self._seen_cpu_s = ended_children_cpu_s() + self.lost_cpu_s + sum(cpu for cpu, _ in seen)
        self._seen_memory = sum(memory for _, memory in seen)
        self._look_at = now + max(LOOK_S, 100 * (time.perf_counter() - began)) if seen else 0.0

    def close(self) -> None:
        """The run is over."""
        if self._group is not None:
            self._group.remove()
            self._group = None


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

    def _tree(self) -> list[Entry]:
        """The same as the table of processes has it, and those that have ended and were not waited for."""
        roots = [self._running.pid] if self._running is not None and not self._released else []
        if not roots and not strays_possible() and not _have_children():
            return []
        table = proctable.look()
        return proctable.below(table, [*roots, *self._orphans(table)])

    def _orphans(self, table: proctable.Table) -> list[int]:
        """Our children that we did not start: those with the mark of this program, or with none that can be read.

        Where not all orphans are our children also the others with the mark.
        """
        me = os.getpid()
        found = []
        if strays_possible():
            ours = {entry.pid for entry in proctable.below(table, [me])}
            found = [pid for pid in table if pid not in ours and _mark_of_pid(pid) == self.mark]
        for entry in table.values():
            if entry.parent != me or entry.pid in reapProcessHandlers:
                continue
            with contextlib.suppress(psutil.Error):
                orphan = psutil.Process(entry.pid)
                mark = _mark_of(orphan)
                if mark == self.mark or (mark is None and orphan.name() not in SHARED):
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
        return max(0.0, lived + self._group.cpu_time_s() - living_s - (ended_children_cpu_s() - ended))

    # --- the control group

    def _join(self) -> None:
        """The program is no short one: give it a control group, if that can be."""
        group = self._programs.make_group(self.mark.rpartition(HOST_MARK)[2])
        if group is None:
            return
        before = (self.usage()[0], ended_children_cpu_s())

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
                _resume(entry.pid)
        self._stopped.clear()

    def _stop(self, times: int) -> None:
        if not self._wants_stop:
            return
        number = self._programs.stop_signal
        if number is not None:
            members = self.entries()
            for entry in members if self._multi_process else members[:1]:
                self._stopped.add(entry.pid)
                _send(entry.pid, number)
            return
        self._signal(getattr(signal, "SIGSTOP", 0))
        for _ in range(STABLE_ROUNDS):
            new = [entry for entry in self.entries() if not entry.is_stopped]
            if not new:
                return
            for entry in new:
                self._stopped.add(entry.pid)
                _suspend(entry.pid)
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

    async def end(self, grace_s: float = TERM_GRACE_S) -> None:
        """End all of it: TERM, and KILL after the grace, also what is started meanwhile. Nothing is left then."""
        if self._joining is not None and self._joining.active():
            self._joining.cancel()
        if self._running is not None and self._running.ended is not None and self._group is None and nothing_adopted():
            self._release()  # the rule, made cheap: what it had left would be our child by now
            self._programs.forget(self)
            return
        members = self.entries()
        if members and grace_s > 0:
            self._signal(signal.SIGTERM)
            for entry in members:
                if self._running is None or entry.process_group != self._running.pid:  # it has had it
                    _send(entry.pid, signal.SIGTERM)
            self._wants_stop = False
            if self._group is not None:
                self._group.freeze(frozen=False)
            self._signal(getattr(signal, "SIGCONT", 0))
            for entry in members:
                _resume(entry.pid)  # a stopped process would not see the TERM
            await gone(self._programs.reactor, _processes(members), grace_s)
        await self._kill()
        self._release()
        self._programs.forget(self)
        if self._group is not None:
            self._programs.lost_cpu_s += self._lost_cpu_s(0.0)
            self._group.remove()
            self._group = None

    def _release(self) -> None:
        if self._running is not None and not self._released:
            self._released = True
            self._running.release()
        collect_orphans()

    async def _kill(self) -> None:
        reactor = self._programs.reactor
        end = reactor.seconds() + KILL_LIMIT_S
        self._signal(getattr(signal, "SIGKILL", 0))
        while members := self.entries():
            if self._running is not None and self._running.ended is not None:
                log.info("ending %s, which the program has left", ", ".join(f"pid {entry.pid}" for entry in members))
            if self._group is None or not self._group.kill():
                for entry in members:
                    _send(entry.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
            await gone(reactor, _processes(members), max(0.0, end - reactor.seconds()))
            self._signal(getattr(signal, "SIGKILL", 0))
            collect_orphans()
            if reactor.seconds() >= end:
                log.warning("%s cannot be ended", ", ".join(f"pid {entry.pid}" for entry in members))
                return
            await sleep(reactor, 0)
        if self._running is not None and self._running.pid:
            await self._running.wait()


def ended_children_cpu_s() -> float:
    """CPU seconds of all our descendants that ended and were waited for."""
    if sys.platform == "win32":
        return 0.0
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


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
    try:
        return process.environ().get(RUN_MARK)
    except (psutil.Error, OSError):
        return None


def _mark_of_pid(pid: int) -> str | None:
    try:
        return _mark_of(psutil.Process(pid))
    except psutil.Error:
        return None


def _processes(members: list[Entry]) -> list[psutil.Process]:
    found = []
    for entry in members:
        with contextlib.suppress(psutil.Error):
            found.append(psutil.Process(entry.pid))
    return found


def _send(pid: int, number: int) -> None:
    if sys.platform == "win32":
        with contextlib.suppress(psutil.Error):
            psutil.Process(pid).terminate()
        return
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def _with_psutil(act: Callable[[psutil.Process], None], pid: int) -> None:
    with contextlib.suppress(psutil.Error):
        act(psutil.Process(pid))


def _suspend(pid: int) -> None:
    if sys.platform == "win32":
        _with_psutil(psutil.Process.suspend, pid)
    else:
        _send(pid, signal.SIGSTOP)


def _resume(pid: int) -> None:
    if sys.platform == "win32":
        _with_psutil(psutil.Process.resume, pid)
    else:
        _send(pid, signal.SIGCONT)
