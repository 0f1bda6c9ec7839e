"""A clock that can be stopped: time limits on a guest count only while its VM runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred

from vmcontrol.common.eventloop import Clock, Event, TimerHandle


class PausableClock:
    """The time of `clock` without the time between `pause` and `resume`. Timers set on it wait as long."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._paused_at: float | None = None
        self._lag = 0.0
        self._timers: set[PausableTimer] = set()
        self._goes_on = Event()
        self._goes_on.set()

    @property
    def paused(self) -> bool:
        return self._paused_at is not None

    def seconds(self) -> float:
        now = self._paused_at if self._paused_at is not None else self._clock.seconds()
        return now - self._lag

    def stood(self) -> float:
        """Seconds of all pauses that are over: another number after each pause."""
        return self._lag

    def running(self) -> Deferred[None]:
        """Fires when it is not paused."""
        return self._goes_on.wait()

    def callLater(  # noqa: N802
        self, delay: float, function: Callable[..., object], *args: Any, **kw: Any
    ) -> PausableTimer:
        timer = PausableTimer(self, self.seconds() + delay, lambda: function(*args, **kw))
        self._timers.add(timer)
        if not self.paused:
            self._arm(timer)
        return timer

    def pause(self) -> None:
        """Stop. Nothing happens when it stands already."""
        if self._paused_at is not None:
            return
        self._paused_at = self._clock.seconds()
        self._goes_on.clear()
        for timer in self._timers:
            timer.disarm()

    def resume(self) -> None:
        """Go on. Nothing happens when it runs already."""
        if self._paused_at is None:
            return
        self._lag += self._clock.seconds() - self._paused_at
        self._paused_at = None
        for timer in list(self._timers):
            self._arm(timer)
        self._goes_on.set()

    def forget(self, timer: PausableTimer) -> None:
        """For timers: this one is over."""
        self._timers.discard(timer)

    def _arm(self, timer: PausableTimer) -> None:
        timer.armed = self._clock.callLater(max(0.0, timer.due - self.seconds()), timer.fire)


class PausableTimer:
    """What PausableClock.callLater returns."""

    def __init__(self, clock: PausableClock, due: float, action: Callable[[], object]) -> None:
        self._clock = clock
        self._action: Callable[[], object] | None = action
        self.due = due
        self.armed: TimerHandle | None = None

    def cancel(self) -> None:
        """Harmless when it has fired or was cancelled."""
        self._action = None
        self.disarm()
        self._clock.forget(self)

    def active(self) -> bool:
        return self._action is not None

    def disarm(self) -> None:
        armed, self.armed = self.armed, None
        if armed is not None and armed.active():
            armed.cancel()

    def fire(self) -> None:
        action, self._action = self._action, None
        self.armed = None
        self._clock.forget(self)
        if action is not None:
            action()
