"""A VM that could not be saved, through the whole wrapper: what is told, written down and gone back to."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.vmwrapper.vm.test_worker_exactly_once import guest, runs
from tests.support.slots import HOST_MAIN_TASK, PlayedClient, TestSlot
from vmwrapper.boinc import channels

OUT = "<copy_file_from_VM>out</copy_file_from_VM>"
SNAPSHOTS = "<minimum_checkpoint_interval>0.2</minimum_checkpoint_interval>"


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path)
    slot.write("HostConfig.cfg", "[Broker]\ntype = embedded\n")
    slot.write("guest.vdi", "an image")
    slot.write("worker", "the application", executable=True)
    yield slot
    slot.clean()


def records(slot: TestSlot) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(slot.text("vmwrapper_checkpoint.json"))["vms"]
    return found


@pytest.mark.parametrize("how", ["quit", "term"])
def test_it_goes_back_to_its_snapshot_and_says_why(slot: TestSlot, how: str) -> None:
    client = PlayedClient(slot)
    slot.job(HOST_MAIN_TASK, guest("sleep=30 make=out", more=SNAPSHOTS))
    slot.plan(unsaved=["disk-full", "the disk of this computer is full; free some space"])
    process = slot.start(stderr=(slot.folder / "stderr.txt").open("a"))
    slot.wait_for("vmwrapper_checkpoint.json", '"name": "vmwrapper_1"')
    if how == "quit":
        client.say("<quit/>")
    else:
        process.send_signal(signal.SIGTERM)
    process.wait(20)
    (record,) = records(slot)
    assert record["saved_state_expected"] is False
    newest = record["snapshots"][-1]["name"]
    story = slot.text("stderr.txt")
    assert re.search(
        rf"VM {record['name']} was not saved \(the disk of this computer is full; free some space\): "
        rf"the next start goes back to its snapshot {newest}", story
    ), story  # fmt: skip
    assert "is saved" not in story
    status = client.last(channels.Channel.APP_STATUS)
    told = float(re.findall(r"<checkpoint_cpu_time>([\d.e+-]+)", status)[0])
    assert told == pytest.approx(json.loads(slot.text("vmwrapper_checkpoint.json"))["cpu_time_s"], abs=0.01)
    slot.plan()
    process = slot.start(stderr=(slot.folder / "stderr.txt").open("a"))
    slot.wait_for("stderr.txt", f"back to snapshot {newest}")
    slot.wait_for("stderr.txt", "the guest has")
    client.say("<abort/>")
    assert process.wait(20) == 194
    assert runs(slot) == [("0", 1)], "the snapshot knew the command"


def test_without_a_snapshot_the_words_say_what_is_lost(slot: TestSlot) -> None:
    client = PlayedClient(slot)
    slot.job(HOST_MAIN_TASK, guest("sleep=2 make=out"))
    slot.plan(unsaved=["", "Failed to save machine state"])
    process = slot.start(stderr=(slot.folder / "stderr.txt").open("a"))
    slot.wait_for("fake_runs.txt", "_0_")
    client.say("<quit/>")
    assert process.wait(20) == 0
    story = slot.text("stderr.txt")
    assert "was not saved (Failed to save machine state): it has no snapshot, so the next start makes it anew" in story
    assert records(slot)[0]["saved_state_expected"] is False


def test_an_end_that_hostmain_tells_over_its_pipe_alone_counts(slot: TestSlot) -> None:
    """Its XML-RPC does not answer any more; the end of its lifeline makes it save."""
    client = PlayedClient(slot)
    slot.job(HOST_MAIN_TASK, guest("sleep=30 make=out"))
    slot.plan(faults=[["shutdown", -1, "not now"]])
    process = slot.start(stderr=(slot.folder / "stderr.txt").open("a"))
    slot.wait_for("fake_runs.txt", "_0_")
    client.say("<quit/>")
    assert process.wait(20) == 0
    assert re.search(r"VM \S+ is saved", slot.text("stderr.txt"))
    assert records(slot)[0]["saved_state_expected"] is True


def test_a_vm_that_cannot_be_saved_between_its_tasks_does_not_run_on_and_goes_back_to_its_snapshot(
    slot: TestSlot,
) -> None:
    slot.job(
        HOST_MAIN_TASK, guest("append=trace:a"), guest("", vm="two"), guest("append=trace:b copy=trace:out", more=OUT)
    )
    slot.plan(faults=[["saveState", -1, "no room"]])
    assert slot.run("job.xml") == 0
    assert slot.text("out") == "a\nb\n"
    seen = [line for line in slot.text("fake_calls.txt").splitlines() if line.startswith(("saveState", "powerOff"))]
    assert [line.split()[0] for line in seen[:2]] == ["saveState", "powerOff"]
    assert "no room" in slot.text("stderr.txt")
