"""Requests to guests, repeated until they are answered. Messages may be lost: that is what this is for.

Owns the timers of the requests that are under way. Knows nothing of what a request means; it must be harmless when it
arrives twice. Sends through the function that it is given and never waits for it.

    NoAnswer    the limit has passed; the outcome is unknown
    Dropped     the guest is gone (its VM was powered off or taken back): there will be no answer
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from twisted.internet.defer import Deferred

from vmcontrol.common.eventloop import Clock, TimerHandle
from vmcontrol.protocol.messages import Message

log = logging.getLogger(__name__)

FIRST_REPEAT_S = 1.0
LAST_REPEAT_S = 10.0
"""Back-off between repeats doubles from the first to the last value."""

Send = Callable[[Message], "Deferred[None]"]


class NoAnswer(Exception):  # noqa: N818
    """The guest did not answer in time. Whether it did what was asked is unknown."""


class Dropped(NoAnswer):
    """The guest is gone: there will be no answer."""


@dataclass(eq=False, slots=True)
class _Waiter:
    deferred: Deferred[object]
    timer: TimerHandle


@dataclass(eq=False, slots=True)
class _Request:
    guest: str
    message: Message
    delay: float = FIRST_REPEAT_S
    timer: TimerHandle | None = None
    waiters: list[_Waiter] = field(default_factory=list)


class Repeater:
    """The requests under way, each known by a key. Asking again with the same key joins the request under way."""

    def __init__(self, clock: Clock, send: Send) -> None:
        self._clock = clock
        self._send = send
        self._requests: dict[Hashable, _Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def is_asking(self, key: Hashable) -> bool:
        return key in self._requests

    def ask(
        self, key: Hashable, guest: str, message: Message, limit_s: float, *, clock: Clock | None = None
    ) -> Deferred[object]:
        """Send now and again until `answered(key)`; fires with the answer, or NoAnswer after `limit_s` seconds.

        clock: for the limit; one that stands still while the VM is paused.

        When nobody waits any more (limits passed, Deferreds cancelled) the repeating ends.
        """
        request = self._requests.get(key)
        if request is None:
            request = self._requests[key] = _Request(guest, message)
            self._transmit(key, request)
        waiter: _Waiter
        deferred: Deferred[object] = Deferred(lambda _: self._leave(key, request, waiter))
        timing = clock or self._clock
        waiter = _Waiter(deferred, timing.callLater(limit_s, self._expire, key, request, limit_s, deferred))
        request.waiters.append(waiter)
        return deferred

    def answered(self, key: Hashable, answer: object = None) -> bool:
        """The answer came. False if nobody asked (any more)."""
        request = self._requests.pop(key, None)
        if request is None:
            return False
        for waiter in self._finish(request):
            waiter.deferred.callback(answer)
        return True

    def kick(self, guest: str | None = None) -> None:
        """The way to the guest (None: to all) is open again: send what is under way now, with a fresh back-off."""
        for key, request in list(self._requests.items()):
            if guest is None or request.guest == guest:
                if request.timer is not None:
                    request.timer.cancel()
                request.delay = FIRST_REPEAT_S
                self._transmit(key, request)

    def drop(self, guest: str, why: str) -> None:
        """No answer of this guest will come: everything asked of it ends with Dropped."""
        for key, request in list(self._requests.items()):
            if request.guest == guest:
                del self._requests[key]
                for waiter in self._finish(request):
                    waiter.deferred.errback(Dropped(why))

    def close(self) -> None:
        """HostMain ends."""
        for guest in {request.guest for request in self._requests.values()}:
            self.drop(guest, "HostMain is ending")

    def _transmit(self, key: Hashable, request: _Request) -> None:
        request.timer = self._clock.callLater(request.delay, self._transmit, key, request)
        request.delay = min(request.delay * 2, LAST_REPEAT_S)
        self._send(request.message).addErrback(
            lambda failure: log.debug("not sent, will be repeated: %s", failure.getErrorMessage())
        )

    def _finish(self, request: _Request) -> list[_Waiter]:
        if request.timer is not None:
            request.timer.cancel()
            request.timer = None
        waiters, request.waiters = request.waiters, []
        for waiter in waiters:
            if waiter.timer.active():
                waiter.timer.cancel()
        return waiters

    def _expire(self, key: Hashable, request: _Request, limit_s: float, deferred: Deferred[object]) -> None:
        for waiter in list(request.waiters):
            if waiter.deferred is deferred:
                self._leave(key, request, waiter)
        deferred.errback(NoAnswer(f"the guest {request.guest} did not answer within {limit_s:g} s"))

    def _leave(self, key: Hashable, request: _Request, waiter: _Waiter) -> None:
        if waiter in request.waiters:
            request.waiters.remove(waiter)
        if waiter.timer.active():
            waiter.timer.cancel()
        if not request.waiters and self._requests.get(key) is request:
            del self._requests[key]
            self._finish(request)
