"""Power loss between any two file operations of the wrapper: its operations are recorded, every prefix is gone on from.

What had not been synced is there in one variant and lost in the other. The VM is the scripted HostMain's, whose disk
and snapshots are as they were at that moment, and whose memory is gone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.vmwrapper.vm.test_worker_exactly_once import guest
from tests.support.slots import HOST_MAIN_TASK, PlayedClient, TestSlot

RECORDING = Path(__file__).parents[3] / "support" / "drive_recording.py"
IGNORED = ("fake_calls.txt", "vmwrapper_ports.json", "vmwrapper_processes.json")
JOB = (
    HOST_MAIN_TASK,
    guest("append=trace:a make=out0", more="<copy_file_from_VM>out0</copy_file_from_VM>"),
    guest(
        "append=trace:b copy=trace:out1 sleep=2.5",
        more="<minimum_checkpoint_interval>0.1</minimum_checkpoint_interval>"
        "<copy_file_from_VM>out1</copy_file_from_VM>",
    ),
)


def lay_out(folder: Path) -> TestSlot:
    slot = TestSlot(folder)
    slot.write("HostConfig.cfg", "[Broker]\ntype = embedded\n")
    slot.write("guest.vdi", "an image")
    slot.write("worker", "the application", executable=True)
    slot.job(*JOB)
    return slot


def record(tmp_path: Path) -> list[Path]:
    """The states, each different one once, in their order."""
    states, folder = tmp_path / "states", tmp_path / "recorded"
    states.mkdir()
    folder.mkdir()
    slot = lay_out(folder)
    PlayedClient(slot)  # its checkpoint period is a second
    try:
        assert slot.run(str(states), program=[sys.executable, str(RECORDING)]) == 0
    finally:
        slot.clean()
    assert not (states / "unsynced").exists(), (states / "unsynced").read_text()
    seen, different = set(), []
    for state in sorted(path for path in states.iterdir() if path.is_dir()):
        digest = hashlib.sha256()
        for file in sorted(state.iterdir()):
            if file.name not in IGNORED and not file.name.startswith(".vmwrapper_"):
                digest.update(f"{file.name}\n".encode() + file.read_bytes())
        if digest.digest() not in seen:
            seen.add(digest.digest())
            different.append(state)
    return different


def go_on(state: Path, folder: Path) -> str:
    """Start in this state and run to the end; what is wrong then, or nothing."""
    shutil.copytree(state, folder)
    slot = TestSlot(folder)
    slot.write("guest.vdi", "an image")
    for name in ("init_data.xml", "boinc_mmap_file", "vmwrapper_processes.json"):
        (folder / name).unlink(missing_ok=True)  # after power loss there are no processes
    checkpoint = folder / "vmwrapper_checkpoint.json"
    result = "result_0"
    runs_before = slot.text("fake_runs.txt").splitlines() if (folder / "fake_runs.txt").exists() else []
    PlayedClient(slot, result=result)
    before = checkpoint.read_text() if checkpoint.exists() else ""
    program = [sys.executable, str(RECORDING.with_name("drive_wrapper.py"))]
    try:
        status = slot.run(program=program, limit_s=60)
    finally:
        slot.clean()
    runs = slot.text("fake_runs.txt").splitlines() if (folder / "fake_runs.txt").exists() else []
    wrong = []
    if status != 0:
        wrong.append(f"status {status}")
    if (folder / "out1").read_text() != "a\nb\n":
        wrong.append(f"out1 is {(folder / 'out1').read_text()!r}")
    if len(set(runs)) != len(runs):
        wrong.append(f"the same attempt twice: {runs}")
    done = json.loads(before)["tasks_done"] if before else 0
    again = [line for line in runs[len(runs_before) :] if int(line.split()[0].split("_")[-2]) < done]
    if again:
        wrong.append(f"done already, and run again: {again}")
    world = folder / "fake_world.json"
    if world.exists() and json.loads(world.read_text()) != {}:
        wrong.append("the VM is left")
    return f"{state.name}: {'; '.join(wrong)}" if wrong else ""


@pytest.mark.slow
def test_every_prefix_of_the_file_operations_can_be_gone_on_from(tmp_path: Path) -> None:
    states = record(tmp_path)
    assert len(states) > 15
    assert list((tmp_path / "states").glob("*-lost")), "names that were not durable yet have been lost, too"
    with ThreadPoolExecutor(4) as pool:
        wrong = [text for text in pool.map(lambda state: go_on(state, tmp_path / f"slot-{state.name}"), states) if text]
    assert not wrong, "\n".join(wrong)
    print(f"{len(states)} different states")
