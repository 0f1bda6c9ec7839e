"""Work that blocks, syncing above all, in a thread of the reactor's pool while the reactor goes on. Owns nothing.

in_thread           await the result; a cancellation waits for the end of the work
defer_to_thread     a Deferred; its cancellation gives up the result, and the work goes on without it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from twisted.internet import threads
from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from vmcontrol.common.eventloop import Event

T = TypeVar("T")
P = ParamSpec("P")


def defer_to_thread(reactor: Any, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
    """The result of `function`, or what it raises. To be cancelled only where it may end later, unheeded."""
    return threads.deferToThreadPool(reactor, reactor.getThreadPool(), function, *args, **kwargs)


async def in_thread(reactor: Any, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `function` to its end and return its result, or raise what it raises.

    A cancellation is raised when the work has ended, so that it never goes on behind the caller's back.
    """
    finished = Event()
    results: list[T | Failure] = []

    def ended(result: T | Failure) -> None:
        results.append(result)
        finished.set()

    defer_to_thread(reactor, function, *args, **kwargs).addBoth(ended)
    cancelled: CancelledError | None = None
    while not finished.is_set():
        try:
            await finished.wait()
        except CancelledError as error:
            cancelled = error
    result = results[0]
    if isinstance(result, Failure):
        result.raiseException()
    if cancelled is not None:
        raise cancelled
    return result
