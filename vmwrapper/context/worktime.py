"""Time that stands still while the client has suspended us. Limits on work are set in it, not in wall time.

A boot that was suspended for an hour has not taken too long, and a task's time_limit counts what it ran.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmcontrol.common.eventloop import Clock, TimerHandle


class _Timer:
    """One call to come. `left`: seconds of work time at the last pause."""

    def __init__(self, owner: WorkClock, delay: float, call: Callable[[], object]) -> None:
        self._owner = owner
        self._call = call
        self._handle: TimerHandle | None = None
        self._due = owner.seconds() + delay
        self._over = False

    def run(self) -> None:
        """Set the real timer; the clock runs."""
        if not self._over:
            self._handle = self._owner.real.callLater(max(0.0, self._due - self._owner.seconds()), self._fire)

    def stop(self) -> None:
        """Unset the real timer; the clock stands."""
        if self._handle is not None and self._handle.active():
            self._handle.cancel()
        self._handle = None

    def _fire(self) -> None:
        self._over = True
        self._owner.forget(self)
        self._call()

    def cancel(self) -> None:
        self.stop()
        self._over = True
        self._owner.forget(self)

    def active(self) -> bool:
        return not self._over


class WorkClock:
    """A `Clock` whose seconds pass only while it is not paused."""

    def __init__(self, real: Clock) -> None:
        self.real = real
        self._passed = 0.0
        self._since: float | None = real.seconds()
        self._timers: set[_Timer] = set()

    def seconds(self) -> float:
        """Un-suspended seconds since the clock was made."""
        return self._passed + (self.real.seconds() - self._since if self._since is not None else 0.0)

    def callLater(self, delay: float, function: Callable[..., object], *args: Any, **kw: Any) -> _Timer:  # noqa: N802
        timer = _Timer(self, delay, lambda: function(*args, **kw))
        self._timers.add(timer)
        if self._since is not None:
            timer.run()
        return timer

    def pause(self) -> None:
        if self._since is None:
            return
        self._passed, self._since = self.seconds(), None
        for timer in tuple(self._timers):
            timer.stop()

    def resume(self) -> None:
        if self._since is not None:
            return
        self._since = self.real.seconds()
        for timer in tuple(self._timers):
            timer.run()

    def forget(self, timer: _Timer) -> None:
        self._timers.discard(timer)
