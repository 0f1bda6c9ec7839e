"""A guest task in a VM that was there before the job, through the whole wrapper, against a scripted HostMain."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.slots import HOST_MAIN_TASK, TestSlot


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path)
    slot.write("HostConfig.cfg", "[Broker]\ntype = embedded\n")
    slot.write("worker", "the application", executable=True)
    yield slot
    slot.clean()


def task(line: str, name: str = "CernVM") -> str:
    return (
        f"<task><virtualmachine>{name}</virtualmachine><image></image><application>./worker</application>"
        f"<copy_app_to_VM>1</copy_app_to_VM><command_line>{line}</command_line></task>"
    )


def is_there(slot: TestSlot, state: str) -> None:
    saved: list[Any] | None = [{}, False] if state == "Saved" else None
    vm: dict[str, Any] = {
        "state": state,
        "files": {"own": "file"},
        "table": {},
        "snapshots": {"own": [{}, {}]},
        "saved": saved,
    }
    slot.write("fake_world.json", json.dumps({"CernVM": vm}))


def left(slot: TestSlot) -> dict[str, Any]:
    vm: dict[str, Any] = json.loads(slot.text("fake_world.json"))["CernVM"]
    return vm


def calls(slot: TestSlot) -> list[str]:
    return [line.split()[0] for line in slot.text("fake_calls.txt").splitlines()]


@pytest.mark.parametrize("found", ["Saved", "PoweredOff"])
@pytest.mark.parametrize(("line", "status"), [("make=out", 0), ("exit=3", 195)])
def test_it_is_left_as_it_was_found_whatever_became_of_the_job(
    slot: TestSlot, found: str, line: str, status: int
) -> None:
    is_there(slot, found)
    slot.job(HOST_MAIN_TASK, task(line), task(line))
    assert slot.run("job.xml") == status
    assert left(slot)["state"] == found
    assert list(left(slot)["snapshots"]) == ["own"]
    seen = calls(slot)
    assert seen.index("takeVM") < seen.index("start")
    assert not {"defineVM", "deleteVM", "setNetwork", "setCpuCap"} & set(seen)
    slot.assert_nothing_runs()


def test_its_folder_under_qemu_stays_when_the_job_is_over(slot: TestSlot) -> None:
    is_there(slot, "PoweredOff")
    (slot.folder / "vm" / "CernVM").mkdir(parents=True)
    (slot.folder / "vm" / "CernVM" / "disk.qcow2").touch()
    (slot.folder / "vm" / "vmwrapper_left_over").mkdir()
    slot.job(HOST_MAIN_TASK, task("make=out"))
    assert slot.run("job.xml") == 0
    assert [path.name for path in (slot.folder / "vm").iterdir()] == ["CernVM"]
    assert (slot.folder / "vm" / "CernVM" / "disk.qcow2").exists()


def test_waiting_for_a_vm_that_another_task_uses_is_no_fault(slot: TestSlot) -> None:
    is_there(slot, "Saved")
    slot.job(HOST_MAIN_TASK, task("make=out"))
    reason = json.dumps({"key": "vm-in-use", "reason": "another task uses CernVM", "delay_s": 300})
    for _ in range(8):  # five would be the end for a fault
        slot.plan(faults=[["takeVM", 1, reason]])
        assert slot.run("job.xml") == 75
    assert "another task uses CernVM" in slot.text("stderr.txt")
    assert left(slot)["state"] == "Saved"
    assert slot.run("job.xml") == 0
    assert left(slot)["state"] == "Saved"
