"""The supervisor of a VMmanage task: runs one program for the wrapper, and ends everything that comes of it.

For programs that cannot read a lifeline (a broker's start script, foreign VMmanage tasks). It outlives nothing: when
its lifeline reports the end of the wrapper, or says `end`, the program's whole tree is ended, orphans included. Started
with the lifeline on fd 3 and the status pipe on fd 4, as a process of little memory:

    python -m vmwrapper.process.supervisor GRACE_S PROGRAM [ARGUMENTS...]

Signals (docs/internals/architecture.md, "Processes"): supervisor and program start with TERM, INT and HUP blocked,
because systemd sends TERM to every process of the client at once, and the wrapper must be the one that ends things in
order. A program that unblocks them (a JVM does, unless it runs with -Xrs) dies of that TERM; nothing is lost by it. To
end the tree the supervisor sends TERM to those members that can receive it and waits for them up to the grace; KILL
follows at once for all others. Against kill -9 of the supervisor itself the program has PR_SET_PDEATHSIG, and the
wrapper, which adopts the orphans, ends the rest.

Status lines are JSON: {"event":"started","pid":N} {"event":"failed","detail":TEXT} {"event":"ended","status":N|null,
"signal":N|null}. `ended` comes when nothing of the tree is left: a script that starts a server and ends with 0 is not
the end of the server. When the program fails, what it left is ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vmcontrol.common import proctable
from vmcontrol.common.supervisor import Supervisor

LIFELINE_FD, STATUS_FD = 3, 4
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LOOK_AGAIN_S = 0.02
"""While ending only: descendants that are not our children cannot be waited for."""


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


class TaskSupervisor(Supervisor):
    """One VMmanage task."""

    def __init__(self, grace_s: float) -> None:
        super().__init__()
        self._grace_s = grace_s

    def _report(self, **event: object) -> None:
        with contextlib.suppress(OSError):  # nobody may be there to read it any more
            os.write(STATUS_FD, (json.dumps(event) + "\n").encode())

    def run(self, program: Sequence[str]) -> int:
        """Start the program, watch it, end its tree. 0 whatever became of it: the status lines say that."""
        self.begin()
        try:
            started = _start(program)  # kept: one that is dropped would collect the program's end
        except OSError as error:
            self._report(event="failed", detail=error.strerror or str(error))
            return 0
        self.pid = started.pid
        self._report(event="started", pid=self.pid)
        poller = select.poll()
        poller.register(LIFELINE_FD, select.POLLIN | select.POLLHUP)
        while True:
            self.reap()
            if self.wait_status is not None and (self.wait_status != 0 or not self.members()):
                break
            if LIFELINE_FD in self.wait(poller, None) and _is_to_end():
                break
        self._end_tree()
        code = None if self.wait_status is None else os.waitstatus_to_exitcode(self.wait_status)
        by_signal = -code if code is not None and code < 0 else None
        self._report(event="ended", status=code if by_signal is None else None, signal=by_signal)
        return 0

    def _end_tree(self) -> None:
        """TERM once to those that take it, KILL to the others at once, and to all after the grace."""
        end = time.monotonic() + self._grace_s
        asked: set[tuple[int, float]] = set()
        while (members := self.members()) and time.monotonic() < end:
            for entry in members:
                if entry.key in asked:
                    continue
                if takes_term(entry.pid):
                    asked.add(entry.key)
                    proctable.ask_to_end(entry)
                else:
                    proctable.kill(entry)
            time.sleep(_LOOK_AGAIN_S)
            self.reap()
        if left := self.kill_tree():
            print(f"processes {[entry.pid for entry in left]} cannot be ended", file=sys.stderr)  # noqa: T201


def _is_to_end() -> bool:
    """Whether the wrapper is gone, or wrote `end`."""
    with contextlib.suppress(BlockingIOError):
        text = os.read(LIFELINE_FD, 64)
        return not text or b"end" in text
    return False


def _start(program: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start the program, which dies with us. Raises OSError."""
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None  # a child must not load libraries
    parent = os.getpid()

    def die_with_parent() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

    return subprocess.Popen(program, preexec_fn=die_with_parent)  # noqa: PLW1509 (there is one thread)


def main(arguments: Sequence[str]) -> int:
    """The program's entry; `arguments` without its name."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    with contextlib.suppress(OSError):  # a terminal's Ctrl-C goes to the wrapper alone
        os.setsid()
    for fd in (LIFELINE_FD, STATUS_FD):
        os.set_inheritable(fd, False)
    os.set_blocking(LIFELINE_FD, False)
    return TaskSupervisor(float(arguments[0])).run(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
