"""Real guests that break while a job runs: what is told of each, and that the job goes on from its snapshot."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest.image import build
from tests.support.client_vm import HOST_CONFIG
from tests.support.limits import after
from tests.support.real_guests import real_image
from tests.support.slots import HOST_MAIN_TASK, TestSlot

WRAPPER = [sys.executable, "-m", "vmwrapper"]
SILENCE_S = 25
"""More than a boot takes under emulation, of time that counts."""
PROGRAM = """\
#!/usr/bin/env python3
import pathlib, time
how = pathlib.Path("how").read_text().strip()
with open("trace", "a") as trace:
    trace.write(how + "\\n")
if how != "nothing":
    pathlib.Path("BREAK").write_text(how)
    time.sleep(600)
"""
BREAKER = """\
#!/bin/sh
# What a broken guest does by itself, as root, on demand of the program.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
while sleep 0.2; do
  [ -s /home/vm/BREAK ] || continue
  read -r how </home/vm/BREAK
  rm -f /home/vm/BREAK
  case $how in
    network) ip link set eth0 down ;;
    agent) for p in $(pidof python3.11); do grep -q start-agent /proc/$p/cmdline && kill -9 $p; done ;;
    kernel) echo 1 >/proc/sys/kernel/panic; echo c >/proc/sysrq-trigger ;;
  esac
done
"""
INITTAB = """\
::sysinit:/etc/init.d/boot
::respawn:/usr/lib/vmwrapper/agent-supervisor
::respawn:/usr/local/sbin/breaker
"""

pytestmark = [pytest.mark.timeout(400), pytest.mark.qemu, pytest.mark.slow]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = tmp_path_factory.mktemp("files")
    for name, text in (
        ("etc/inittab", INITTAB),
        ("etc/vmwrapper/VMConfig.cfg", "[VM]\nbeacon_interval = 1\n"),
        ("usr/local/sbin/breaker", BREAKER),
    ):
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        (files / name).write_text(text)
    (files / "usr/local/sbin/breaker").chmod(0o755)
    return real_image(build.Options(files=files))


@pytest.fixture
def slot(tmp_path: Path, image: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path)
    slot.write("HostConfig.cfg", HOST_CONFIG.decode())
    slot.write("program.py", PROGRAM, executable=True)
    slot.write("guest.vdi", f"<soft_link>{image}</soft_link>\n")
    yield slot
    slot.clean()


def task(more: str = "") -> str:
    return (
        "<task><virtualmachine>one</virtualmachine><image>guest.vdi</image><hypervisor>qemu</hypervisor>"
        "<memory_size_mb>128</memory_size_mb><application>program.py</application><copy_app_to_VM>1</copy_app_to_VM>"
        f"<copy_file_to_VM>how</copy_file_to_VM>{more}</task>"
    )


def test_each_way_in_which_a_guest_breaks_is_told_and_the_job_goes_on(slot: TestSlot) -> None:
    """Between two of them the snapshot after the task before is gone back to, so the guest need not boot."""
    slot.write("how", "nothing")
    slot.job(HOST_MAIN_TASK, task(), task(), task("<copy_file_from_VM>trace</copy_file_from_VM>"))
    wrapper = slot.start("job.xml", program=WRAPPER, VMWRAPPER_TEST_SILENCE_S=str(SILENCE_S))
    slot.wait_for("stderr.txt", "snapshot vmwrapper_1 of VM", 120)
    for how, number, attempt, words in (
        ("agent", 1, 1, "the guest's agent was killed, and started anew without knowing of it"),
        ("kernel", 1, 2, "the guest's kernel panicked, and it has booted anew: Kernel panic - not syncing: sysrq"),
        ("network", 2, 1, "the guest has given no sign of life for"),
    ):
        if number == 2:
            slot.wait_for("stderr.txt", "snapshot vmwrapper_2 of VM", 120)
        slot.write("how", how)
        wait_for_attempt(slot, number, attempt)
        slot.write("how", "nothing")
        slot.wait_for("stderr.txt", words, 120)
    assert wrapper.wait(120) == 0, slot.text("stderr.txt")
    story = slot.text("stderr.txt")
    assert slot.text("trace") == "nothing\n" * 3, "each attempt began on the disk that the task before it had left"
    assert story.count("back to snapshot vmwrapper_1") == 2
    assert story.count("back to snapshot vmwrapper_2") == 1
    assert "[guest console] " in story
    assert "while it should run" not in story
    assert "Traceback" not in story


def wait_for_attempt(slot: TestSlot, number: int, attempt: int) -> None:
    """Until this attempt of this task runs in the guest."""
    end = after(120)
    while not re.search(rf"running .* \(byhand_{number}_\w+, attempt {attempt}\)", slot.text("stderr.txt")):
        assert time.monotonic() < end, slot.text("stderr.txt")
        time.sleep(0.05)
