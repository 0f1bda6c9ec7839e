"""The three example jobs for the host run as they stand, and go on after a kill."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slots import PlayedClient, TestSlot

EXAMPLES = Path(__file__).parents[4] / "examples"
WRAPPER = [sys.executable, "-m", "vmwrapper"]


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path)
    yield slot
    slot.clean()


def lay_out(slot: TestSlot, name: str) -> None:
    shutil.copytree(EXAMPLES / name, slot.folder, dirs_exist_ok=True)
    prepare = slot.folder / "prepare"
    if prepare.exists():
        subprocess.run([sys.executable, prepare, slot.folder], check=True)
        prepare.unlink()


def test_many_short_tasks(slot: TestSlot) -> None:
    lay_out(slot, "many-tasks")
    assert slot.run("job.xml", program=WRAPPER) == 0
    lines = slot.text("picture").splitlines()
    assert [len(line) for line in lines] == [100] * 48
    assert lines[24].count("@") > 20
    assert lines[0] == lines[47], "the set is symmetric"


def test_a_long_program_goes_on_from_its_checkpoint(slot: TestSlot) -> None:
    lay_out(slot, "checkpointing")
    client = PlayedClient(slot)
    words = ("--nthreads", "2", "--passthrough_child", "--step-seconds")
    process = slot.start(*words, "0.02", program=WRAPPER)
    slot.wait_for("progress", "0.")
    while not re.search(r"<fraction_done>[0-9.]+e-0[12]", client.status()):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads(slot.text("vmwrapper_checkpoint.json"))["tasks_done"] == 0
    assert slot.run(*words, "0", program=WRAPPER) == 0
    assert slot.text("out") == "the sum is 4500, with 2 thread(s)\n"
    assert "going on after step" in slot.text("log")


def test_a_pipeline_with_archives(slot: TestSlot) -> None:
    lay_out(slot, "pipeline")
    assert slot.run("job.xml", program=WRAPPER) == 0
    with zipfile.ZipFile(slot.folder / "output.zip") as archive:
        assert sorted(archive.namelist()) == ["result_counts.txt", "watch.log"]
        assert archive.read("watch.log") == b"watching\ntold to end\n"
        counts = dict(line.split()[::-1] for line in archive.read("result_counts.txt").decode().splitlines())
    assert counts == {**dict.fromkeys(["is", "not", "or", "question", "that", "the"], "50"), "be": "100", "to": "100"}
    assert not (slot.folder / "input.zip").exists()
