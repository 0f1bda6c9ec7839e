"""What others can bring about is written until it comes as a flood, and a log has a size."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from twisted.internet.task import Clock

from vmcontrol.common.logthrottle import (
    CALM_S,
    ERRORS_BYTES,
    LAST,
    LOG_BYTES,
    MANY,
    OF_A_KIND,
    OF_A_SUBJECT,
    LogLimit,
    LogThrottle,
)
from vmwrapper.log import _own_bytes


class Rig:
    def __init__(self, already: int = 0, file: int | None = None) -> None:
        self.now = 1000.0
        self.lines: list[str] = []
        self.logger = logging.Logger("test", logging.DEBUG)
        throttle = LogLimit(already, file=file, seconds=lambda: self.now)
        for _ in range(2):  # as the wrapper has two
            handler = logging.Handler()
            handler.emit = lambda record: self.lines.append(record.getMessage())  # type: ignore[method-assign]
            handler.addFilter(throttle)
            self.logger.addHandler(handler)


def test_a_flood_about_one_guest_leaves_room_for_the_others() -> None:
    rig = Rig()
    for _ in range(10_000):
        rig.logger.info("guest %s is there", "A")
    rig.logger.info("guest %s is there", "B")
    rig.logger.info("another kind")
    assert len(rig.lines) == 2 * (OF_A_SUBJECT.burst + 2)
    assert "another kind" in rig.lines
    left_out = [line for line in rig.lines if line.startswith("guest B")]
    assert left_out[0] == "guest B is there (9900 lines of this kind were left out before)"


def test_all_of_a_kind_have_a_bound_whatever_they_are_about() -> None:
    rig = Rig()
    for number in range(10_000):
        rig.logger.warning("guest %s is there", str(number))
    assert len(rig.lines) == 2 * OF_A_KIND.burst
    rig.now += 3600
    rig.logger.warning("guest %s is there", "x")
    assert rig.lines[-1].endswith(f"({10_000 - OF_A_KIND.burst} lines of this kind were left out before)")


def test_a_log_has_a_size_for_the_life_of_a_job() -> None:
    rig = Rig(LOG_BYTES - 10)
    rig.logger.info("fits")
    rig.logger.info("does not")
    rig.logger.debug("nor that")
    rig.logger.error("an error")
    assert rig.lines[::2] == ["fits", "this log is full: the rest is left out", "an error"]
    rig = Rig(LOG_BYTES + ERRORS_BYTES)
    rig.logger.error("an error")
    rig.logger.error("why the job ends", extra=LAST)
    assert rig.lines[::2] == ["this log is full: the rest is left out", "why the job ends"]


def test_a_log_that_shares_a_file_has_a_size_of_its_own() -> None:
    throttle = LogLimit(most=1000)
    records = [
        logging.LogRecord("a", logging.INFO, "a.py", 1, f"{number} {'x' * 90}", (), None) for number in range(50)
    ]
    kept = [record for record in records if throttle.filter(record)]
    assert 5 < len(kept) < 10
    assert kept[-1].getMessage() == "this log is full: the rest is left out"


def test_the_size_is_the_files_where_it_is_one(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        file.truncate(LOG_BYTES)
        rig = Rig(0, file.fileno())
        rig.logger.info("a line")
        assert rig.lines[::2] == ["this log is full: the rest is left out"]


@pytest.mark.parametrize("lines", [0, 10, 100_000])
def test_what_programs_wrote_into_the_story_is_theirs(tmp_path: Path, lines: int) -> None:
    ours = b"2026-01-01 00:00:00 (12): a line of ours\n    and more of it\n"
    path = tmp_path / "stderr.txt"
    path.write_bytes(ours + b"a program's line\n    that is its own\n" * lines + ours)
    assert _own_bytes(path) == 2 * len(ours)
    assert _own_bytes(tmp_path / "none") == 0


class TestLinesOfLogThrottle:
    def written(self, caplog: pytest.LogCaptureFixture, times: int, every_s: float) -> list[str]:
        clock, found = Clock(), []
        throttle = LogThrottle(logging.getLogger("test"), clock.seconds)
        for _ in range(2):
            caplog.clear()
            for number in range(times):
                throttle.warning("refused: %d", number)
                clock.advance(every_s)
            clock.advance(CALM_S)
            found.append(list(caplog.messages))
        assert found[0] == found[1], "a calm ends a flood"
        return found[0]

    def test_a_few_and_slow_ones_are_all_written(self, caplog: pytest.LogCaptureFixture) -> None:
        assert len(self.written(caplog, 50, 5)) == 50

    def test_a_flood_is_a_few_lines_and_the_last_says_so(self, caplog: pytest.LogCaptureFixture) -> None:
        lines = [f"refused: {number}" for number in range(MANY)]
        lines[-1] += " (there are many: the next ones are not noted)"
        assert self.written(caplog, 1000, 0.5) == lines
