"""CPU time of a VM's processes over its starts: nothing is counted twice, and it never goes back."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

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
