"""What is still worth a line when something changes again and again."""

from __future__ import annotations

import logging

import pytest
from twisted.internet.task import Clock

from vmcontrol.common.complaints import CALM_S, MANY, Complaints, Flapping, Worth


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


def test_a_flood_of_complaints_is_a_few_lines_and_the_last_says_so(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    complaints = Complaints(logging.getLogger("test"), clock.seconds)
    for number in range(1000):
        complaints.warn("refused: %d", number)
    assert len(caplog.messages) == MANY
    assert caplog.messages[0] == "refused: 0"
    assert caplog.messages[-1] == f"refused: {MANY - 1} (there are many: the next ones are not noted)"
    clock.advance(CALM_S + 1)
    complaints.warn("refused: %s", "again")
    assert caplog.messages[-1] == "refused: again"
