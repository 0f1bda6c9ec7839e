"""More processors than the hypervisor takes, and what else can never be made, through the whole wrapper."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.vmwrapper.vm.test_worker_exactly_once import calls, guest
from tests.support.slots import HOST_MAIN_TASK, TestSlot


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path)
    slot.write("HostConfig.cfg", "[Broker]\ntype = embedded\n")
    slot.write("guest.vdi", "an image")
    slot.write("worker", "the application", executable=True)
    yield slot
    slot.clean()


def test_ncpus_of_a_large_computer_is_capped(slot: TestSlot) -> None:
    slot.job(HOST_MAIN_TASK, guest("sleep=60", more="<cpus>ncpus</cpus>"))
    process = slot.start("--nthreads", "96", "job.xml")
    slot.wait_for("fake_runs.txt", "_0_")
    process.kill()
    process.wait()
    (vm,) = json.loads(slot.text("fake_world.json")).values()
    assert vm["cpus"] == 64
    assert slot.text("stderr.txt").count("96 processors to this job, and the hypervisor takes at most 64") == 1


def test_a_number_that_this_hypervisor_does_not_take_fails_at_once_with_words(slot: TestSlot) -> None:
    slot.job(HOST_MAIN_TASK, guest("", more="<cpus>65</cpus>"))
    assert slot.run("job.xml") == 206
    assert "65 processors are more than this one takes: at most 64" in slot.text("stderr.txt")
    assert calls(slot).count("defineVM") == 1


@pytest.mark.parametrize("element", ["<cpus>300</cpus>", "<memory_size_mb>8</memory_size_mb>"])
def test_what_no_hypervisor_takes_is_wrong_in_the_job_file(slot: TestSlot, element: str) -> None:
    slot.job(HOST_MAIN_TASK, guest("", more=element))
    assert slot.run("check", "job.xml", program=[sys.executable, "-m", "vmwrapper"]) == 206
    assert slot.run("job.xml") == 206
    assert not (slot.folder / "fake_calls.txt").exists()
