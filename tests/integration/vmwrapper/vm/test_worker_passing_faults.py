"""Faults of the computer that pass by themselves, through the whole wrapper: waited for, and nothing is given up."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.vmwrapper.vm.test_worker_exactly_once import calls, guest, runs
from tests.integration.vmwrapper.vm.test_worker_not_saved import records
from tests.support.slots import HOST_MAIN_TASK, PlayedClient, TestSlot


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path)
    slot.write("HostConfig.cfg", "[Broker]\ntype = embedded\n")
    slot.write("guest.vdi", "an image")
    slot.write("worker", "the application", executable=True)
    yield slot
    slot.clean()


OUT = "<copy_file_from_VM>out</copy_file_from_VM>"


def begin(slot: TestSlot, seconds: float = 1.0) -> tuple[PlayedClient, object]:
    """A job whose program runs."""
    client = PlayedClient(slot)
    slot.job(HOST_MAIN_TASK, guest(f"sleep={seconds} make=out", more=OUT))
    process = slot.start(stderr=(slot.folder / "stderr.txt").open("a"))
    slot.wait_for("fake_runs.txt", "_0_")
    return client, process


def test_a_disk_that_is_full_for_a_moment_costs_nothing(slot: TestSlot) -> None:
    _client, process = begin(slot)
    slot.plan(full=2)
    assert process.wait(30) == 0  # type: ignore[attr-defined]
    story = slot.text("stderr.txt")
    assert re.search(r"VM \S+ stands still: the disk of this computer is full; free some space", story), story
    assert re.search(r"VM \S+ goes on", story)
    assert calls(slot).count("unpause") == 3
    assert runs(slot) == [("0", 1)], "the program went on"
    for word in ("rollback", "made anew", "failed"):
        assert word not in story
    assert "made by" in slot.text("out")


def test_quit_while_it_is_waited_for_saves_the_vm(slot: TestSlot) -> None:
    client, process = begin(slot)
    slot.plan(full=1000)
    slot.wait_for("stderr.txt", "stands still")
    client.say("<quit/>")
    assert process.wait(20) == 0  # type: ignore[attr-defined]
    assert records(slot)[0]["saved_state_expected"] is True
    slot.plan()
    assert slot.run() == 0
    assert runs(slot) == [("0", 1)]


def test_a_vm_that_waits_is_left_alone_while_the_client_has_suspended_us(slot: TestSlot) -> None:
    client, process = begin(slot, seconds=3)
    client.say("<suspend/>")
    slot.wait_for("stderr.txt", "suspended by the client")
    slot.plan(full=1)
    time.sleep(1.5)
    assert "unpause" not in calls(slot)
    client.say("<resume/>")
    assert process.wait(30) == 0  # type: ignore[attr-defined]
    assert runs(slot) == [("0", 1)]


def test_abort_while_it_is_waited_for_leaves_nothing(slot: TestSlot) -> None:
    client, process = begin(slot)
    slot.plan(full=1000)
    slot.wait_for("stderr.txt", "stands still")
    client.say("<abort/>")
    assert process.wait(20) == 194  # type: ignore[attr-defined]
    assert slot.text("fake_world.json") == "{}"


def test_a_hostmain_that_does_not_answer_for_a_while_is_no_broken_vm(slot: TestSlot) -> None:
    _client, process = begin(slot, seconds=2)
    slot.plan(gone=5)
    assert process.wait(60) == 0  # type: ignore[attr-defined]
    story = slot.text("stderr.txt")
    assert "nothing is given up" in story
    assert "powerOff" not in calls(slot)
    assert runs(slot) == [("0", 1)]
    for word in ("rollback", "made anew", "failed"):
        assert word not in story


def test_a_hostmain_whose_port_is_taken_for_a_moment_is_started_again(slot: TestSlot) -> None:
    slot.job(HOST_MAIN_TASK, guest("make=out", more=OUT))
    slot.plan(cannot_begin=2)
    assert slot.run("job.xml", limit_s=60) == 0
    story = slot.text("stderr.txt")
    assert story.count("HostMain cannot begin: HostMain: cannot listen on 127.0.0.1:61613: Address already in use") == 2
    assert "died" not in story


def test_outputs_that_do_not_fit_for_a_moment_are_copied_when_they_do(slot: TestSlot) -> None:
    _client, process = begin(slot, seconds=0.5)
    slot.plan(lacks=["getFile", 2])
    assert process.wait(30) == 0  # type: ignore[attr-defined]
    story = slot.text("stderr.txt")
    assert story.count("the disk is full. It is tried again") == 1
    assert runs(slot) == [("0", 1)]
    assert "made by" in slot.text("out")
    assert "saveState" not in calls(slot)


def test_a_hostmain_that_is_not_reached_any_more_is_a_temporary_exit_with_the_vm_saved(slot: TestSlot) -> None:
    client = PlayedClient(slot)
    slot.job(HOST_MAIN_TASK, guest("sleep=3 make=out", more=OUT))
    with (slot.folder / "stderr.txt").open("a") as said:
        process = slot.start(stderr=said, VMWRAPPER_TEST_PATIENCE_S="1")
    slot.wait_for("fake_runs.txt", "_0_")
    slot.plan(gone=100000)
    assert process.wait(30) == 0
    delay, reason = slot.text("boinc_temporary_exit").splitlines()[:2]
    assert (delay, "cannot be reached" in reason) == ("300", True)
    assert records(slot)[0]["saved_state_expected"] is True, "the end of its lifeline made it save"
    assert "powerOff" not in calls(slot)
    slot.plan()
    assert slot.run() == 0
    assert runs(slot) == [("0", 1)]
    del client


@pytest.mark.parametrize("plan", [{"full": 1000}, {"lacks": ["getFile", 1000]}])
def test_what_lasts_is_a_temporary_exit_with_the_vm_saved(slot: TestSlot, plan: dict[str, object]) -> None:
    client = PlayedClient(slot)
    slot.job(HOST_MAIN_TASK, guest("sleep=1 make=out", more=OUT))
    with (slot.folder / "stderr.txt").open("a") as said:
        process = slot.start(stderr=said, VMWRAPPER_TEST_PATIENCE_S="2")
    slot.wait_for("fake_runs.txt", "_0_")
    slot.plan(**plan)
    assert process.wait(30) == 0
    delay, reason = slot.text("boinc_temporary_exit").splitlines()[:2]
    assert int(delay) == 600
    assert "disk" in reason
    assert "full" in reason
    assert records(slot)[0]["saved_state_expected"] is True
    slot.plan()
    assert slot.run() == 0
    assert runs(slot) == [("0", 1)]
    del client


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="another process's limits can be set on Linux only")
@pytest.mark.parametrize("then", ["go on", "quit"])
def test_a_real_hostmain_whose_descriptors_are_used_up_loses_no_vm(slot: TestSlot, then: str) -> None:
    client = PlayedClient(slot)
    slot.write("worker", "#!/bin/sh\nsleep 4\necho made > out\n", executable=True)
    slot.job(HOST_MAIN_TASK, guest("", more=OUT))
    with (slot.folder / "stderr.txt").open("a") as said:
        process = slot.start(stderr=said, DRIVE_HOST_MAIN="real")
    slot.wait_for("stderr.txt", "running ./worker", limit_s=60)
    children = psutil.Process(process.pid).children()
    (host_main,) = [one.pid for one in children if "tests.support.hypervisor" in one.cmdline()]
    before = resource.prlimit(host_main, resource.RLIMIT_NOFILE)
    resource.prlimit(host_main, resource.RLIMIT_NOFILE, (3, before[1]))
    slot.wait_for("stderr.txt", "nothing is given up")
    if then == "quit":
        client.say("<quit/>")
        slot.wait_for("stderr_HostMain", "it is tried again")
        resource.prlimit(host_main, resource.RLIMIT_NOFILE, before)
        assert process.wait(60) == 0
        assert re.search(r"VM \S+ is saved", slot.text("stderr.txt")), slot.text("stderr.txt")
        assert records(slot)[0]["saved_state_expected"] is True
        return
    time.sleep(1)
    resource.prlimit(host_main, resource.RLIMIT_NOFILE, before)
    assert process.wait(60) == 0
    assert slot.text("out") == "made\n"
    for word in ("rollback", "made anew", "failed"):
        assert word not in slot.text("stderr.txt")
