"""What is wrong with the computer: right status, reason and delay, nothing left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.vmwrapper.vm.test_worker_exactly_once import guest
from tests.support.client_vm import HOST_CONFIG, TICKER, task
from tests.support.slots import HOST_MAIN_TASK, PlayedClient, TestSlot

WRAPPER = [sys.executable, "-m", "vmwrapper"]
HAVE_QEMU = shutil.which("qemu-system-x86_64") is not None
needs_qemu = pytest.mark.skipif(not HAVE_QEMU, reason="package qemu-system-x86 is not installed")


def lay_out(folder: Path) -> TestSlot:
    slot = TestSlot(folder)
    slot.write("HostConfig.cfg", HOST_CONFIG.decode())
    slot.write("ticker.py", TICKER.decode(), executable=True)
    slot.write("worker", "the application", executable=True)
    return slot


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    slot = lay_out(tmp_path)
    yield slot
    slot.clean()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a MiB; what is beyond it does not fit."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "small", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here (root only): {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            return


def story_fits_a_screen(text: str) -> None:
    assert len(text.splitlines()) < 25, text


def qemu_image(folder: Path) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "vdi", str(folder / "guest.vdi"), "8M"], check=True)


def test_a_disk_that_fills_up_is_a_temporary_exit_with_its_file(small_disk: Path) -> None:
    slot = lay_out(small_disk)
    client = PlayedClient(slot)
    slot.write("guest.vdi", "an image")
    slot.job(HOST_MAIN_TASK, guest("sleep=1 make=out", more="<copy_file_from_VM>out</copy_file_from_VM>"))
    try:
        process = slot.start()
        slot.wait_for("fake_runs.txt", "_0_")
        fill(small_disk)
        assert process.wait(30) == 0
        lines = slot.text("boinc_temporary_exit").splitlines()
        assert int(lines[0]) in (300, 600)
        assert "space" in lines[1], lines
        assert not (small_disk / "boinc_finish_called").exists()
        (small_disk / "filler").unlink()
        process = slot.start()
        assert process.wait(30) == 0
        assert slot.text("boinc_finish_called").startswith("0")
        assert "made by" in slot.text("out")
        assert not (small_disk / "vmwrapper_reserve").exists()
    finally:
        del client
        slot.clean()


def test_tries_are_counted_on_a_disk_that_stays_full(small_disk: Path) -> None:
    slot = lay_out(small_disk)
    client = PlayedClient(slot)
    slot.write("fill", "test -e once || { touch once; kill -9 $PPID; sleep 60; }\ncat /dev/zero > filler\ntrue\n")
    slot.job("<task><application>sh</application><command_line>fill</command_line></task>")
    try:
        assert slot.run(program=WRAPPER) == -9
        for _ in range(5):
            assert slot.run(program=WRAPPER) == 0
            assert "space" in slot.text("boinc_temporary_exit")
            assert not (small_disk / "boinc_finish_called").exists()
        assert slot.run(program=WRAPPER) == 208
        assert slot.text("boinc_finish_called").startswith("208")
    finally:
        del client
        slot.clean()


def test_lines_that_a_full_disk_does_not_take_are_just_lost(small_disk: Path) -> None:
    slot = lay_out(small_disk)
    slot.job("<task><application>true</application></task>")
    fill(small_disk)
    try:
        process = slot.start("job.xml", program=WRAPPER, stderr=subprocess.PIPE)
        said = process.communicate(timeout=30)[1].decode()
        assert process.returncode == 75
        assert "free some space" in said
        assert "Traceback" not in said, said
        assert "Logging error" not in said
    finally:
        slot.clean()


def test_a_slot_that_cannot_be_written_fails_with_boincs_number(small_disk: Path) -> None:
    slot = lay_out(small_disk)
    slot.write("init_data.xml", f"<app_init_data><client_pid>{os.getpid()}</client_pid></app_init_data>")
    slot.write("guest.vdi", "an image")
    slot.job(HOST_MAIN_TASK, guest("make=out"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        assert slot.run() == 192
    finally:
        slot.clean()


@needs_qemu
def test_no_memory_for_the_vm(slot: TestSlot) -> None:
    qemu_image(slot.folder)
    slot.job(HOST_MAIN_TASK, task(1, memory_mb=900_000))
    assert slot.run("job.xml", program=WRAPPER, limit_s=60) == 75
    text = slot.text("stderr.txt")
    assert "not enough free memory" in text
    assert "try again in 300 s" in text
    story_fits_a_screen(text)
    slot.assert_nothing_runs()


def only_python(folder: Path) -> str:
    """A PATH without any hypervisor."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "python3").symlink_to(sys.executable)
    return str(programs)


@needs_qemu
def test_an_image_that_is_none(slot: TestSlot) -> None:
    slot.write("guest.vdi", "no disk at all\n" * 100)
    slot.job(HOST_MAIN_TASK, task(1))
    assert slot.run("job.xml", program=WRAPPER, limit_s=60) == 206
    text = slot.text("stderr.txt")
    assert "guest.vdi cannot be used: it is neither VDI nor qcow2" in text
    story_fits_a_screen(text)
    slot.assert_nothing_runs()


@needs_qemu
def test_no_hypervisor(slot: TestSlot, tmp_path: Path) -> None:
    qemu_image(slot.folder)
    slot.job(HOST_MAIN_TASK, task(1))
    assert slot.run("job.xml", program=WRAPPER, limit_s=60, PATH=only_python(tmp_path)) == 208
    text = slot.text("stderr.txt")
    assert "QEMU is not installed" in text
    assert "apt install" in text
    story_fits_a_screen(text)
    slot.assert_nothing_runs()


@needs_qemu
def test_a_broken_hypervisor(slot: TestSlot, tmp_path: Path) -> None:
    qemu_image(slot.folder)
    path = only_python(tmp_path)
    broken = Path(path) / "qemu-system-x86_64"
    broken.write_text("#!/bin/sh\necho 'error while loading shared libraries: libpixman-1.so.0' >&2\nexit 127\n")
    broken.chmod(0o755)
    (Path(path) / "qemu-img").symlink_to(shutil.which("qemu-img") or "")
    (Path(path) / "sh").symlink_to("/bin/sh")
    slot.job(HOST_MAIN_TASK, task(1))
    status = slot.run("job.xml", program=WRAPPER, limit_s=60, PATH=path)
    text = slot.text("stderr.txt")
    assert status == 75, text
    assert "libpixman" in text
    assert "Internal error" not in text
    story_fits_a_screen(text)
    slot.assert_nothing_runs()
    assert os.environ["PATH"] != path
