"""Long file work beside the reactor: the client's messages are obeyed while an archive is unpacked or written.

One thread at a time, for work that looks at its `Gate` between pieces: there it stands while the client has suspended
us, and ends when we are to end. Nothing in it touches the reactor or the job's state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from vmwrapper.context.control import Control

T = TypeVar("T")


class Stopped(Exception):  # noqa: N818
    """The work is not wanted any more."""


class Gate:
    """Passed between the pieces of the work."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._stopped = False

    def passing(self) -> None:
        """Wait while suspended. Raises Stopped."""
        self._open.wait()
        if self._stopped:
            raise Stopped

    def passes_within(self, seconds: float) -> bool:
        """Wait while suspended, at most so long: whether we are not suspended any more. Raises Stopped."""
        is_open = self._open.wait(seconds)
        if self._stopped:
            raise Stopped
        return is_open

    def suspend(self, suspended: bool) -> None:
        if suspended:
            self._open.clear()
        else:
            self._open.set()

    def stop(self) -> None:
        self._stopped = True
        self._open.set()


async def in_background(reactor: Any, control: Control, work: Callable[[Gate], T]) -> T:
    """The result of `work`, or what it raised. Cancelled, the work stops at its next gate."""
    gate = Gate()
    done: Deferred[T] = Deferred(lambda _: gate.stop())

    def deliver(result: T | Failure) -> None:
        if not done.called:
            done.callback(result)  # a Failure makes it an errback

    def run() -> None:
        result: T | Failure
        try:
            result = work(gate)
        except BaseException:  # noqa: BLE001 (it is raised again where it is awaited)
            result = Failure()
        reactor.callFromThread(deliver, result)

    stop_listening = control.listen(lambda: gate.suspend(control.suspended))
    threading.Thread(target=run, name="background", daemon=True).start()
    try:
        return await done
    finally:
        stop_listening()
