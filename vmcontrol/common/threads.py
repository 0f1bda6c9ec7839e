"""Work that blocks, syncing above all: in a thread of the reactor's pool, while the reactor goes on. Owns nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from twisted.internet import threads
from twisted.internet.defer import CancelledError
from twisted.python.failure import Failure

from vmcontrol.common.eventloop import Event

T = TypeVar("T")


async def in_thread(reactor: Any, function: Callable[[], None]) -> None:
    """Run it to its end. A cancellation waits for that end: it would go on behind our back. Raises what it raises."""
    finished = Event()
    failures: list[Failure] = []

    def ended(result: object) -> None:
        if isinstance(result, Failure):
            failures.append(result)
        finished.set()

    threads.deferToThreadPool(reactor, reactor.getThreadPool(), function).addBoth(ended)
    cancelled: CancelledError | None = None
    while not finished.is_set():
        try:
            await finished.wait()
        except CancelledError as error:
            cancelled = error
    for failure in failures:
        failure.raiseException()
    if cancelled is not None:
        raise cancelled


async def result_in_thread(reactor: Any, function: Callable[[], T]) -> T:
    """The same for a function with a result."""
    results: list[T] = []
    await in_thread(reactor, lambda: results.append(function()))
    return results[0]
