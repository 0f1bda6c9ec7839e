"""BOINC's data folder in another place, and another image below a saved VM, seen by the whole wrapper."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.vmwrapper.vm.test_worker_exactly_once import guest
from tests.support.client_vm import HOST_CONFIG, TICKER, task
from tests.support.real_guests import real_image
from tests.support.slots import HOST_MAIN_TASK, TestSlot

WRAPPER = [sys.executable, "-m", "vmwrapper"]


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path / "data" / "slots" / "0")
    slot.folder.mkdir(parents=True)
    (tmp_path / "data" / "projects" / "p").mkdir(parents=True)
    slot.write("HostConfig.cfg", HOST_CONFIG.decode())
    slot.write("guest.vdi", "<soft_link>../../projects/p/guest.vdi</soft_link>\n")
    slot.write("worker", "the application", executable=True)
    slot.write("ticker.py", TICKER.decode(), executable=True)
    yield slot
    slot.clean()


@pytest.mark.qemu
def test_a_moved_folder_goes_on_with_its_saved_vm_and_its_own_files(slot: TestSlot, tmp_path: Path) -> None:
    image = real_image()
    shutil.copyfile(image, tmp_path / "data" / "projects" / "p" / "guest.vdi")
    slot.job(HOST_MAIN_TASK, task(30))
    process = slot.start("job.xml", program=WRAPPER)
    slot.wait_for("stderr.txt", "running ticker.py", 120)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM
    (tmp_path / "data").rename(tmp_path / "a larger disk")
    slot.folder = tmp_path / "a larger disk" / "slots" / "0"
    remembered = [path for path in slot.folder.rglob("*.json") if str(tmp_path).encode() in path.read_bytes()]
    assert remembered == []
    console = (slot.folder / "guest_console.log").stat().st_size
    assert slot.run("job.xml", limit_s=120, program=WRAPPER) == 0
    story = slot.text("stderr.txt")
    assert "its saved state is resumed" in story
    assert "the guest has ticker.py (attempt 1): running" in story
    assert "rollback" not in story
    assert slot.text("out") == "out\n", "the program ran once"
    assert (slot.folder / "guest_console.log").stat().st_size >= console
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_replaced_image_costs_one_line_and_the_vm_is_made_anew(
    slot: TestSlot, tmp_path: Path, snapshot: bool
) -> None:
    (tmp_path / "data" / "projects" / "p" / "guest.vdi").write_text("an image")
    first = guest("append=trace:a make=out0", more="<copy_file_from_VM>out0</copy_file_from_VM>")
    second = guest("append=trace:b sleep=1 copy=trace:out", more="<copy_file_from_VM>out</copy_file_from_VM>")
    slot.job(HOST_MAIN_TASK, *([first] if snapshot else []), second)
    process = slot.start("job.xml")
    slot.wait_for("fake_runs.txt", "_1_" if snapshot else "_0_")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM
    world = slot.folder / "fake_world.json"
    vms = json.loads(world.read_text())
    (vm,) = vms.values()
    assert vm["state"] == "Saved"
    assert bool(vm["snapshots"]) is snapshot
    vm["unusable"] = "its image guest.vdi was replaced by another one of the same size"
    world.write_text(json.dumps(vms))
    assert slot.run("job.xml") == 0
    story = slot.text("stderr.txt")
    assert story.count("its image guest.vdi was replaced by another one of the same size: it is made anew") >= 1
    assert slot.text("out").split() == (["a", "b"] if snapshot else ["b"]), "on a new disk, from the first task in it"
    assert "failed" not in story
