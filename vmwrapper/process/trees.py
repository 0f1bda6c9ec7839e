"""Programs that the wrapper starts, and their process trees: start, suspend, resume, CPU time, end.

Owns nothing that outlives a program; `vmwrapper.process.leftovers` keeps the list in the slot. Never kills by name: a
process is a pid with its start time, or it carries the mark of this run in its environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import signal
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.process import reapProcessHandlers
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from vmcontrol.common import birth, proctable
from vmcontrol.common.beneath import open_file
from vmcontrol.common.eventloop import Event, sleep

RUN_MARK = "VMWRAPPER_RUN"
"""Environment variable that every process of a run carries: a token that no other run has."""
HOST_MARK = ":"
"""Stands in the mark of host programs, between the token and the program's number."""
TERM_GRACE_S = 5.0
SHARED = frozenset({"VBoxSVC", "VBoxXPCOMIPCD", "VBoxHeadless", "VirtualBoxVM", "VBoxNetDHCP", "VBoxNetNAT"})
"""Services of VirtualBox that one user's slots share: whoever started them, they are not ours to end."""
KILL_LIMIT_S = 5.0
"""After KILL. A process that is still there then hangs in the kernel; waiting longer would not end it."""
_STABLE_ROUNDS = 10
_LOOK_AGAIN_S = 0.05
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_LIBC = ctypes.CDLL(None) if sys.platform.startswith("linux") else None

if TYPE_CHECKING:
    import psutil  # else imported where it is used: a host job that leaves nothing running never does

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended: with an exit status or by a signal."""

    status: int | None
    signal: int | None = None

    @property
    def good(self) -> bool:
        return self.status == 0

    def __str__(self) -> str:
        if self.signal is not None:
            with contextlib.suppress(ValueError):
                return f"ended by signal {self.signal} ({signal.Signals(self.signal).name})"
            return f"ended by signal {self.signal}"
        return f"ended with exit status {self.status}"


@dataclass(frozen=True, slots=True)
class Streams:
    """Where a program's streams go. None: stdin is empty, stdout and stderr are ours."""

    stdin: Path | None = None
    stdout: Path | None = None
    stderr: Path | None = None
    stderr_fd: int = 2
    """What stderr is when it has no file."""
    base: Path | None = None
    """Below this folder no link is followed."""


class StreamError(Exception):
    """A stream's file cannot be opened; `str` names it and says why."""

    def __init__(self, stream: str, path: object, error: OSError) -> None:
        super().__init__(f"{stream} file {path} cannot be opened: {error.strerror}")
        self.element = f"{stream}_filename"
        """Of the job file."""
        self.is_missing = isinstance(error, FileNotFoundError)


class CannotStart(Exception):  # noqa: N818
    """The system refused to start the program; `str` says why."""


class Running(ProcessProtocol):
    """A started program."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pid = 0
        self.began = birth.UNKNOWN
        self.ended: Ended | None = None
        self.cpu_time_s = 0.0
        """Its own and that of children that it has waited for; known when it is released."""
        self._over = Event()
        self.transport: Any = None

    def processExited(self, reason: Failure) -> None:  # noqa: N802 (Twisted's name)
        value: Any = reason.value
        ended = Ended(getattr(value, "exitCode", None), getattr(value, "signal", None))
        if ended.status is None and ended.signal is None:  # ProcessDone
            ended = Ended(0)
        self.has_ended(ended)

    def has_ended(self, ended: Ended) -> None:
        """The program itself is no more."""
        self.ended = ended
        self._over.set()

    def release(self) -> None:
        """Nobody needs its pid any more. Until then no other process and no process group can have it."""

    async def wait(self) -> Ended:
        """Until the program itself has ended; what it started may still run."""
        await self._over.wait()
        return self.ended or Ended(None)

    def close_pipe(self, fd: int) -> None:
        """Close our end of a pipe that was given as child fd."""
        with contextlib.suppress(KeyError):
            self.transport.closeChildFD(fd)


def open_streams(streams: Streams) -> dict[int, int]:
    """File descriptors 0, 1 and 2 for a program; stdout and stderr append. Raises StreamError, leaving none open."""
    fds: dict[int, int] = {}
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    try:
        for number, path, flags in ((0, streams.stdin, os.O_RDONLY), (1, streams.stdout, append),
                                    (2, streams.stderr, append)):  # fmt: skip
            if path is None and number:
                fds[number] = os.dup(streams.stderr_fd if number == 2 else number)
            else:
                fds[number] = _open_stream(path or Path(os.devnull), flags, streams.base)
    except OSError as error:
        close_all(fds.values())
        raise StreamError(("stdin", "stdout", "stderr")[len(fds)], error.filename, error) from error
    return fds


def _open_stream(path: Path, flags: int, base: Path | None) -> int:
    """Raises OSError, also for what would make us wait (a pipe without its other end) or is none (a folder)."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if stat.S_ISFIFO(mode):
            raise OSError(errno.EINVAL, "it is a named pipe", str(path))
    return open_file(path, base, flags)


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def start_program(
    reactor: Any,
    command: Sequence[str | Path],
    *,
    folder: Path,
    environment: Mapping[str, str],
    streams: Streams,
    pipes: Mapping[int, str | int] | None = None,
    protocol: Running | None = None,
) -> Running:
    """Start a program; `command[0]` is its path. Raises StreamError, CannotStart.

    pipes: further fds of the child, "r" (we read what it writes), "w" (we write what it reads; it sees the end of file
    when we are gone), or a descriptor of ours that it inherits. `protocol` gets what is read.
    """
    running = protocol or Running(str(command[0]))
    fds = open_streams(streams)
    words = [os.fsencode(word) for word in command]
    try:
        reactor.spawnProcess(
            running,
            words[0],
            words,
            env={os.fsencode(name): os.fsencode(value) for name, value in environment.items()},
            path=os.fsencode(folder),
            childFDs={**fds, **(pipes or {})},
        )
    except OSError as error:
        raise CannotStart(f"{command[0]} cannot be started: {error.strerror or error}") from error
    finally:
        close_all(fds.values())
    running.pid = running.transport.pid or 0
    running.began = birth.of(running.pid)
    return running


# --- trees ---------------------------------------------------------------------------------------------------------


def become_subreaper() -> bool:
    """Orphans among our descendants become our children, so that none gets away. False where that cannot be (Linux)."""
    if _LIBC is None:
        return False
    return bool(_LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


_strays = False


def adopt_nothing() -> None:
    """For now orphans are not adopted (VirtualBox's service may be among them), so they are looked for by their mark.

    For the rest of this process, for what was orphaned before a later `become_subreaper` stays somebody else's.
    """
    global _strays  # noqa: PLW0603 (it is a fact about the process, as being a subreaper is)
    _strays = True


def strays_possible() -> bool:
    """Whether there can be orphans of ours that are not our children."""
    return _strays or not is_subreaper()


def is_subreaper() -> bool:
    """Whether what our descendants leave becomes ours."""
    answer = ctypes.c_int(0)
    return _LIBC is not None and _LIBC.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(answer)) == 0 and answer.value == 1


def tree(root: psutil.Process | None) -> list[psutil.Process]:
    """A process and all its descendants, parents first."""
    if root is None:
        return []
    import psutil

    try:
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return [root]


def _children() -> list[int] | None:
    """Our children, zombies too, by one small file in place of a scan; None where there is none (CONFIG_PROC_CHILDREN).

    What we adopt becomes the child of our first thread, and nobody but that one starts programs.
    """
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text("ascii").split()]
    except OSError:
        return None


def adopted() -> list[int] | None:
    """Our children that we did not start, zombies too; None where that is not known. A fiftieth of a millisecond."""
    children = _children() if is_subreaper() else None
    return None if children is None else [pid for pid in children if pid not in reapProcessHandlers]


def nothing_adopted() -> bool:
    """Whether it is sure that we have no child but those that we started."""
    return adopted() == []


class OrphanOwner(Protocol):
    """Who knows orphans that are not for the first one who looks to end."""

    def is_ours(self, pid: int) -> bool: ...
    def collected(self, pid: int, cpu_time_s: float) -> None: ...


_owner: OrphanOwner | None = None


def adopt_for(owner: OrphanOwner | None) -> None:
    """From now on the owner is told of orphans that have ended, and is asked whether one is its own."""
    global _owner  # noqa: PLW0603 (children are the process's, and so is who cares for them)
    _owner = owner


def own_orphans(token: str = "") -> list[psutil.Process]:
    """Our children that we did not start: orphans that we adopted as subreaper.

    Where strays are possible also what carries the mark of this run (`token`) and does not descend from us any more.
    """
    strays: list[psutil.Process] = []
    if token and strays_possible():
        import psutil

        candidates = marked(token)  # first: what is started after this look is no orphan
        ours = {member.pid for member in psutil.Process().children(recursive=True)}
        # A VBoxManage that HostMain did not wait for has done what was wanted of it, and ends by itself.
        strays = [one for one in candidates if one.pid not in ours and _name_of(one) != "VBoxManage"]
        if not is_subreaper():
            return strays
    known = set(reapProcessHandlers)
    pids = _children()
    if pids is None:
        import psutil

        pids = [child.pid for child in psutil.Process().children()]
    found = strays
    if adopted := [pid for pid in pids if pid not in known]:
        import psutil

        for pid in adopted:
            with contextlib.suppress(psutil.Error):
                if (orphan := psutil.Process(pid)).name() not in SHARED:
                    found.append(orphan)
    return found


def end_orphans(token: str = "", *, everything: bool = False) -> None:
    """KILL and collect what dead VMmanage tasks left, with everything below it.

    token: of this run; without it only what was adopted is found. everything: also what host programs left, which
    `vmwrapper.process.family` sees to as long as they run.
    """
    for _ in range(_STABLE_ROUNDS):
        killed = False
        for orphan in own_orphans(token):
            if _alive(orphan) and (everything or not _is_hosts(orphan)):
                import psutil

                killed = True
                log.warning("killing pid %d (%s), which a program that ended has left", orphan.pid, _name_of(orphan))
                for member in tree(orphan):
                    with contextlib.suppress(psutil.Error):
                        member.kill()
        collect_orphans()
        if not killed:
            return


def _is_hosts(orphan: psutil.Process) -> bool:
    return HOST_MARK in _mark_of(orphan) or (_owner is not None and _owner.is_ours(orphan.pid))


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
            with contextlib.suppress(ChildProcessError):
                _collect(entry.pid)


def _collect(pid: int) -> None:
    if sys.platform == "win32":
        return
    found, _, usage = os.wait4(pid, os.WNOHANG)
    if found and _owner is not None:
        _owner.collected(pid, usage.ru_utime + usage.ru_stime)


def _mark_of(process: psutil.Process) -> str:
    import psutil

    try:
        return process.environ().get(RUN_MARK, "")
    except (psutil.Error, OSError):
        return ""


def _name_of(process: psutil.Process) -> str:
    import psutil

    try:
        return process.name()
    except psutil.Error:
        return "gone meanwhile"


def marked(token: str) -> list[psutil.Process]:
    """All processes that carry the mark of a run, ourselves excepted. A scan: for starts and ends only."""
    import psutil

    found = []
    for candidate in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if candidate.pid == os.getpid() or candidate.name() in SHARED:
                continue
            if candidate.environ().get(RUN_MARK, "").startswith(token):
                found.append(candidate)
    return found


async def end_processes(reactor: Any, members: Sequence[psutil.Process], *, grace_s: float = TERM_GRACE_S) -> None:
    """End processes and whatever they start meanwhile: TERM, then KILL after `grace_s` (0: at once)."""
    members = [member for member in members if _alive(member)]
    if not members:
        return
    import psutil

    if grace_s > 0:
        for member in members:
            with contextlib.suppress(psutil.Error):
                member.terminate()
                member.resume()  # a stopped process would not see the TERM
        await gone(reactor, members, grace_s)
    left = list({member for root in members for member in tree(root) if _alive(member)})
    for _ in range(_STABLE_ROUNDS):
        if not left:
            return
        for member in left:
            with contextlib.suppress(psutil.Error):
                member.kill()
        left = [child for member in left for child in tree(member) if _alive(child) and child not in left]
    await gone(reactor, members, KILL_LIMIT_S)


async def end_tree(reactor: Any, running: Running, *, grace_s: float = TERM_GRACE_S) -> None:
    """End a program with everything that descends from it. Harmless when it has ended."""
    members = tree(birth.find(running.pid, running.began))
    await end_processes(reactor, members, grace_s=grace_s)
    if running.ended is None and members:
        await DeferredList([running._over.wait()])


async def gone(reactor: Any, members: Sequence[psutil.Process], limit_s: float) -> bool:
    """Wait until all of them have ended; False at the limit. Told by the system where it can (Linux: pidfd)."""
    end = reactor.seconds() + limit_s
    while left := [member for member in members if _alive(member)]:
        remaining = end - reactor.seconds()
        if remaining <= 0:
            return False
        watch = _PidWatch.open(reactor, left[0].pid)
        if watch is None:
            await sleep(reactor, min(_LOOK_AGAIN_S, remaining))
        else:
            await watch.wait(remaining)
    return True


def _alive(member: psutil.Process) -> bool:
    import psutil

    try:
        entry = proctable.look_at(member.pid) if member.is_running() else None
    except psutil.Error:
        return False
    return entry is not None and entry.is_alive


class _PidWatch:
    """A Linux pidfd as a reader of the reactor: it gets readable when the process ends."""

    def __init__(self, reactor: Any, fd: int) -> None:
        self._reactor = reactor
        self._fd = fd
        self._done: Deferred[None] = Deferred()

    @classmethod
    def open(cls, reactor: Any, pid: int) -> _PidWatch | None:
        if not hasattr(os, "pidfd_open"):
            return None
        try:
            return cls(reactor, os.pidfd_open(pid))
        except OSError:
            return None

    def fileno(self) -> int:
        return self._fd

    def logPrefix(self) -> str:  # noqa: N802 (Twisted's name)
        return "pidfd"

    def doRead(self) -> None:  # noqa: N802 (Twisted's name)
        self._finish()

    def connectionLost(self, _reason: object) -> None:  # noqa: N802 (Twisted's name)
        self._finish()

    def _finish(self) -> None:
        if not self._done.called:
            self._done.callback(None)

    async def wait(self, limit_s: float) -> None:
        timer = self._reactor.callLater(limit_s, self._finish)
        self._reactor.addReader(self)
        try:
            await self._done
        finally:
            self._reactor.removeReader(self)
            os.close(self._fd)
            if timer.active():
                timer.cancel()
