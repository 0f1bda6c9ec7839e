"""Work in a thread: a cancellation does not leave it running behind the caller's back."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred

from vmcontrol.common.eventloop import sleep, start, the_reactor
from vmcontrol.common.threads import in_thread


@pytest_twisted.ensureDeferred
async def test_a_cancelled_caller_waits_for_the_end_of_the_work() -> None:
    may_end = threading.Event()
    events: list[str] = []

    def work() -> None:
        may_end.wait(30)
        events.append("work done")

    running: Deferred[Any] = start(in_thread(the_reactor(), work))
    running.addBoth(lambda failure: events.append(failure.type.__name__))
    running.cancel()
    await sleep(the_reactor(), 0.05)
    assert events == []
    may_end.set()
    await running
    assert events == ["work done", CancelledError.__name__]


@pytest_twisted.ensureDeferred
async def test_what_the_work_raises_is_raised() -> None:
    def work() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        await in_thread(the_reactor(), work)
