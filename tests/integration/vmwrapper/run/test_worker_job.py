"""The whole path with real parts: job.xml, wrapper, HostMain, broker, QEMU, the agent in a real guest, the worker."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slots import PlayedClient, TestSlot

ROOT = Path(__file__).parents[4]
EXAMPLE = ROOT / "examples" / "worker"
WRAPPER = [sys.executable, "-m", "vmwrapper"]
OUT = "THIS FILE IS CALLED IN"

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="package qemu-system-x86 is not installed"),
]


@pytest.fixture(scope="module")
def image() -> Path:
    from guest.image.cache import guest_image

    return guest_image(ROOT / ".cache" / "guest-image")


@pytest.fixture
def slot(tmp_path: Path, image: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path)
    for name in ("worker.py", "in", "stdin_worker", "HostConfig.cfg"):
        shutil.copy(EXAMPLE / name, tmp_path / name)
    slot.write("guest.vdi", f"<soft_link>{image}</soft_link>\n")
    yield slot
    slot.clean()


def host_main() -> str:
    return (
        "<VMmanage_task><application>HostMain</application><command_line>./HostConfig.cfg</command_line>"
        "<stdout_filename>stdout_HostMain</stdout_filename><stderr_filename>stderr_HostMain</stderr_filename>"
        "</VMmanage_task>"
    )


def worker(number: int, seconds: float, more: str = "") -> str:
    return (
        "<task><virtualmachine>worker</virtualmachine><image>guest.vdi</image><memory_size_mb>256</memory_size_mb>"
        "<application>./worker.py</application><copy_app_to_VM>1</copy_app_to_VM><copy_file_to_VM>in</copy_file_to_VM>"
        f"<stdin_filename>stdin_worker</stdin_filename><stdout_filename>stdout_{number}</stdout_filename>"
        f"<stderr_filename>stderr_{number}</stderr_filename><copy_file_from_VM>out</copy_file_from_VM>"
        f"<command_line>{seconds}</command_line><fraction_done_filename>fraction_done</fraction_done_filename>"
        f"<minimum_checkpoint_interval>1</minimum_checkpoint_interval>{more}</task>"
    )


def shell(script: str, more: str = "") -> str:
    script = script.replace("&", "&amp;").replace("<", "&lt;")
    return (
        "<task><virtualmachine>worker</virtualmachine><image>guest.vdi</image><memory_size_mb>256</memory_size_mb>"
        "<application>sh</application><app_pathVM>/bin</app_pathVM>"
        f"<command_line>-c '{script}'</command_line>{more}</task>"
    )


def run(slot: TestSlot, limit_s: float = 200) -> int:
    return slot.run("job.xml", program=WRAPPER, limit_s=limit_s)


def story(slot: TestSlot) -> str:
    host_main = slot.folder / "stderr_HostMain"
    return slot.text("stderr.txt") + (host_main.read_text() if host_main.exists() else "")


def assert_clean(slot: TestSlot) -> None:
    slot.assert_nothing_runs(0.5)
    assert not (slot.folder / "vm").exists()
    assert not (slot.folder / "vmwrapper_processes.json").exists()


@pytest.mark.parametrize("suffix", ["", pytest.param("-activemq", marks=pytest.mark.broker)])
def test_the_example_of_the_page(slot: TestSlot, suffix: str) -> None:
    if suffix and shutil.which("java") is None:
        pytest.skip("ActiveMQ: packages activemq and default-jre-headless are not installed")
    shutil.copy(EXAMPLE / f"job{suffix}.xml", slot.folder / "job.xml")
    shutil.copy(EXAMPLE / f"HostConfig{suffix}.cfg", slot.folder / "HostConfig.cfg")
    if suffix:
        shutil.copytree(ROOT / "examples" / "activemq", slot.folder / "activemq")
    assert run(slot) == 0, story(slot)
    assert OUT in slot.text("out")
    assert slot.text("stdout_worker") == slot.text("stdin_worker").upper()
    assert slot.text("boinc_finish_called").startswith("0")
    text = slot.text("stderr.txt")
    for stage in ("broker ready", "VM booted", "agent there", "files in", "run", "files out", "done"):
        assert stage in text
    assert json.loads(slot.text("vmwrapper_checkpoint.json"))["cpu_time_s"] > 5
    assert_clean(slot)


def test_two_tasks_on_one_vm_through_quit_and_crash(slot: TestSlot) -> None:
    """TERM in the first task: saved, resumed. kill -9 of everything in the second: back to the newest snapshot.

    The job names no HostMain and has no HostConfig.cfg.
    """
    (slot.folder / "HostConfig.cfg").unlink()
    slot.job(
        shell("echo one >> trace; sleep 6; cp trace out1", "<copy_file_from_VM>out1</copy_file_from_VM>"),
        shell("echo two >> trace; sleep 6; cp trace out2", "<copy_file_from_VM>out2</copy_file_from_VM>"),
    )
    process = slot.start("job.xml", program=WRAPPER)
    slot.wait_for("stderr.txt", "running sh", limit_s=120)
    time.sleep(1)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM
    assert time.monotonic() - began < 15, story(slot)
    slot.assert_nothing_runs(0.2)

    process = slot.start("job.xml", program=WRAPPER)
    slot.wait_for("stderr.txt", "(attempt 1): running", limit_s=60)
    slot.wait_for("stderr.txt", "task 2 of 2", limit_s=60)
    slot.wait_for("stderr.txt", "_1_", limit_s=60)
    for left in slot.leftovers():  # as a power cut: nothing gets to save anything
        left.kill()
    process.wait(10)

    assert run(slot) == 0, story(slot)
    assert slot.text("out1") == "one\n"
    assert slot.text("out2") == "one\ntwo\n", "program and disk went back together"
    assert "back to snapshot vmwrapper_1" in slot.text("stderr.txt")
    assert "rollback: sh is started again, attempt 2" in slot.text("stderr.txt")
    assert_clean(slot)


def test_suspend_checkpoint_and_abort_by_the_client(slot: TestSlot) -> None:
    client = PlayedClient(slot)
    slot.job(host_main(), worker(1, 300))
    process = slot.start(program=WRAPPER)
    slot.wait_for("vmwrapper_checkpoint.json", '"sent"', limit_s=120)
    client.say("<suspend/>")
    slot.wait_for("stderr_HostMain", "Paused", limit_s=3)
    client.say("<resume/>")
    slot.wait_for("vmwrapper_checkpoint.json", '"vmwrapper_1"', limit_s=30)
    seen = [client.status() for _ in range(3)]
    cpu = [float(text.split("<current_cpu_time>")[1].split("<")[0]) for text in seen]
    assert 0 < cpu[0] < cpu[2], "the VM's CPU time"
    began = time.monotonic()
    client.say("<abort/>")
    assert process.wait(20) == 194
    assert time.monotonic() - began < 8
    assert_clean(slot)


@pytest.mark.parametrize(
    ("task", "status", "words"),
    [
        (shell("echo last words >&2; exit 3"), 195, ["exit status 3", "last words"]),
        (shell("echo x > other", "<copy_file_from_VM>out</copy_file_from_VM>"), 195, ["out is missing", "other"]),
        pytest.param(
            shell('exec python3 -c "x = bytes(1 << 26); y = [x + bytes(1) for _ in range(16)]"'),
            205,
            ["memory"],
            marks=pytest.mark.optin,  # 15 s to minutes: without swap the guest reads its programs again and again first
        ),
    ],
    ids=["exit status", "missing output", "out of memory"],
)
def test_failures_in_the_guest(slot: TestSlot, task: str, status: int, words: list[str]) -> None:
    slot.job(host_main(), task)
    assert run(slot) == status, story(slot)
    for word in words:
        assert word in slot.text("stderr.txt")
    assert slot.text("boinc_finish_called").splitlines()[0] == str(status)
    assert_clean(slot)
