"""The end of processes: waited for, and forced by KILL."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

from twisted.internet.defer import Deferred

from vmcontrol.common import birth, proctable
from vmcontrol.common.eventloop import LimitReached, sleep, with_limit
from vmcontrol.common.proctable import Entry
from vmwrapper.paths import listed
from vmwrapper.process.program import Running

KILL_LIMIT_S = 5.0
"""After KILL. A process that is still there then hangs in the kernel; waiting longer would not end it."""
_LOOK_AGAIN_S = 0.05

log = logging.getLogger(__name__)


def named(members: Iterable[Entry]) -> str:
    """Some processes, for one line."""
    return listed([f"{proctable.name_of(entry.pid)} (pid {entry.pid})" for entry in members])


async def gone(reactor: Any, members: Iterable[Entry], limit_s: float) -> bool:
    """Wait until all of them have ended; False at the limit. The system reports an end where it can (Linux: pidfd)."""
    end = reactor.seconds() + limit_s
    left = list(members)
    while left := proctable.living(left):
        remaining = end - reactor.seconds()
        if remaining <= 0:
            return False
        await _wait_for(reactor, left[0].pid, remaining)
    return True


async def _wait_for(reactor: Any, pid: int, limit_s: float) -> None:
    """Until this process has ended, or the limit, or it is time to look again."""
    try:
        watch = _PidWatch(os.pidfd_open(pid))
    except (AttributeError, OSError):
        await sleep(reactor, min(_LOOK_AGAIN_S, limit_s))
        return
    reactor.addReader(watch)
    try:
        await with_limit(reactor, limit_s, "its end", watch.ended)
    except LimitReached:
        pass
    finally:
        reactor.removeReader(watch)
        os.close(watch.fileno())


class _PidWatch:
    """A Linux pidfd as a reader of the reactor: it gets readable when the process ends."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.ended: Deferred[None] = Deferred()

    def fileno(self) -> int:
        return self._fd

    def logPrefix(self) -> str:  # noqa: N802 (Twisted's name)
        return "pidfd"

    def doRead(self) -> None:  # noqa: N802 (Twisted's name)
        if not self.ended.called:
            self.ended.callback(None)

    def connectionLost(self, _reason: object) -> None:  # noqa: N802 (Twisted's name)
        self.doRead()


async def kill_all(
    reactor: Any, members: Callable[[], list[Entry]], kill: Callable[[list[Entry]], object] | None = None
) -> bool:
    """KILL what `members` finds until it finds nothing: also what is started meanwhile. False after KILL_LIMIT_S.

    kill: kills these, and those that it knows besides.
    """
    end = reactor.seconds() + KILL_LIMIT_S
    while found := members():
        if kill is not None:
            kill(found)
        else:
            for entry in found:
                proctable.kill(entry)
        await gone(reactor, found, max(0.0, end - reactor.seconds()))
        if reactor.seconds() >= end and (left := members()):
            log.warning("%s cannot be ended", named(left))
            return False
        await sleep(reactor, 0)
    return True


async def kill_trees(reactor: Any, roots: Iterable[Entry]) -> bool:
    """KILL processes and all that descends from them. What is known stays known when its parent has ended."""
    known = {entry.key: entry for entry in roots}

    def members() -> list[Entry]:
        pids = [entry.pid for entry in proctable.living(known.values())]
        known.update((entry.key, entry) for entry in proctable.below(proctable.look() if pids else {}, pids))
        return proctable.living(known.values())

    return await kill_all(reactor, members)


async def kill_program(reactor: Any, running: Running) -> None:
    """KILL a program and all that descends from it. Harmless when it has ended."""
    entry = proctable.look_at(running.pid)
    if entry is not None and running.began == birth.of(running.pid) and await kill_trees(reactor, [entry]):
        await running.wait()
