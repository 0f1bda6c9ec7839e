"""The supervisor of one command in the guest: started by the agent for each (`vmcontrol.common.supervisor`).

Because it adopts the command's orphans, CPU time and "is anything left" are exact and never mix with another command's.
It also ends everything when the agent dies. How nothing is lost or counted twice: a process that ended and was waited
for is in the `cutime` of whoever waited, up to our own RUSAGE_CHILDREN; what still lives is read from its `stat`, with
the children that it has waited for. Not counted, as nowhere in Linux without cgroups: children of a program that
ignores SIGCHLD, once they have ended.

Speaks messages of `pack` and `unpack`. In, on fd 0: first the request, for which it may wait long (the arguments of
launch.Program and fraction_done_file), later {"cancel": grace in s}; end of file: kill all, go. Out, on fd 1:
{"started": pid};
{"sample": ...} each `pause_after`, when something changed; last {"ended": ...} or {"failed": code, ...}.

A command has ended when its first process has ended; what is left of its tree is then killed: nothing survives it.
A cancel is TERM as `TermOrder` says, where OTHERS_S is at most two thirds of the grace. At the end of the grace
everything is killed. Needs Linux. Imports as little as it can: under emulation a millisecond of imports here is ten,
for each command.
"""

from __future__ import annotations

import marshal
import os
import resource
import select
import signal
import time

from guest.commands import launch, progress
from vmcontrol.common import proctable
from vmcontrol.common.supervisor import OTHERS_S, Supervisor, TermOrder

TYPE_CHECKING = False
if TYPE_CHECKING:  # without importing typing
    from typing import Any

SAMPLE_S, LONGEST_SAMPLE_S = 1.0, 5.0
"""Between two samples, and so between two CMD_STATE: a second at first, then a sixtieth of the time it has run, at most
5 s. Each is a look at all processes of the guest, a message, and a call of the wrapper's."""


def pack(message: dict[str, Any]) -> bytes:
    """A message between the agent and a supervisor: length, then marshal (same interpreter on both sides of a pipe)."""
    payload = marshal.dumps(message)
    return len(payload).to_bytes(4, "little") + payload


def unpack(buffer: bytes) -> tuple[dict[str, Any] | None, bytes]:
    """The first message in `buffer`, None while it is not complete, and what comes after it."""
    end = 4 + int.from_bytes(buffer[:4], "little")
    if len(buffer) < max(end, 5):
        return None, buffer
    return marshal.loads(buffer[4:end]), buffer[end:]  # noqa: S302 (from our own process)


def pause_after(elapsed_s: float) -> float:
    """Seconds until the next sample of a command that has run so long."""
    return min(LONGEST_SAMPLE_S, max(SAMPLE_S, elapsed_s / 60))


def oom_kills(path: str = "/proc/vmstat") -> int:
    """How often the kernel killed for want of memory since boot; 0 where it does not count."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            _, name, after = file.read().partition(b"\noom_kill ")
            return int(after.split()[0]) if name else 0
    except (OSError, ValueError, IndexError):
        return 0


class CommandSupervisor(Supervisor):
    """One command, from the request to the report of its end."""

    def __init__(self, requests: int, reports: int) -> None:
        super().__init__()
        self._requests = requests
        self._reports = reports
        self._buffer = b""
        self._kill_at: float | None = None
        """A cancel has come."""
        self._term_order: TermOrder | None = None
        self._seen_killed = False
        self._cpu_s = 0.0
        self._peak_bytes = 0
        self._fraction_file: tuple[str, list[str]] | None = None
        self._last_sample: dict[str, Any] = {}
        self._own_kill = False

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        self.begin()
        request = self._request()
        if request is None:
            return 0
        oom_before = oom_kills()
        started, began = time.time(), time.monotonic()
        try:
            self._start(request)
        except launch.LaunchError as error:
            self._report({"failed": error.code, "detail": str(error)})
            return 0
        self._report({"started": self.pid})
        self._watch()
        left = self.kill_tree()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        status, cancelled = self.wait_status or 0, self._kill_at is not None
        self._report(
            {
                "ended": {
                    "exit_status": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
                    "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
                    "cpu_time_s": max(self._cpu_s, used.ru_utime + used.ru_stime),
                    "resources": {name: getattr(used, name) for name in dir(used) if name.startswith("ru_")},
                    "peak_memory_bytes": max(self._peak_bytes, used.ru_maxrss * 1024),
                    "started": started,
                    "ended": time.time(),
                    "elapsed_s": time.monotonic() - began,
                    "cancelled": cancelled,
                    "killed_for_memory": oom_kills() > oom_before and not cancelled,
                    "killed_by_kernel": self._seen_killed,
                    "left": len(left),
                }
            }
        )
        return 0

    def _request(self) -> dict[str, Any] | None:
        """The request; None if the agent went without one."""
        while True:
            message, self._buffer = unpack(self._buffer)
            if message is not None:
                return message
            chunk = os.read(self._requests, 65536)
            if not chunk:
                return None
            self._buffer += chunk

    def _start(self, request: dict[str, Any]) -> None:
        fraction_done_file = request.pop("fraction_done_file")
        program = launch.Program(**request)
        if fraction_done_file:
            self._fraction_file = (fraction_done_file, request["places"])
        self.pid = launch.start(program)

    def _watch(self) -> None:
        """Until the first process has ended, or after a cancel the whole tree or the grace."""
        poller = select.poll()
        poller.register(self._requests, select.POLLIN)
        began = time.monotonic()
        sample_at = began + SAMPLE_S
        self._take_messages()  # a cancel may have come in one piece with the request
        while True:
            alive = self.reap()
            now = time.monotonic()
            over = self._kill_at is not None and now >= self._kill_at
            if self.wait_status is not None and (not alive or self._kill_at is None or over):
                return
            if over:
                self.kill_tree()
                continue
            if self._term_order is not None and (self.wait_status is not None or now >= self._term_order.others_at):
                self._ask(self._term_order, self.members())
            if now >= sample_at:
                self._sample()
                sample_at = time.monotonic() + pause_after(time.monotonic() - began)
            if self._requests in self.wait(poller, self._next(now, sample_at) - time.monotonic()) and not self._obey():
                poller.unregister(self._requests)

    def _next(self, now: float, sample_at: float) -> float:
        """When there is something to do if nothing happens."""
        until = sample_at if self._kill_at is None else min(sample_at, self._kill_at)
        if self._term_order is not None and now < self._term_order.others_at:
            until = min(until, self._term_order.others_at)
        return until

    def _obey(self) -> bool:
        """Read what the agent says. False: it is gone, and so is the command now."""
        try:
            chunk = os.read(self._requests, 65536)
        except OSError:
            chunk = b""
        if not chunk:
            self._kill_at = time.monotonic()
            return False
        self._buffer += chunk
        self._take_messages()
        return True

    def _take_messages(self) -> None:
        """Carry out what has been read. Of several cancels the shortest grace counts."""
        while True:
            message, self._buffer = unpack(self._buffer)
            if message is None:
                return
            now, grace_s = time.monotonic(), float(message["cancel"])
            self._kill_at = min(now + grace_s, self._kill_at or now + grace_s)
            if self._term_order is None:
                members = self.members()
                self._term_order = TermOrder(self.pid, members, now + min(OTHERS_S, grace_s * 2 / 3))
                self._ask(self._term_order, members)

    def _ask(self, order: TermOrder, members: list[proctable.Entry]) -> None:
        """TERM to those whose time has come."""
        for entry in order.due(members, time.monotonic(), main_ended=self.wait_status is not None):
            proctable.ask_to_end(entry)

    def collected(self, pid: int, status: int) -> None:
        """Note a process that the kernel has killed."""
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if pid == self.pid:  # a shell says 128 + signal for its child
            killed = killed or (os.WIFEXITED(status) and os.WEXITSTATUS(status) == 128 + signal.SIGKILL)
        self._seen_killed = self._seen_killed or (killed and not self._own_kill)

    def seen(self, members: list[proctable.Entry]) -> None:
        """What is about to be killed by us is counted once more."""
        self._own_kill = True
        self._note(members)

    def _note(self, tree: list[proctable.Entry]) -> int:
        """Remember the highest CPU time and memory seen, for trees whose ended children nobody waits for."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._cpu_s = max(self._cpu_s, used.ru_utime + used.ru_stime + sum(entry.cpu_time_s for entry in tree))
        memory = sum(entry.memory_bytes for entry in tree)
        self._peak_bytes = max(self._peak_bytes, memory)
        return memory

    def _sample(self) -> None:
        memory = self._note(proctable.descendants(os.getpid()))
        fraction = None
        if self._fraction_file is not None:
            name, places = self._fraction_file
            path = launch.find_file(name, places)
            fraction = None if path is None else progress.read_fraction(path)
        sample = {"cpu_time_s": round(self._cpu_s, 3), "memory_bytes": memory, "fraction_done": fraction}
        if sample != self._last_sample:
            self._last_sample = sample
            self._report({"sample": sample})

    def _report(self, event: dict[str, Any]) -> None:
        text = pack(event)
        try:  # the agent may be gone: seen as end of file on the requests too
            while text:
                text = text[os.write(self._reports, text) :]
        except OSError:
            pass


def main() -> None:
    """Run one command for the agent on fds 0 and 1. Does not return: nothing is left to tidy up."""
    os.setsid()
    requests, reports = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    os._exit(CommandSupervisor(requests, reports).run())
