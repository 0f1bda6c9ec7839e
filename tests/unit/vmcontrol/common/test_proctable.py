"""The table of processes: one line of /proc/PID/stat, trees, and signals that reach one process only."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.limits import after
from vmcontrol.common import proctable
from vmcontrol.common.proctable import Entry

STAT = (
    b"4242 (a) b (c) S 17 4242 4242 0 -1 4194304 500 0 3 0 150 50 7 3 20 0 1 0 987654 10000000 321 "
    b"18446744073709551615 1 1 0 0 0 0 0 0 0 0 0 0 17 1 0 0 0 0 0"
)


def entry(pid: int, parent: int, *, state: str = "S", began: float = 0.0) -> Entry:
    return Entry(pid, parent, state, cpu_time_s=1.0, memory_bytes=1, began=began)


def test_a_stat_line_with_brackets_in_the_name() -> None:
    found = proctable.parse_stat(STAT)
    assert (found.pid, found.state, found.parent, found.began) == (4242, "S", 17, 987654)
    assert found.cpu_time_s == pytest.approx(210 * proctable.TICK_S)
    assert found.memory_bytes == 321 * proctable.PAGE_BYTES


@given(st.binary(max_size=100))
def test_other_lines_are_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        proctable.parse_stat(line)


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), max_size=12))
def test_a_tree_is_found_even_when_the_table_is_nonsense(pairs: list[tuple[int, int]]) -> None:
    table = {pid: entry(pid, parent) for pid, parent in pairs}
    tree = proctable.below(table, [1])
    assert len({one.pid for one in tree}) == len(tree)
    assert all(one.pid == 1 or one.parent in {other.pid for other in tree} for one in tree)


def test_a_tree_has_parents_first() -> None:
    table = {one.pid: one for one in (entry(8, 6), entry(7, 2), entry(6, 5), entry(5, 1))}
    assert [one.pid for one in proctable.below(table, [5])] == [5, 6, 8]
    assert proctable.below(table, [99]) == []


@pytest.fixture
def family() -> Iterator[subprocess.Popen[bytes]]:
    """A shell and its child."""
    with subprocess.Popen(["sh", "-c", "sleep 60 & echo; wait"], stdout=subprocess.PIPE) as shell:
        assert shell.stdout is not None
        shell.stdout.readline()
        members = proctable.descendants(shell.pid)
        yield shell
        for member in members:
            proctable.kill(member)
        shell.kill()


def test_descendants_of_a_process(family: subprocess.Popen[bytes]) -> None:
    found = {one.pid for one in proctable.descendants(os.getpid())}
    scanned = {one.pid for one in proctable.below(proctable.look(), [os.getpid()])} - {os.getpid()}
    assert found == scanned
    assert family.pid in found
    (child,) = proctable.descendants(family.pid)
    assert child.parent == family.pid


def test_a_signal_reaches_the_process_that_was_seen_and_no_later_one(family: subprocess.Popen[bytes]) -> None:
    seen = proctable.look_at(family.pid)
    assert seen is not None
    other = entry(seen.pid, seen.parent, began=seen.began - 1)
    assert [one.key for one in proctable.living([seen, other])] == [seen.key]
    proctable.kill(other)
    time.sleep(0.05)
    assert family.poll() is None
    proctable.stop(seen)
    wait_for_state(family.pid, "T")
    proctable.ask_to_end(seen)
    assert family.wait(5) == -signal.SIGTERM
    proctable.kill(seen)  # gone: no error
    assert proctable.living([seen]) == []


def wait_for_state(pid: int, state: str) -> None:
    end = after(5)
    while (now := proctable.look_at(pid)) is not None and now.state != state:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_ended_process_that_nobody_waited_for_is_not_alive() -> None:
    process = subprocess.Popen(["true"])
    wait_for_state(process.pid, "Z")
    found = proctable.look_at(process.pid)
    assert found is not None
    assert not found.is_alive
    assert proctable.living([found]) == []
    process.wait()
    assert proctable.look_at(process.pid) is None
