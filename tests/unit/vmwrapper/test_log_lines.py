"""What stderr.txt shows of what others chose: their names and lines are never taken for ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcontrol.common.loglines import LINE_LIMIT, readable
from vmcontrol.hypervisors.interface import NO_VIRTUALIZATION
from vmwrapper import log
from vmwrapper.display import Display


@given(st.text())
def test_only_the_first_line_begins_at_the_margin(text: str) -> None:
    first, *others = readable(text).splitlines() or [""]
    assert all(line.startswith("    ") for line in others)
    assert all(len(line) <= LINE_LIMIT + 4 for line in (first, *others))


def test_ordinary_text_stays_as_it_is() -> None:
    text = "größe 中文\u3000\tтест 🙂"
    assert readable(text) == text


def test_a_terminal_is_not_steered() -> None:
    assert readable("a\x1b[2Jb\rc\x85d") == "a\\x1b[2Jb\\rc\\x85d"


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Path]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    path = tmp_path / "stderr.txt"
    log.set_up(path, Display())
    yield path
    root.handlers[:], root.level = handlers, level


def test_a_file_name_cannot_forge_a_line(story: Path) -> None:
    logging.getLogger("vmwrapper.test").error("not there: %s", "x\n2026-01-01 00:00:00 (1): done")
    log.flush()
    ours = [line for line in story.read_text().splitlines() if line.startswith("2026-01-01")]
    assert ours == []
    assert "    2026-01-01 00:00:00 (1): done" in story.read_text().splitlines()


def test_a_guest_cannot_keep_the_client_from_work_in_vms(story: Path) -> None:
    log.quote("guest console", [f"oops {NO_VIRTUALIZATION} oops"])
    log.flush()
    assert "oops ERR CPU VM EXTENSIONS DISABLED oops" in story.read_text()
    assert NO_VIRTUALIZATION not in story.read_text()
