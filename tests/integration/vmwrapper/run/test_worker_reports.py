"""What the client is told while guest tasks run: fraction done, CPU time, pids. Client and HostMain are played."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.vmwrapper.vm.test_worker_exactly_once import guest
from tests.support.limits import after
from tests.support.slots import HOST_MAIN_TASK, PlayedClient, TestSlot


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path)
    slot.write("HostConfig.cfg", "[Broker]\ntype = embedded\n")
    slot.write("guest.vdi", "an image")
    slot.write("worker", "the application", executable=True)
    yield slot
    slot.clean()


def figure(report: str, name: str) -> float:
    found = re.search(rf"<{name}>(.*?)</{name}>", report)
    assert found, report
    return float(found[1])


def test_the_fraction_done_comes_from_weights_then_from_the_expected_duration_and_is_never_one(slot: TestSlot) -> None:
    client = PlayedClient(slot)
    slot.job(
        HOST_MAIN_TASK,
        guest("silent sleep=1.5", more="<weight>3</weight>"),
        guest("silent sleep=600", more="<weight>1</weight><job_duration>3</job_duration>"),
    )
    process = slot.start()
    seen: list[float] = []
    end = after(30)
    while not seen or seen[-1] < 0.99:
        assert time.monotonic() < end, seen
        began = time.monotonic()
        report = client.status()
        seen.append(figure(report, "fraction_done"))
        assert "<other_pid>" not in report, "its VM descends from us"
        assert time.monotonic() - began < 5
    assert all(after >= before for before, after in itertools.pairwise(seen)), seen
    assert all(one <= 0.01 or 0.75 <= one < 1 for one in seen), seen
    assert seen[0] <= 0.01, "nothing is known of the first task until it has ended"
    assert any(0.76 < one < 0.98 for one in seen), seen
    assert figure(client.status(), "fraction_done") < 1, "far beyond what was expected it is still not done"
    client.say("<abort/>")
    assert process.wait(10) == 194


@pytest.mark.parametrize(("source", "seconds"), [("vm", 2.0), ("command", 0.1)])
def test_cpu_time_is_that_of_the_vm_or_on_request_of_the_command(slot: TestSlot, source: str, seconds: float) -> None:
    client = PlayedClient(slot)
    slot.job(HOST_MAIN_TASK, guest("sleep=600", more=f"<cpu_time_source>{source}</cpu_time_source>"))
    process = slot.start()
    slot.wait_for("fake_runs.txt", "_0_")
    end = after(20)
    while (told := figure(client.status(), "current_cpu_time")) != seconds:
        assert time.monotonic() < end, told
    client.say("<quit/>")
    assert process.wait(10) == 0

    client = PlayedClient(slot)
    process = slot.start()
    assert figure(client.status(), "current_cpu_time") >= seconds, "the sum over all starts"
    client.say("<abort/>")
    assert process.wait(10) == 194
