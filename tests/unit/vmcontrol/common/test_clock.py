"""Time limits on a guest count only while its VM runs."""

from typing import Any

from twisted.internet.task import Clock

from vmcontrol.common.clock import PausableClock


def make() -> tuple[Any, PausableClock, list[float]]:
    clock: Any = Clock()
    return clock, PausableClock(clock), []


def test_a_timer_waits_for_the_time_that_was_paused() -> None:
    clock, pausable, fired = make()
    timer = pausable.callLater(10, lambda: fired.append(clock.seconds()))
    clock.advance(4)
    pausable.pause()
    clock.advance(1000)
    assert not fired
    assert timer.active()
    pausable.resume()
    clock.advance(5.5)
    assert not fired
    clock.advance(0.5)
    assert fired == [1010]
    assert not timer.active()


def test_a_timer_that_is_set_during_a_pause_starts_with_its_end() -> None:
    clock, pausable, fired = make()
    pausable.pause()
    pausable.callLater(3, lambda: fired.append(pausable.seconds()))
    clock.advance(50)
    pausable.resume()
    clock.advance(3)
    assert fired == [3]


def test_a_cancelled_timer_leaves_nothing_behind() -> None:
    clock, pausable, fired = make()
    timer = pausable.callLater(3, lambda: fired.append(1))
    pausable.pause()
    timer.cancel()
    timer.cancel()
    pausable.resume()
    clock.advance(10)
    assert not fired
    assert not clock.getDelayedCalls()


def test_pausing_twice_is_pausing_once() -> None:
    clock, pausable, _ = make()
    pausable.pause()
    clock.advance(5)
    pausable.pause()
    clock.advance(5)
    pausable.resume()
    pausable.resume()
    clock.advance(1)
    assert pausable.seconds() == 1
