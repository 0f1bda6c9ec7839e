"""A container under the real client that counts: suspended, stopped, its processes killed, and all of them at once.

What it prints never begins again: it goes on from a snapshot, or from where it was. One boot; about two minutes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from guest.image.cache import guest_image
from tests.support import boinc_client
from tests.support.boinc_client import BoincClient, Job, JobFile
from tests.support.client_vm import PAUSED, RUNNING, executions, job, processes_in, qemu_of, times_of
from tests.support.container_disks import CACHE, busybox_disk

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.boinc,
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.skipif(not boinc_client.AVAILABLE, reason=boinc_client.WHY_NOT),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="package qemu-system-x86 is not installed"),
    pytest.mark.skipif(shutil.which("mksquashfs") is None, reason="package squashfs-tools is not installed"),
]

TICKS = 500
COUNTER = f"""\
echo begun >>starts; cat own input >seen
i=0; while [ $i -lt {TICKS} ]; do
i=$((i+1)); echo $i; [ $((i % 10)) = 0 ] && echo 0.$((1000 + i)) | cat >fraction_done; sleep 0.1
done
echo $USED by $(id -u) >>seen; ls /elsewhere >>seen 2>/dev/null; true
"""
TASK = (
    "<task><image>guest.vdi</image><hypervisor>qemu</hypervisor><container>app.vdi</container>"
    "<memory_size_mb>256</memory_size_mb><setenv>USED=used</setenv><copy_file_to_VM>input</copy_file_to_VM>"
    "<stdout_filename>out</stdout_filename><copy_file_from_VM>seen</copy_file_from_VM>"
    "<copy_file_from_VM>starts</copy_file_from_VM>"
    "<minimum_checkpoint_interval>5</minimum_checkpoint_interval></task>"
)
OUTPUTS = ("out", "seen", "starts")


@pytest.fixture
def counting(tmp_path: Path) -> Job:
    (tmp_path / "files").mkdir()
    image = tmp_path / "files" / "guest.vdi"
    shutil.copyfile(guest_image(CACHE), image)
    disk = busybox_disk(tmp_path / "files", ("-c", COUNTER))
    made = job("counting", image, [TASK], kind="python", outputs=OUTPUTS)
    files = [one for one in made.files if one.name != "ticker.py"]
    return replace(made, files=[*files, JobFile("app.vdi", disk), JobFile("input", b"of the task\n")])


class Story:
    def __init__(self, client: BoincClient) -> None:
        self.client = client

    @property
    def slot(self) -> Path:
        return self.client.slot("counting")

    def goes_on(self) -> None:
        """Until the container counts on."""
        self.client.wait_for(lambda: self.client.result("counting").is_running, "a process", 60)
        self.client.wait_for(self.has_begun, "it runs", 300)
        seen = self.client.result("counting").fraction_done
        self.client.wait_for(lambda: self.client.result("counting").fraction_done > seen, "it goes on", 120)

    def has_begun(self) -> bool:
        assert not self.client.result("counting").ready_to_report, self.client.stderr_of("counting")
        return bool(self.executed())

    def executed(self) -> list[tuple[str, int]]:
        console = self.slot / "guest_console.log"
        return executions(console.read_text(errors="replace")) if console.exists() else []

    def has_snapshot(self) -> bool:
        kept = json.loads((self.slot / "vmwrapper_checkpoint.json").read_text())
        return any(one["proven"] for vm in kept["vms"] for one in vm["snapshots"])

    def hostmain(self) -> psutil.Process:
        listed = json.loads((self.slot / "vmwrapper_processes.json").read_text())["processes"]
        return psutil.Process(next(one["pid"] for one in listed if one["role"] == "hostmain"))

    def kill(self, victim: Callable[[], psutil.Process]) -> None:
        began = len(times_of(self.slot, RUNNING))
        victim().kill()
        self.client.wait_for(lambda: len(times_of(self.slot, RUNNING)) > began, "it runs again", 120)
        self.goes_on()


def test_a_counter_never_begins_again(tmp_path: Path, counting: Job) -> None:
    with BoincClient(tmp_path / "client", [counting], checkpoint_period_s=2.0) as client:
        story = Story(client)
        story.goes_on()
        client.suspend("counting")
        client.wait_for(partial(times_of, story.slot, PAUSED), "paused", 30)
        client.resume("counting")
        client.wait_for(story.has_snapshot, "a snapshot", 120)
        story.goes_on()
        story.kill(partial(qemu_of, story.slot))
        story.kill(story.hostmain)
        slot = story.slot
        client.quit()
        assert not processes_in(slot)
        client.start()
        story.goes_on()
        client.kill()
        client.start()
        client.wait_for(lambda: client.result("counting").ready_to_report, "finished", 300)
        said = client.stderr_of("counting")
        assert client.result("counting").state == boinc_client.RESULT_FILES_UPLOADED, said
        assert client.output("counting", "out").read_text().split() == [str(i) for i in range(1, TICKS + 1)], said
        assert client.output("counting", "starts").read_text() == "begun\n"
        assert client.output("counting", "seen").read_text() == "of the image\nof the task\nused by 1001\n"
        assert "attempt 2" not in said
        assert not processes_in(slot)
