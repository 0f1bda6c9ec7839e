"""vmwrapper.process.trees.TreeUsage: what a VM's processes use, without a scan at each look."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
from twisted.internet.task import Clock

from tests.support.limits import after
from vmwrapper.process.trees import TreeUsage

PARENT = """
import subprocess, sys
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
    usage = TreeUsage(clock.seconds, psutil.Process(parent.pid))
    alone = usage.memory_bytes()
    assert alone > 1_000_000
    go_on(parent, "started")
    child = psutil.Process(parent.pid).children()[0]
    deadline = after(30)
    while sum(child.cpu_times()[:2]) < 0.3 or child.memory_info().rss < 60_000_000:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert usage.memory_bytes() < alone + 30_000_000, "who belongs to it is not looked up each time"
    clock.advance(11)
    assert usage.memory_bytes() > alone + 50_000_000
    living = usage.cpu_time_s()
    assert living >= 0.3
    go_on(parent, "ended")
    assert usage.cpu_time_s() >= living, "the parent waited for it"
    assert usage.memory_bytes() < alone + 30_000_000


def test_what_has_ended_uses_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as program:
        usage = TreeUsage(lambda: 0.0, psutil.Process(program.pid))
    assert (usage.cpu_time_s(), usage.memory_bytes()) == (0.0, 0)
