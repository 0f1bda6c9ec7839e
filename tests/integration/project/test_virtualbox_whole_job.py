"""The whole job on VirtualBox: wrapper, HostMain, broker, a real VirtualBox, the agent in its guest, the worker.

In the lab the guest is interpreted and takes many minutes to boot. So it boots once: when the agent has been there the
wrapper is asked to end, which saves the VM, and the slot and VirtualBox's home are kept as they lie, in the checkout's
.cache. Each run of the test begins with a copy of them in the same place, as the client would begin after a restart.

    python -m pytest -m optin tests/integration/project/test_virtualbox_whole_job.py -s
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slots import TestSlot
from tests.support.virtualbox_world import the_lab
from tests.virtualbox.lab import CACHE, CHECKOUT, Lab

EXAMPLE = CHECKOUT / "examples" / "worker"
WRAPPER = [sys.executable, "-m", "vmwrapper"]
BOOT_LIMIT_S = 2400
RUN_LIMIT_S = 900
AGENT_THERE = "4 of 4: all ready"

pytestmark = [pytest.mark.virtualbox, pytest.mark.optin, pytest.mark.timeout(BOOT_LIMIT_S + RUN_LIMIT_S)]


class Place:
    """Where the job runs: always the same paths, as VirtualBox's settings and ours name them."""

    def __init__(self, image: Path, here: Lab) -> None:
        key = hashlib.sha256(f"{image.resolve()} {image.stat().st_mtime_ns} {here.folder}".encode()).hexdigest()[:16]
        self.image, self.lab = image, here
        self.folder = CACHE / "whole-job"
        self.work, self.kept = self.folder / "work", self.folder / f"booted-{key}"
        self.slot, self.home = TestSlot(self.work / "slot"), self.work / "home"

    def lay_out(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.slot.folder.mkdir(parents=True)
        for name in ("worker.py", "in", "stdin_worker"):
            shutil.copy(EXAMPLE / name, self.slot.folder / name)
        config = (EXAMPLE / "HostConfig.cfg").read_text()
        self.slot.write("HostConfig.cfg", config.replace("hypervisor = auto", "hypervisor = virtualbox"))
        job = (EXAMPLE / "job.xml").read_text()
        limit = f"<boot_timeout>{BOOT_LIMIT_S}</boot_timeout>"
        self.slot.write("job.xml", job.replace("<weight>", f"{limit}<weight>"))
        self.slot.write("guest.vdi", f"<soft_link>{self.image}</soft_link>\n")

    def keep(self) -> None:
        partial = self.kept.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        subprocess.run(["cp", "-a", "--sparse=always", str(self.work), str(partial)], check=True)
        partial.rename(self.kept)

    def take_out(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        subprocess.run(["cp", "-a", "--sparse=always", str(self.kept), str(self.work)], check=True)

    def variables(self, environment: dict[str, str]) -> dict[str, str]:
        names = ("VBOX_USER_HOME", "VBOX_IPC_SOCKETID", "HOME", "LOGNAME", "USER")
        return {name: environment[name] for name in names} | {"VMWRAPPER_VBOXMANAGE": str(self.lab.vboxmanage)}


@pytest.fixture
def place() -> Iterator[Place]:
    from guest.image.cache import guest_image

    place = Place(guest_image(CHECKOUT / ".cache" / "guest-image"), the_lab())
    yield place
    place.slot.clean()


def boot(place: Place) -> None:
    place.lay_out()
    with place.lab.home(place.home) as environment:
        wrapper = place.slot.start("job.xml", program=WRAPPER, **place.variables(environment))
        place.slot.wait_for("stderr.txt", AGENT_THERE, limit_s=BOOT_LIMIT_S)
        wrapper.send_signal(signal.SIGTERM)
        assert wrapper.wait(120) == -signal.SIGTERM, place.slot.text("stderr.txt")
        place.slot.assert_nothing_runs()
    place.keep()


def test_the_worker_example(place: Place) -> None:
    if not place.kept.exists():
        boot(place)
    place.take_out()
    with place.lab.home(place.home) as environment:
        began = time.monotonic()
        status = place.slot.run("job.xml", program=WRAPPER, limit_s=RUN_LIMIT_S, **place.variables(environment))
        took = time.monotonic() - began
        story = place.slot.text("stderr.txt")
        print(story, f"\nfrom the saved state to the end: {took:.1f} s")
        assert status == 0, story
        said = subprocess.run(
            [place.lab.vboxmanage, "list", "vms"], env=environment, capture_output=True, text=True, timeout=60
        ).stdout
        assert said == ""
    assert "THIS FILE IS CALLED IN" in place.slot.text("out")
