"""A process is known again by pid and birth, also after the clock was set; another one with its pid is not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcontrol.common import birth
from vmcontrol.common.birth import Birth

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ticks since the boot are Linux'")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "300"]) as process:
        yield process
        process.kill()


@pytest.fixture
def clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of the boot is computed from the clock: this is what psutil sees after the clock went forward by 1 s."""
    before = psutil._pslinux.boot_time()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: before + 1)


def test_a_process_is_found_until_it_has_ended(sleeper: subprocess.Popen[bytes]) -> None:
    began = birth.of(sleeper.pid)
    found = birth.find(sleeper.pid, began)
    assert found is not None
    assert found.pid == sleeper.pid
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert birth.find(sleeper.pid, began) is None, "a zombie"
    sleeper.wait()
    assert birth.find(sleeper.pid, began) is None


@on_linux
def test_a_clock_that_is_set_changes_no_birth(sleeper: subprocess.Popen[bytes], request: pytest.FixtureRequest) -> None:
    began = birth.of(sleeper.pid)
    request.getfixturevalue("clock_is_set")
    assert birth.of(sleeper.pid) == began
    assert birth.find(sleeper.pid, Birth.from_json(began.to_json())) is not None


@on_linux
def test_ticks_of_another_boot_are_another_process(sleeper: subprocess.Popen[bytes]) -> None:
    began = birth.of(sleeper.pid)
    assert birth.find(sleeper.pid, Birth(began.ticks, "another boot")) is None
    assert birth.find(sleeper.pid, Birth(began.ticks + 1, began.boot)) is None


def test_times_are_used_where_the_boot_has_no_id(
    sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(birth, "_BOOT_ID", tmp_path / "none")
    began = birth.of(sleeper.pid)
    assert began.time_s > 0
    assert birth.find(sleeper.pid, Birth.from_json(began.to_json())) is not None
    assert birth.find(sleeper.pid, Birth(time_s=began.time_s - 1)) is None


def test_nobody_has_an_unknown_birth() -> None:
    assert birth.of(birth._MAX_PID) == birth.UNKNOWN
    assert birth.find(os.getpid(), birth.UNKNOWN) is None
    assert Birth.from_json(birth.UNKNOWN.to_json()) == birth.UNKNOWN
    for pid in (-1, 0, 1 << 80):
        assert birth.find(pid, Birth(time_s=1.0)) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@given(st.fixed_dictionaries({}, optional={"boot": JSON, "start_ticks": JSON, "start_time": JSON}))
def test_what_was_not_written_by_us_is_a_value_error(value: dict[str, object]) -> None:
    try:
        read = Birth.from_json(value)
    except ValueError:
        return
    assert Birth.from_json(read.to_json()) == read
