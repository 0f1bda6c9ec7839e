"""A disk that fills up under a real QEMU guest: in the middle of the work, and when the guest is to be saved."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.agenthost import wait_until
from tests.support.client_vm import HOST_CONFIG
from tests.support.real_guests import real_image
from tests.support.slots import HOST_MAIN_TASK, TestSlot

WRAPPER = [sys.executable, "-m", "vmwrapper"]
WRITER = """\
#!/usr/bin/python3
import os, time
for k in range(8):
    with open('big%d' % k, 'wb') as f:
        f.write(os.urandom(4 << 20)); f.flush(); os.fsync(f.fileno())
    print('wrote', k, flush=True)
    time.sleep(0.3)
open('result.txt', 'w').write('ok\\n')
"""
TASK = (
    "<task><virtualmachine>mine</virtualmachine><image>guest.vdi</image><hypervisor>qemu</hypervisor>"
    "<memory_size_mb>192</memory_size_mb><application>./writer.py</application><copy_app_to_VM>1</copy_app_to_VM>"
    "<copy_file_from_VM>result.txt</copy_file_from_VM><stdout_filename>stdout</stdout_filename>"
    "<minimum_checkpoint_interval>{interval}</minimum_checkpoint_interval></task>"
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "small", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here (root only): {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def slot(small_disk: Path) -> Iterator[TestSlot]:
    image = real_image()
    slot = TestSlot(small_disk)
    slot.write("HostConfig.cfg", HOST_CONFIG.decode())
    slot.write("writer.py", WRITER, executable=True)
    (small_disk / "guest.vdi").symlink_to(image)
    yield slot
    slot.clean()


def fill(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(65536))
        except OSError:
            return


def test_two_seconds_of_full_disk_cost_nothing_and_a_save_that_does_not_fit_is_told(slot: TestSlot) -> None:
    """Both in one boot of a guest, for that takes long where it is emulated."""
    slot.job(HOST_MAIN_TASK, TASK.format(interval=600))
    process = slot.start("job.xml", program=WRAPPER)
    slot.wait_for("stderr.txt", "running ./writer.py", limit_s=120)
    fill(slot.folder)
    slot.wait_for("stderr.txt", "stands still", limit_s=60)
    time.sleep(1.0)
    (slot.folder / "filler").unlink()
    slot.wait_for("stderr.txt", "_mine goes on\n", limit_s=60)
    story = slot.text("stderr.txt")
    assert re.search(r"VM \S+ stands still: the disk of this computer is full; free some space", story), story
    refused = "disk cannot be written"
    before = slot.text("stderr_HostMain").count(refused)
    fill(slot.folder)
    wait_until(lambda: slot.text("stderr_HostMain").count(refused) > before, "the next write")
    with (slot.folder / "filler").open("rb+") as filler:  # room for a part of the state: it fails near its end
        filler.truncate(max(0, filler.seek(0, 2) - (40 << 20)))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM
    story = slot.text("stderr.txt")
    assert re.search(r"was not saved \(the disk of this computer is full.*: it has no snapshot, so the next", story), (
        story
    )
    assert "is saved" not in story
    for word in ("rollback", "made anew:", "failed"):
        assert word not in story
    (record,) = json.loads(slot.text("vmwrapper_checkpoint.json"))["vms"]
    assert record["saved_state_expected"] is False
