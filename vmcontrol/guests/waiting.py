"""Wait until what can be looked at is as wanted. Owns nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

from twisted.internet.defer import CancelledError, Deferred

from vmcontrol.common.eventloop import Clock, Event, LimitReached, with_limit

T = TypeVar("T")


async def wait_until(
    clock: Clock, event: Event, look: Callable[[], Awaitable[T]], good: Callable[[T], bool], limit_s: float
) -> T:
    """What `look` gives as soon as it is good, or at the limit. event: there may be something new to look at."""
    deadline = clock.seconds() + limit_s
    while True:
        changed = event.wait()  # before looking, so that no change falls between
        try:
            value = await look()
        except BaseException:
            _drop(changed)
            raise
        left = deadline - clock.seconds()
        if good(value) or left <= 0:
            _drop(changed)
            return value
        with contextlib.suppress(LimitReached):
            await with_limit(clock, left, "a change", changed)


def _drop(waiting: Deferred[None]) -> None:
    waiting.addErrback(lambda failure: failure.trap(CancelledError) and None)
    waiting.cancel()
