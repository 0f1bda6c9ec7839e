"""Tasks in containers, as the wrapper drives them: its disks reach the VM, its command the guest, and 206 says why not.

The whole wrapper; HostMain and the guest are scripted (fake_hostmain.py), whose programs' arguments are their steps.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.slots import HOST_MAIN_TASK, TestSlot
from vmcontrol.common.containerdisk import HEADER_AT, ContainerConfig, ContainerDisk, encode

CONFIG = ContainerConfig(
    ("python",), ("make=out", "sleep=0.3"), ("A=1", "B=2"), "/srv", "app", 7, 8, (9,), "SIGINT", {}
)


def write_disk(path: Path, id: str = "ab", **config: Any) -> None:
    disk = ContainerDisk(id * 32, "myapp:1.0", config=replace(CONFIG, **config))
    path.write_bytes((bytes(HEADER_AT) + encode(disk)).ljust(1 << 20, b"\0"))


def contained(more: str = "", disk: str = "app.vdi") -> str:
    return f"<task><image>guest.vdi</image><container>{disk}</container>{more}</task>"


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path / "slot")
    slot.folder.mkdir(exist_ok=True)
    slot.write("HostConfig.cfg", "[Broker]\ntype = embedded\n")
    slot.write("guest.vdi", "an image")
    write_disk(slot.folder / "app.vdi")
    yield slot
    slot.clean()


def requests(slot: TestSlot) -> list[dict[str, Any]]:
    """Of the commands of the only VM that is there."""
    (vm,) = json.loads(slot.text("fake_world.json")).values()
    table = vm["table"] or vm["saved"][0]  # HostMain may have saved it already
    return [command["request"] for command in table.values()]


def test_a_job_in_a_container_from_its_image_alone(slot: TestSlot) -> None:
    slot.job(HOST_MAIN_TASK, contained("<copy_file_from_VM>out</copy_file_from_VM>"))
    assert slot.run() == 0, slot.text("stderr.txt")
    assert slot.text("out").startswith("made by")


def test_what_the_guest_is_asked(slot: TestSlot) -> None:
    write_disk(slot.folder / "other.vdi", "cd", entrypoint=(), workdir="")
    slot.job(
        HOST_MAIN_TASK,
        contained("<command_line>make=x</command_line><setenv>B=3</setenv><enable_network/>"),
        contained("<application>tool</application><command_line>sleep=60</command_line>", "other.vdi"),
    )
    process = slot.start()
    slot.wait_for("fake_runs.txt", "_1_")
    process.send_signal(signal.SIGKILL)
    process.wait()
    (vm,) = json.loads(slot.text("fake_world.json")).values()
    assert vm["disks"] == ["ab" * 32, "cd" * 32], "both are attached from the beginning"
    second = requests(slot)[-1]
    assert (second["command"], second["arguments"]) == ("tool", ["sleep=60"])
    assert second["fraction_done_file"] == "fraction_done"
    assert second["container"] == {
        "disk": "cd" * 32, "workdir": "/app", "uid": 7, "gid": 8, "groups": [9], "stop_signal": 2, "network": True
    }  # fmt: skip
    assert {name: second["environment"][name] for name in ("A", "B")} == {"A": "1", "B": "2"}
    assert "PATH" in second["environment"]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"uid": None, "gid": None, "user": "ghost"}, "its USER 'ghost' does not exist in the image 'myapp:1.0'"),
        ({"entrypoint": (), "cmd": ()}, "there is nothing to run"),
        ({"stop_signal": "SIGNOPE"}, "its StopSignal 'SIGNOPE' is no signal of Linux"),
        ({"workdir": "/proc"}, "its working folder cannot be used"),
    ],
)
def test_a_container_that_cannot_run_ends_the_job_before_anything_starts(
    slot: TestSlot, config: dict[str, Any], why: str
) -> None:
    write_disk(slot.folder / "app.vdi", **config)
    slot.job(HOST_MAIN_TASK, contained())
    assert slot.run() == 206
    assert why in slot.text("stderr.txt")
    assert not (slot.folder / "fake_world.json").exists()


@pytest.mark.parametrize(("content", "why"), [(b"no disk", "it is no container's disk"), (None, "app.vdi")])
def test_a_disk_that_is_none(slot: TestSlot, content: bytes | None, why: str) -> None:
    (slot.folder / "app.vdi").unlink()
    if content is not None:
        (slot.folder / "app.vdi").write_bytes(content)
    slot.job(HOST_MAIN_TASK, contained())
    assert slot.run() == 206
    assert why in slot.text("stderr.txt")


def test_a_vm_that_was_there_before_gets_no_disks(slot: TestSlot) -> None:
    slot.job(HOST_MAIN_TASK, "<task><virtualmachine>old</virtualmachine><container>app.vdi</container></task>")
    assert slot.run() == 206
    assert "only one that is made for the job has the disks of containers" in slot.text("stderr.txt")


def check(slot: TestSlot) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "vmwrapper", "check"]
    return subprocess.run(words, cwd=slot.folder, capture_output=True, text=True, check=False)


def test_check_looks_at_the_disk(slot: TestSlot) -> None:
    slot.job(HOST_MAIN_TASK, contained())
    done = check(slot)
    assert (done.returncode, done.stderr) == (0, "")
    write_disk(slot.folder / "app.vdi", entrypoint=(), cmd=())
    done = check(slot)
    assert (done.returncode, "nothing to run" in done.stderr) == (206, True)
    (slot.folder / "app.vdi").write_bytes(b"\x1f\x8b" + bytes(100))
    assert "app.vdi is compressed" in check(slot).stderr
    (slot.folder / "app.vdi").unlink()
    done = check(slot)
    assert (done.returncode, "note: app.vdi is not there" in done.stderr) == (0, True)
