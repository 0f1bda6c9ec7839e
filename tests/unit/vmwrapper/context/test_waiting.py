"""How long a fault that passes is waited for."""

from __future__ import annotations

from twisted.internet.task import Clock

from vmwrapper.context.waiting import FORGIVEN_S, LONGEST_PAUSE_S, Patience


def test_pauses_grow_and_end_with_the_limit() -> None:
    clock = Clock()
    patience = Patience(clock.seconds, 60.0)
    pauses = []
    while (pause := patience.next_pause_s()) is not None:
        pauses.append(pause)
        clock.advance(pause)
    assert pauses[:5] == [1.0, 2.0, 4.0, 8.0, LONGEST_PAUSE_S]
    assert 60.0 <= sum(pauses) < 60.0 + LONGEST_PAUSE_S


def test_a_fault_that_comes_back_at_once_is_the_same_one() -> None:
    clock = Clock()
    patience = Patience(clock.seconds, 20.0)
    tries = 0
    while (pause := patience.next_pause_s()) is not None:
        clock.advance(pause + 0.5)
        assert not patience.is_new
        tries += 1
        assert tries < 20, "it never ends"


def test_one_that_stayed_away_is_forgotten() -> None:
    clock = Clock()
    patience = Patience(clock.seconds, 20.0)
    for _ in range(100):
        assert patience.next_pause_s() == 1.0
        clock.advance(FORGIVEN_S + 1.1)
        assert patience.is_new
