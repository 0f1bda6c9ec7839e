"""How a container's end becomes the exit status, in a real guest. One boot each, about 20 s; two are optin."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest.image.cache import guest_image
from tests.support.container_disks import CACHE, busybox_disk
from tests.support.slots import TestSlot

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="package qemu-system-x86 is not installed"),
    pytest.mark.skipif(shutil.which("mksquashfs") is None, reason="package squashfs-tools is not installed"),
]
TASK = (
    "<task><image>guest.vdi</image><hypervisor>qemu</hypervisor><container>app.vdi</container>"
    "<memory_size_mb>256</memory_size_mb>{more}</task>"
)


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path / "slot")
    slot.folder.mkdir()
    shutil.copyfile(guest_image(CACHE), slot.folder / "guest.vdi")
    yield slot
    slot.clean()


@pytest.mark.parametrize(
    ("command", "more", "status", "said"),
    [
        pytest.param(
            "echo last words >&2; exit 3", "", 195, "app.vdi failed in the guest with exit status 3",
        ),
        pytest.param(
            "tail /dev/zero", "", 205, "the guest ran out of memory and its kernel killed app.vdi",
            marks=pytest.mark.optin,  # seconds to minutes, as in test_worker_job.py
        ),
        pytest.param(
            "sleep 1000", "<time_limit>3</time_limit>", 0, "app.vdi has run for its time_limit of 3.0 s: it is ended",
            marks=pytest.mark.optin,
        ),
    ],
)  # fmt: skip
def test_exit_statuses(slot: TestSlot, tmp_path: Path, command: str, more: str, status: int, said: str) -> None:
    shutil.move(busybox_disk(tmp_path, ("-c", command)), slot.folder / "app.vdi")
    slot.job(TASK.format(more=more))
    ended = slot.run(limit_s=200, program=[sys.executable, "-m", "vmwrapper"])
    story = slot.text("stderr.txt")
    assert (ended, said in story) == (status, True), story
    assert status != 195 or "last words" in story
