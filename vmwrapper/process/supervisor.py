"""The keeper: a small process that runs one program for the wrapper and ends everything that comes of it.

For programs that cannot read a lifeline (a broker's start script, foreign VMmanage tasks). It outlives nothing: when
its lifeline reports the end of the wrapper, or says `end`, the program's whole tree is ended, orphans included (the
keeper is a child subreaper on Linux). Started as `python -m vmwrapper.process.supervisor`; only the standard library:
it is small.

    vmwrapper.process.supervisor --lifeline FD --status FD [--grace SECONDS] -- PROGRAM [ARGS...]

Signals (docs/internals/processes.md): keeper and program start with TERM, INT and HUP blocked, because systemd
sends TERM to every process of the client at once, and the wrapper must be the one that ends things in order. A program
that unblocks them (a JVM does, unless it runs with -Xrs) dies of that TERM; nothing is lost by it. To end the tree
the keeper sends TERM to those members that can receive it and waits for them up to the grace; KILL follows at once for
all others. Against kill -9 of the keeper itself the program has PR_SET_PDEATHSIG, and the wrapper, which adopts the
orphans, ends the rest.

Status lines are JSON: {"event":"started","pid":N} {"event":"failed","detail":TEXT} {"event":"ended","status":N|null,
"signal":N|null}. `ended` comes when nothing of the tree is left: a script that starts a server and ends with 0 is not
the end of the server. When the program fails, what it left is ended.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

BLOCKED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
DEFAULT_GRACE_S = 5.0
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LOOK_AGAIN_MS = 20
"""While ending only: descendants that are not our children cannot be waited for."""
_IS_LINUX = sys.platform.startswith("linux")


def _prctl(option: int, value: int) -> None:
    if _IS_LINUX:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _fields(pid: int) -> list[str] | None:
    """/proc/PID/stat after the command's name: state, ppid, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def descendants(root: int) -> list[int]:
    """Pids of all living descendants of `root`; zombies are not counted."""
    parents: dict[int, int] = {}
    zombies = set()
    for entry in os.listdir("/proc") if _IS_LINUX else []:  # noqa: PTH208 (names are wanted)
        if entry.isdigit() and (fields := _fields(int(entry))):
            parents[int(entry)] = int(fields[1])
            if fields[0] in "ZX":
                zombies.add(int(entry))
    found: set[int] = set()
    fresh = {root}
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return sorted(found - zombies)


def takes_term(pid: int) -> bool:
    """Whether TERM would reach this process: neither blocked nor ignored."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    mask = 0
    for line in text.splitlines():
        if line.startswith(("SigBlk:", "SigIgn:")):
            mask |= int(line.split()[1], 16)
    return not mask & (1 << (signal.SIGTERM - 1))


class Keeper:
    """One kept program."""

    def __init__(self, lifeline: int, status: int, grace_s: float) -> None:
        self._lifeline = lifeline
        self._status = status
        self._grace_s = grace_s
        self._child = 0
        self._ended: tuple[int | None, int | None] | None = None

    def tell(self, **event: object) -> None:
        with contextlib.suppress(OSError):  # nobody may be there to read it any more
            os.write(self._status, (json.dumps(event) + "\n").encode())

    def run(self, program: list[str]) -> int:
        """Start the program, watch it, end its tree. 0 whatever became of it: the status lines say that."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        error = self._start(program)
        if error:
            self.tell(event="failed", detail=error)
            return 0
        self.tell(event="started", pid=self._child)
        waiting = select.poll()
        waiting.register(self._lifeline, select.POLLIN | select.POLLHUP)
        waiting.register(wake_read, select.POLLIN)
        while True:
            self._reap()
            if self._ended is not None and (self._ended != (0, None) or not descendants(os.getpid())):
                break
            ready = {fd for fd, _ in waiting.poll()}
            if wake_read in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(wake_read, 512)
            if self._lifeline in ready and self._told_to_end():
                break
        self._end_tree()
        status, by_signal = self._ended or (None, None)
        self.tell(event="ended", status=status, signal=by_signal)
        return 0

    def _told_to_end(self) -> bool:
        """Whether the wrapper is gone, or wrote `end`."""
        with contextlib.suppress(BlockingIOError):
            text = os.read(self._lifeline, 64)
            return not text or b"end" in text
        return False

    def _start(self, program: list[str]) -> str:
        """Fork and exec; the error's text when that failed."""
        read, write = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        self._child = os.fork()
        if self._child == 0:
            try:
                _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != parent:
                    os._exit(1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.set_inheritable(self._lifeline, False)
                os.set_inheritable(self._status, False)
                os.execvp(program[0], program)  # noqa: S606 (that is what a keeper does)
            except OSError as error:
                os.write(write, (error.strerror or str(error)).encode())
            finally:
                os._exit(127)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            text = pipe.read().decode()
        if text:
            os.waitpid(self._child, 0)
        return text

    def _reap(self) -> None:
        """Collect whatever ended: the program, and orphans that became ours."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._child:
                code = os.waitstatus_to_exitcode(status)
                self._ended = (code, None) if code >= 0 else (None, -code)

    def _end_tree(self) -> None:
        me = os.getpid()
        end = time.monotonic() + self._grace_s
        asked: set[int] = set()
        while members := descendants(me):
            for pid in members:
                if pid in asked and time.monotonic() < end:
                    continue
                if pid not in asked and time.monotonic() < end and takes_term(pid):
                    asked.add(pid)
                    self._send(pid, signal.SIGTERM)
                    self._send(pid, signal.SIGCONT)
                else:
                    self._send(pid, signal.SIGKILL)
            select.poll().poll(_LOOK_AGAIN_MS)
            self._reap()
        self._reap()

    @staticmethod
    def _send(pid: int, number: int) -> None:
        with contextlib.suppress(OSError):
            os.kill(pid, number)


def main(words: list[str]) -> int:
    """The program's entry; `words` without its name."""
    parser = argparse.ArgumentParser(prog="vmwrapper.process.supervisor")
    parser.add_argument("--lifeline", type=int, required=True)
    parser.add_argument("--status", type=int, required=True)
    parser.add_argument("--grace", type=float, default=DEFAULT_GRACE_S)
    parser.add_argument("program", nargs="+")
    options = parser.parse_args(words)
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    session: Callable[[], None] = os.setsid
    with contextlib.suppress(OSError):  # Ctrl-C by hand goes to the wrapper alone
        session()
    for fd in (options.lifeline, options.status):
        os.set_inheritable(fd, False)
    os.set_blocking(options.lifeline, False)
    return Keeper(options.lifeline, options.status, options.grace).run(options.program)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
