"""CPU time of a VM's processes over its starts: nothing is counted twice, and it never goes back."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
from twisted.internet.task import Clock

from tests.support.limits import after
from vmwrapper.vm.cpu import VmCpuTime

BUSY = (
    "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\nprint(1, flush=True)\ninput()"
)


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has used 0.4 s and waits."""
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_a_process_that_is_looked_at_anew_is_counted_once(busy: subprocess.Popen[bytes]) -> None:
    cpu = VmCpuTime(time.monotonic)
    cpu.begin(busy.pid, found_running=False)
    first = cpu.total_s()
    assert first >= 0.25, "kernels count in ticks"
    cpu.end()
    assert cpu.total_s() == first
    cpu.begin(busy.pid, found_running=True)
    assert first <= cpu.total_s() < first + 0.2
    cpu.begin(0, found_running=False)
    assert cpu.total_s() >= first, "it never goes back"
    cpu.told(2.0)
    cpu.told(1.0)
    assert first + 2.0 <= cpu.total_s() < first + 2.2


def test_what_an_earlier_run_has_accounted_for_is_not_counted_again(busy: subprocess.Popen[bytes]) -> None:
    cpu = VmCpuTime(time.monotonic)
    cpu.begin(busy.pid, found_running=True)
    assert cpu.total_s() < 0.2


PARENT = """
import subprocess, sys
sys.stdin.readline()
print("ready", flush=True)
sys.stdin.readline()
child = subprocess.Popen([sys.executable, "-c", "data = bytearray(60_000_000)\\nwhile True: pass"])
print("started", flush=True)
sys.stdin.readline()
child.kill()
child.wait()
print("ended", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        yield program
        for child in psutil.Process(program.pid).children():
            child.kill()
        program.kill()


def go_on(program: subprocess.Popen[str], answer: str) -> None:
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdin.write("\n")
    program.stdin.flush()
    assert program.stdout.readline() == answer + "\n"


def test_children_count_from_the_next_look_on_and_after_their_end(parent: subprocess.Popen[str]) -> None:
    clock = Clock()
    cpu = VmCpuTime(clock.seconds)
    cpu.begin(parent.pid, found_running=False)
    go_on(parent, "ready")
    alone = cpu.memory_bytes()
    assert alone > 1_000_000
    go_on(parent, "started")
    child = psutil.Process(parent.pid).children()[0]
    deadline = after(30)
    while sum(child.cpu_times()[:2]) < 0.3 or child.memory_info().rss < 60_000_000:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert cpu.memory_bytes() < alone + 30_000_000, "who belongs to it is not looked up each time"
    clock.advance(11)
    assert cpu.memory_bytes() > alone + 50_000_000
    living = cpu.total_s()
    assert living >= 0.3
    go_on(parent, "ended")
    assert cpu.total_s() >= living, "the parent waited for it"
    assert cpu.memory_bytes() < alone + 30_000_000


def test_what_has_ended_uses_nothing() -> None:
    cpu = VmCpuTime(time.monotonic)
    with subprocess.Popen([sys.executable, "-c", "pass"]) as program:
        cpu.begin(program.pid, found_running=False)
    assert (cpu.total_s(), cpu.memory_bytes()) == (0.0, 0)
