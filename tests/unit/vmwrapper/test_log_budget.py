"""Our own lines in stderr.txt: how many there may be, and that the reason of an exit is always among them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcontrol.common.logthrottle import LAST
from vmcontrol.common.slotfiles import STORY
from vmwrapper import log
from vmwrapper.display import Display
from vmwrapper.log import OUTCOME
from vmwrapper.log_budget import FOR_THE_END, LIMIT, MANY_LINES, PAUSE_S, Kept, StoryBudget, Worth


def test_after_many_lines_one_a_minute_says_how_many_were_left_out() -> None:
    budget = StoryBudget()
    assert all(budget.admit("a line", Worth.ORDINARY, 0.0) == "a line" for _ in range(MANY_LINES))
    assert [budget.admit("more", Worth.ORDINARY, 1.0) for _ in range(5)] == [None] * 5
    assert budget.admit("later", Worth.ORDINARY, PAUSE_S) == "later (5 lines were left out before this one)"
    assert budget.admit("more", Worth.ORDINARY, PAUSE_S + 1) is None
    assert budget.admit("why", Worth.LAST, PAUSE_S + 2) == "why (1 lines were left out before this one)"


def test_the_end_has_room_whatever_was_said_before() -> None:
    budget = StoryBudget()
    while budget.admit("x" * 1000, Worth.ORDINARY, 0.0):
        pass
    assert budget.written > LIMIT - FOR_THE_END - 1100
    ends = 0
    while budget.admit("y" * 400, Worth.END, 0.0):
        ends += 1
    assert ends * 401 > 5000
    last = budget.admit("the reason: " + "z" * 5000, Worth.LAST, 0.0)
    assert last is not None
    assert last.startswith("the reason: zzz")
    assert " [...]" in last


@given(
    st.lists(st.tuples(st.text(max_size=3000), st.sampled_from(Worth), st.floats(0, 100)), max_size=200),
    st.integers(0, 2 * LIMIT),
)
def test_no_lines_of_any_kind_take_more_than_the_limit(lines: list[tuple[str, Worth, float]], before: int) -> None:
    budget, now, size = StoryBudget(written=before), 0.0, before
    for text, worth, passed in lines:
        now += passed
        admitted = budget.admit(text, worth, now)
        if admitted is not None:
            size += len(admitted.encode("utf-8", "backslashreplace")) + 1
            assert size <= LIMIT
    assert budget.written == size


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_what_is_kept_is_read(tmp_path_factory: pytest.TempPathFactory, written: int, lines: int) -> None:
    kept = Kept(tmp_path_factory.getbasetemp() / "story")
    kept.save(StoryBudget(written, lines))
    assert kept.load() == StoryBudget(written, lines)


@pytest.mark.parametrize("content", [b"", b"12", b"-1 0", b"x y", b"1 2 3", b"9" * 64, b"\xff 1"])
def test_what_is_damaged_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "story").write_bytes(content)
    assert Kept(tmp_path / "story").load() is None


def test_one_budget_for_all_starts_also_when_its_file_is_lost(tmp_path: Path) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    path = tmp_path / "stderr.txt"
    try:
        for number in range(4):
            root.handlers[:] = []
            log.set_up(path, Display())
            if number == 0:
                (tmp_path / "vmwrapper_checkpoint.json").touch()  # from now on it is one job
            logger = logging.getLogger("vmwrapper.test")
            logger.info("start %d", number, extra=LAST)
            for _ in range(150):
                logger.warning("%s", "x" * 100)
            with path.open("a") as file:
                file.write("a program's own line\n" * 20000)
            if number == 1:
                (tmp_path / STORY).unlink()
        logger.error("the reason", extra=OUTCOME)
    finally:
        root.handlers[:], root.level = handlers, level
    ours = [line for line in path.read_text().splitlines() if "a program's" not in line]
    assert sum(len(line) + 1 for line in ours) <= LIMIT
    assert sum("start " in line for line in ours) == 4
    assert "the reason" in ours[-1]
    assert "left out" in ours[-1]
