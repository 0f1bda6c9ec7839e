"""CPU time, fraction done, names and the display: the small pure parts of the wrapper."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import task

from vmcontrol.common.clock import PausableClock
from vmwrapper import names
from vmwrapper.context.readiness import Readiness, Requirement
from vmwrapper.context.timeline import Timeline
from vmwrapper.display import Display, bar
from vmwrapper.host.task import last_number
from vmwrapper.state.accounts import Accounts, FractionDone, task_fraction


def Clock() -> Any:
    """Twisted's, whose annotations are narrower than those of our protocol."""
    return task.Clock()


@given(st.lists(st.floats(0, 1000), max_size=20), st.integers(0, 5))
def test_cpu_time_never_goes_back(readings: list[float], settle_every: int) -> None:
    accounts = Accounts(PausableClock(Clock()), cpu_time_s=10)
    now = [0.0]
    accounts.use(lambda: now[0])
    seen = [accounts.cpu_time_s]
    for number, reading in enumerate(readings):
        now[0] = reading
        seen.append(accounts.cpu_time_s)
        if settle_every and number % settle_every == 0:
            accounts.settle()
            seen.append(accounts.cpu_time_s)
            accounts.use(lambda: now[0])
    assert seen == sorted(seen)
    assert seen[0] == 10


def test_cpu_time_adds_up_over_tasks() -> None:
    accounts = Accounts(PausableClock(Clock()), cpu_time_s=10)
    accounts.use(lambda: 2.0)
    accounts.settle(at_least_s=3.0)
    accounts.use(lambda: 4.0)
    assert accounts.cpu_time_s == 17


WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@given(WEIGHTS, st.lists(st.tuples(st.integers(0, 6), st.none() | st.floats(-1, 2)), max_size=20))
def test_the_fraction_never_goes_back_and_never_says_done(
    weights: list[float], steps: list[tuple[int, float | None]]
) -> None:
    fraction = FractionDone(weights)
    seen = [fraction.update(min(done, len(weights)), own) for done, own in steps]
    assert seen == sorted(seen)
    assert all(0 <= value < 1 for value in seen)


def test_the_fraction_follows_the_weights() -> None:
    fraction = FractionDone([1, 3])
    assert fraction.update(0, 0.5) == 0.125
    assert fraction.update(1, None) == 0.25
    assert fraction.update(1, 0.5) == 0.625


def test_the_programs_own_figure_comes_first() -> None:
    assert task_fraction(0.3, 100, 50) == 0.3
    assert task_fraction(None, 100, 50) == 0.5
    assert task_fraction(None, 100, 500) == 0.999
    assert task_fraction(None, None, 50) is None
    assert task_fraction(float("nan"), None, 50) is None


@given(st.text(max_size=200), st.text(max_size=200))
def test_names_are_bounded_and_plain(one: str, other: str) -> None:
    name = names.vm_name("project.org/x", one, 3, other)
    assert len(name) <= names.NAME_LIMIT
    assert all(c.isascii() and (c.isalnum() or c in "._-") for c in name)


def test_names_tell_slots_results_and_tasks_apart() -> None:
    assert names.command_id("r", 0, "ab" * 32) != names.command_id("r", 1, "ab" * 32)
    long = "x" * 300
    assert names.vm_name("p", long + "1", 0, "v") != names.vm_name("p", long + "2", 0, "v")
    assert names.project_part("", Path("/a")) != names.project_part("", Path("/b"))
    assert names.snapshot_number(names.snapshot_name(12)) == 12
    assert names.snapshot_number("theirs_12") is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_tells_no_number_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fraction")
    assert last_number(tmp_path / "fraction") is None


def test_the_last_number_counts(tmp_path: Path) -> None:
    path = tmp_path / "fraction"
    assert last_number(path) is None
    path.write_text("0.1\n0.25 of 1e0\n.5\n")
    assert last_number(path) == 0.5


def test_readiness_says_what_it_waits_for() -> None:
    timeline = Timeline(Clock())
    ready = Readiness(timeline)
    for requirement in (Requirement.HOST_MAIN, Requirement.BROKER):
        ready.reached(requirement)
    assert str(ready) == "2 of 4: waiting for the virtual machine and the guest agent"
    ready.gone(Requirement.BROKER)
    assert str(ready) == "1 of 4: waiting for the message broker and the virtual machine and the guest agent"
    assert timeline.reached("broker ready") == 0


def test_a_process_knows_how_old_it_is() -> None:
    code = "import time; time.sleep(0.3); from vmcontrol.common.proctable import own_age_s; print(own_age_s())"
    began = time.monotonic()
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    limit = time.monotonic() - began + 0.02  # the kernel's ticks are hundredths of a second
    if sys.platform.startswith("linux"):
        assert 0.29 <= float(said.stdout) <= limit
    else:
        assert float(said.stdout) == 0


def test_the_bar_fits_and_only_a_terminal_gets_one() -> None:
    assert len(bar(0.5, "x" * 200, 80)) == 79
    stream = io.StringIO()
    Display(stream).show(0.5, "x")
    assert stream.getvalue() == ""
