"""What all our programs use of the Twisted reactor, typed, in one place.

Rule of the house: I/O code is written as `async def` that awaits Deferreds; nothing sleeps in a thread, and every wait
goes through `with_limit` or has a limit of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

T = TypeVar("T")
log = logging.getLogger(__name__)


class TimerHandle(Protocol):
    """What callLater returns."""

    def cancel(self) -> None: ...
    def active(self) -> bool: ...


class Clock(Protocol):
    """Time as the reactor, or `twisted.internet.task.Clock` in tests, gives it (seconds, monotonic)."""

    def seconds(self) -> float: ...
    def callLater(self, delay: float, function: Callable[..., object], *args: Any, **kw: Any) -> TimerHandle: ...  # noqa: N802


class LimitReached(Exception):  # noqa: N818
    """A wait took longer than it may. `str` names what was waited for and the limit in seconds."""


def the_reactor() -> Any:
    """The global reactor; imported late, so that a program can install another one first.

    Its time is made monotonic. Twisted's own is the time of day: when a guest's clock is set, every timer would fire at
    once or, after a step back, not before the old time comes round again. (Left alone when timers of that time are
    pending already: theirs would never fire.)
    """
    from twisted.internet import reactor

    chosen: Any = reactor
    if not chosen.running and not chosen.getDelayedCalls():
        chosen.seconds = time.monotonic
    return chosen


def start(work: Coroutine[Deferred[Any], Any, T]) -> Deferred[T]:
    """Run a coroutine on the reactor; its Deferred can be cancelled."""
    return Deferred.fromCoroutine(work)


def start_logged(work: Coroutine[Deferred[Any], Any, object], what: str) -> Deferred[object]:
    """Run a coroutine nobody waits for: an error is logged with `what`, a cancellation is not an error."""

    def report(failure: Failure) -> None:
        if not isinstance(failure.value, defer.CancelledError):
            log.error("%s: %s", what, failure.getErrorMessage(), exc_info=failure.value)

    deferred: Deferred[object] = Deferred.fromCoroutine(work)
    return deferred.addErrback(report)


def is_over(work: Deferred[object] | None) -> bool:
    """Whether nothing of it is under way: it has ended, perhaps before `start_logged` returned, or never began."""
    return work is None or bool(work.called)


def sleep(clock: Clock, seconds: float) -> Deferred[None]:
    """A Deferred that fires after `seconds`; cancelling it stops the timer."""
    done: Deferred[None] = Deferred(lambda _: timer.cancel())
    timer = clock.callLater(seconds, done.callback, None)
    return done


async def with_limit(
    clock: Clock, seconds: float, what: str, work: Deferred[T] | Coroutine[Deferred[Any], Any, T]
) -> T:
    """Await `work` for at most `seconds`; then cancel it and raise LimitReached."""
    deferred = work if isinstance(work, Deferred) else Deferred.fromCoroutine(work)
    expired = False

    def expire() -> None:
        nonlocal expired
        expired = True
        deferred.cancel()

    timer = clock.callLater(seconds, expire)
    try:
        return await deferred
    except Exception as error:
        if expired and isinstance(error, defer.CancelledError):
            raise LimitReached(f"{what}: no answer within {seconds:g} s") from error
        raise
    finally:
        if timer.active():
            timer.cancel()


class Event:
    """A condition many can wait for. `wait()` fires at the next `set()`, or at once when it is set already."""

    def __init__(self) -> None:
        self._is_set = False
        self._waiting: list[Deferred[None]] = []

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        self._release()

    def clear(self) -> None:
        self._is_set = False

    def pulse(self) -> None:
        """Wake all who wait now, without staying set."""
        self._release()

    def wait(self) -> Deferred[None]:
        if self._is_set:
            return defer.succeed(None)
        waiting: Deferred[None] = Deferred(self._waiting.remove)
        self._waiting.append(waiting)
        return waiting

    def _release(self) -> None:
        waiting, self._waiting = self._waiting, []
        for deferred in waiting:
            deferred.callback(None)
