"""The keeper: one small process for each command, started by the agent, parent and child subreaper of the command.

Why a process of its own: every process that a command leaves an orphan becomes the keeper's child and nobody else's, so
CPU time and "is anything left" are exact and never mix with another command's, whatever the programs do with sessions
and environments. It also ends everything when the agent dies.

Speaks messages of `pack` and `unpack`. In, on fd 0: first the request, for which it may wait long (the arguments of
launch.Program and fraction_done_file), later {"cancel": grace in s}; end of file: kill all, go. Out, on fd 1:
{"started": pid};
{"sample": ...} each `pause_after`, when something changed; last {"ended": ...} or {"failed": code, ...}.

A command has ended when its first process has ended; what is left of its tree is then killed: nothing survives it.
A cancel is TERM to the first process alone, which may have to ask others to save. They get it when that one has ended
or after OTHERS_S (at most two thirds of the grace); what was started meanwhile, after OTHERS_S. At the end of the grace
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

from guest.commands import accounting, launch, progress

TYPE_CHECKING = False
if TYPE_CHECKING:  # without importing typing
    from typing import Any

SAMPLE_S, LONGEST_SAMPLE_S = 1.0, 5.0
"""Between two samples, and so between two CMD_STATE: a second at first, then a sixtieth of the time it has run, at most
5 s. Each is a look at all processes of the guest, a message, and a call of the wrapper's."""
OTHERS_S = 10.0
"""As on the host (vmwrapper/process/patience.py)."""
KILL_LIMIT_S = 10.0
"""For killing a tree; what is left then (another user's processes) is named in the log and left."""

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def pack(message: dict[str, Any]) -> bytes:
    """A message between the agent and its keeper: length, then marshal (same interpreter on both sides of a pipe)."""
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


def become_subreaper() -> bool:
    """Make this process the parent of every orphan below it. False where the kernel has no such thing."""
    import ctypes  # late: start-up time of those who import this module for its constants

    try:
        return bool(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


class Keeper:
    """One command, from the request to the report of its end."""

    def __init__(self, requests: int, reports: int) -> None:
        self._requests = requests
        self._reports = reports
        self._buffer = b""
        self._pid = 0
        self._status: int | None = None
        self._cancelled = False
        self._kill_at: float | None = None
        self._others_at = 0.0
        """When all processes get the TERM of a cancel."""
        self._to_ask: set[tuple[int, int]] = set()
        """Those that ran at the cancel and have not got it: pid and start."""
        self._asked: set[tuple[int, int]] = set()
        self._seen_killed = False
        self._cpu_s = 0.0
        self._peak_bytes = 0
        self._fraction_file: tuple[str, list[str]] | None = None
        self._last_sample: dict[str, Any] = {}
        self._own_kill = False

    def run(self) -> int:
        become_subreaper()
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        request = self._request()
        if request is None:
            return 0
        oom_before = accounting.oom_kills()
        started, began = time.time(), time.monotonic()
        try:
            self._start(request)
        except launch.LaunchError as error:
            self._report({"failed": error.code, "detail": str(error)})
            return 0
        self._report({"started": self._pid})
        self._watch(wake_read)
        left = self._kill_rest()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        status = self._status or 0
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
                    "cancelled": self._cancelled,
                    "killed_for_memory": accounting.oom_kills() > oom_before and not self._cancelled,
                    "killed_by_kernel": self._seen_killed,
                    "left": left,
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
        self._pid = launch.start(program)

    def _watch(self, wake: int) -> None:
        """Until the first process has ended, or after a cancel the whole tree or the grace."""
        poller = select.poll()
        poller.register(self._requests, select.POLLIN)
        poller.register(wake, select.POLLIN)
        began = time.monotonic()
        sample_at = began + SAMPLE_S
        self._take_messages()  # a cancel may have come in one piece with the request
        while True:
            alive = self._reap()
            now = time.monotonic()
            if self._status is not None and (not alive or self._kill_at is None or now >= self._kill_at):
                return
            if self._kill_at is not None and now >= self._kill_at:
                self._kill_rest()
                continue
            if self._cancelled:
                self._ask_others(now)
            if now >= sample_at:
                self._sample()
                sample_at = time.monotonic() + pause_after(time.monotonic() - began)
            until = sample_at if self._kill_at is None else min(sample_at, self._kill_at)
            if self._cancelled and now < self._others_at:
                until = min(until, self._others_at)
            for fd, _ in poller.poll(max(0.0, until - time.monotonic()) * 1000 + 1):
                if fd == wake:
                    os.read(wake, 4096)
                elif not self._obey():
                    poller.unregister(self._requests)

    def _obey(self) -> bool:
        """Read what the agent says. False: it is gone, and so is the command now."""
        try:
            chunk = os.read(self._requests, 65536)
        except OSError:
            chunk = b""
        if not chunk:
            self._cancelled = True
            self._kill_at = time.monotonic()
            return False
        self._buffer += chunk
        self._take_messages()
        return True

    def _take_messages(self) -> None:
        """Carry out what has been read."""
        while True:
            message, self._buffer = unpack(self._buffer)
            if message is None:
                return
            grace_s = float(message["cancel"])
            kill_at = time.monotonic() + grace_s
            self._kill_at = kill_at if self._kill_at is None else min(kill_at, self._kill_at)
            if not self._cancelled:
                self._cancelled = True
                self._others_at = time.monotonic() + min(OTHERS_S, grace_s * 2 / 3)
                for stat in accounting.descendants(os.getpid()):
                    if stat.pid == self._pid:
                        self._ask(stat)
                    else:
                        self._to_ask.add((stat.pid, stat.start_ticks))

    def _ask_others(self, now: float) -> None:
        """TERM to those whose time has come. What the first process started in order to save is left time for it."""
        if now < self._others_at and (self._status is None or not self._to_ask):
            return
        for stat in accounting.descendants(os.getpid()):
            key = (stat.pid, stat.start_ticks)
            if key not in self._asked and (now >= self._others_at or key in self._to_ask):
                self._ask(stat)
        self._to_ask.clear()

    def _ask(self, stat: accounting.Stat) -> None:
        self._asked.add((stat.pid, stat.start_ticks))
        _signal(stat, signal.SIGTERM)
        _signal(stat, signal.SIGCONT)  # a stopped process takes no TERM

    def _reap(self) -> bool:
        """Wait for all that have ended. False: there are no children any more."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            if pid == self._pid:
                self._status = status
                # a shell says 128 + signal for its child
                killed = killed or (os.WIFEXITED(status) and os.WEXITSTATUS(status) == 128 + signal.SIGKILL)
            if killed and not self._own_kill:
                self._seen_killed = True

    def _kill_rest(self) -> int:
        """Kill everything below the keeper; the number of processes that cannot be killed.

        Stopped first, because a stopped process cannot fork away from its end.
        """
        limit = time.monotonic() + KILL_LIMIT_S
        self._own_kill = True
        stopped: set[tuple[int, int]] = set()
        while self._reap():
            tree = [stat for stat in accounting.descendants(os.getpid()) if not stat.ended]
            self._note(tree)
            if time.monotonic() > limit:
                return len(tree)
            new = [stat for stat in tree if (stat.pid, stat.start_ticks) not in stopped]
            if new:
                for stat in new:
                    stopped.add((stat.pid, stat.start_ticks))
                    _signal(stat, signal.SIGSTOP)
                continue
            for stat in tree:
                _signal(stat, signal.SIGKILL)
            stopped.clear()
            select.select([], [], [], 0.002)  # the kernel's time to end them
        return 0

    def _note(self, tree: list[accounting.Stat]) -> float:
        """Remember the highest CPU time and memory seen, for trees whose ended children nobody waits for."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        seen = used.ru_utime + used.ru_stime + accounting.cpu_seconds(tree)
        self._cpu_s = max(self._cpu_s, seen)
        memory = accounting.resident_bytes(tree)
        self._peak_bytes = max(self._peak_bytes, memory)
        return memory

    def _sample(self) -> None:
        memory = self._note(accounting.descendants(os.getpid()))
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


def _signal(stat: accounting.Stat, number: signal.Signals) -> None:
    """Send a signal to exactly this process: its number may be another's meanwhile."""
    now = accounting.read_stat(stat.pid)
    if now is None or now.start_ticks != stat.start_ticks or now.ended:
        return
    try:  # noqa: SIM105 (contextlib is an import)
        os.kill(stat.pid, number)
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
    os._exit(Keeper(requests, reports).run())
