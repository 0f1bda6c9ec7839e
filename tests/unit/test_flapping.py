"""What is still worth a line when something changes again and again."""

from __future__ import annotations

from twisted.internet.task import Clock

from vmcontrol.flapping import CALM_S, MANY, Flapping, Worth


def test_a_few_changes_and_slow_ones_are_all_told() -> None:
    clock = Clock()
    flapping = Flapping(clock.seconds)
    for _ in range(50):
        assert flapping.changed() is Worth.A_LINE
        clock.advance(5)


def test_many_at_once_are_told_until_it_is_clear_what_goes_on_and_again_after_a_calm() -> None:
    clock = Clock()
    flapping = Flapping(clock.seconds)
    for _ in range(2):
        told = []
        for _ in range(1000):
            told.append(flapping.changed())
            clock.advance(0.5)
        assert told == [Worth.A_LINE] * (MANY - 1) + [Worth.A_LAST_LINE] + [Worth.NOTHING] * (1000 - MANY)
        clock.advance(CALM_S)
