"""The client's messages in every phase of a guest job: unzip, start-up, boot, copying in, running, copying out.

In each phase the step under way would take a minute, so a message that is obeyed in time did not wait for it. Client
and HostMain are played. How long it takes with real VMs is measured in test_client_vm.py.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.vmwrapper.vm.test_worker_exactly_once import guest
from tests.support.limits import after, stretched
from tests.support.slots import HOST_MAIN_TASK, PlayedClient, TestSlot

SUSPEND_LIMIT_S, QUIT_LIMIT_S, ABORT_LIMIT_S = 0.4, 5.0, 3.0
"""Those of a computer with nothing else to do."""
FOREVER = 60
PHASES: dict[str, tuple[dict[str, Any], tuple[str, str], str]] = {
    "unzip": ({}, ("unzipping", ""), "program"),
    "start-up": ({"late": FOREVER}, ("vmwrapper_processes.json", "hostmain"), "nothing"),
    "boot": ({"slow": {"waitGuest": FOREVER}}, ("fake_calls.txt", "waitGuest"), "VM"),
    "copying in": ({"slow": {"putFile": FOREVER}}, ("fake_calls.txt", "putFile"), "VM"),
    "running": ({}, ("fake_runs.txt", "_0_"), "VM"),
    "copying out": ({"slow": {"getFile": FOREVER}}, ("fake_calls.txt", "getFile"), "VM"),
}
"""What HostMain is to do slowly, the file and words that show the phase, and what is to stand still in it."""


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path)
    slot.write("HostConfig.cfg", "[Broker]\ntype = embedded\n")
    slot.write("guest.vdi", "an image")
    slot.write("worker", "the application", executable=True)
    yield slot
    slot.clean()


def within(limit_s: float, condition: Callable[[], bool], what: str) -> None:
    end = after(limit_s) + 0.5  # the looks themselves
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {limit_s} s (stretched by the load)"
        time.sleep(0.01)


def in_phase(slot: TestSlot, phase: str) -> tuple[PlayedClient, subprocess.Popen[bytes]]:
    plan, (file, words), _ = PHASES[phase]
    client = PlayedClient(slot)
    slot.plan(**plan)
    unzip = "<unzip_task><application>./unpack</application></unzip_task>" if phase == "unzip" else ""
    slot.write("unpack", "#!/bin/sh\necho > unzipping\nexec sleep 600\n", executable=True)
    line = "make=out" if phase == "copying out" else "make=out sleep=600"
    slot.job(unzip, HOST_MAIN_TASK, guest(line, more="<copy_file_from_VM>out</copy_file_from_VM>"))
    with (slot.folder / "stderr.txt").open("wb") as stderr:
        process = slot.start(stderr=stderr)
    slot.wait_for(file, words)
    return client, process


def stands(slot: TestSlot, what: str) -> bool:
    if what == "program":
        return {one.status() for one in slot.leftovers() if one.name() == "sleep"} == {psutil.STATUS_STOPPED}
    if what == "VM":
        world = json.loads(slot.text("fake_world.json"))
        return [vm["state"] for vm in world.values()] == ["Paused"]
    return slot.text("stderr.txt").count("suspended by the client") > slot.text("stderr.txt").count("resumed by")


@pytest.mark.parametrize("phase", PHASES)
def test_suspend_resume_and_quit(slot: TestSlot, phase: str) -> None:
    client, process = in_phase(slot, phase)
    what = PHASES[phase][2]
    assert not stands(slot, what)
    client.say("<suspend/>")
    within(SUSPEND_LIMIT_S, lambda: stands(slot, what), "suspend")
    client.say("<resume/>")
    within(SUSPEND_LIMIT_S, lambda: not stands(slot, what), "resume")
    client.status()  # and it goes on to report
    client.say("<quit/>")
    assert process.wait(stretched(QUIT_LIMIT_S)) == 0
    assert not (slot.folder / "boinc_finish_called").exists()
    if what == "VM":
        world = json.loads(slot.text("fake_world.json"))
        assert [vm["state"] for vm in world.values()] == ["Saved"]
    slot.assert_nothing_runs(0.5)


@pytest.mark.parametrize("phase", ["start-up", "boot", "copying in", "copying out"])  # the others: test_worker_host.py
def test_abort_while_suspended(slot: TestSlot, phase: str) -> None:
    client, process = in_phase(slot, phase)
    client.say("<suspend/>")
    within(SUSPEND_LIMIT_S, lambda: stands(slot, PHASES[phase][2]), "suspend")
    client.say("<abort/>")
    assert process.wait(stretched(ABORT_LIMIT_S)) == 194
    assert not (slot.folder / "fake_world.json").exists() or json.loads(slot.text("fake_world.json")) == {}
    slot.assert_nothing_runs(0.5)


def test_what_a_phase_did_slowly_is_done_after_the_next_start(slot: TestSlot) -> None:
    """The copy that a quit broke off is made anew, the command runs once."""
    client, process = in_phase(slot, "copying in")
    client.say("<quit/>")
    assert process.wait(stretched(QUIT_LIMIT_S)) == 0
    slot.plan()
    slot.job(HOST_MAIN_TASK, guest("make=out sleep=600", more="<copy_file_from_VM>out</copy_file_from_VM>"))
    client = PlayedClient(slot)
    process = slot.start()
    slot.wait_for("fake_runs.txt", "_0_")
    client.say("<abort/>")
    assert process.wait(stretched(ABORT_LIMIT_S)) == 194
    assert len(slot.text("fake_runs.txt").splitlines()) == 1
