"""Jobs whose image was shipped compressed, with the scripted HostMain: shared, damaged, no room, stopped, by hand."""

from __future__ import annotations

import functools
import lzma
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.vmwrapper.vm.test_worker_exactly_once import guest
from tests.support.limits import after
from tests.support.slots import HOST_MAIN_TASK, PlayedClient, TestSlot
from vmwrapper.vm import shipped_image

CONTENT = random.Random(1).randbytes(160_000)
LARGE = 160 << 20
"""Zeros: takes no time to make, and long enough to unpack that a message comes in the middle."""


@functools.cache
def compressed(content: bytes) -> bytes:
    return lzma.compress(content, preset=0)


class Computer:
    """A project's folder, and slots with the client's links into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.project = folder / "projects" / "here"
        self.project.mkdir(parents=True)
        self.slots: list[TestSlot] = []
        self.clients: list[PlayedClient] = []

    def ship(self, name: str = "guest_1.vdi.xz", content: bytes = CONTENT) -> Path:
        """A compressed image and its description."""
        plain = self.folder / "plain"
        plain.write_bytes(content)
        packed = self.project / name
        packed.write_bytes(compressed(content))
        description = replace(shipped_image.describe(plain), packed_size=packed.stat().st_size)
        (self.project / f"{name}.json").write_bytes(description.to_json())
        return packed

    def slot(self, image: str = "guest_1.vdi.xz", *, line: str = "make=out", client: bool = True) -> TestSlot:
        folder = self.folder / "slots" / str(len(self.slots))
        folder.mkdir(parents=True)
        slot = TestSlot(folder)
        self.slots.append(slot)
        slot.write("worker", "the application", executable=True)
        for name, physical in (("guest.vdi", image), ("guest.vdi.json", f"{image}.json")):
            slot.write(name, f"<soft_link>../../projects/here/{physical}</soft_link>\n")
        slot.write("HostConfig.cfg", "")
        slot.job(HOST_MAIN_TASK, guest(line, more="<copy_file_from_VM>out</copy_file_from_VM>"))
        if client:
            self.clients.append(PlayedClient(slot, result=f"result_{len(self.slots)}"))
        return slot

    def start(self, slot: TestSlot, *words: str) -> subprocess.Popen[bytes]:
        """As the client, which sends fd 2 into stderr.txt."""
        with (slot.folder / "stderr.txt").open("ab") as stderr:
            return slot.start(*words, stderr=stderr)

    def run(self, slot: TestSlot) -> int:
        return self.start(slot).wait(60)

    def unpacked(self) -> list[Path]:
        found = [path for path in self.project.glob(f"{shipped_image.PREFIX}*") if path.suffix != ".lock"]
        return sorted(found)


@pytest.fixture
def computer(tmp_path: Path) -> Iterator[Computer]:
    computer = Computer(tmp_path)
    yield computer
    for slot in computer.slots:
        slot.clean()


def test_two_slots_and_two_app_versions_share_one(computer: Computer) -> None:
    """Started at the same moment, each with a file of its own app version; both VMs are made from the same image."""
    computer.ship("guest_1.vdi.xz")
    computer.ship("guest_2.vdi.xz")
    slots = [computer.slot("guest_1.vdi.xz"), computer.slot("guest_2.vdi.xz")]
    for process in [computer.start(slot) for slot in slots]:
        assert process.wait(40) == 0
    (image,) = computer.unpacked()
    assert image.read_bytes() == CONTENT
    for slot in slots:
        assert str(image.resolve()) in slot.text("fake_calls.txt")
        assert sorted(path.name for path in slot.folder.glob("*image*")) == []
    computer.project.joinpath("guest_1.vdi.xz").unlink()  # the client deletes the files of the old app version
    again = computer.slot("guest_2.vdi.xz")
    assert computer.run(again) == 0
    assert computer.unpacked() == [image]
    computer.ship("guest_3.vdi.xz", CONTENT + b"newer")
    computer.project.joinpath("guest_2.vdi.xz").unlink()
    newer = computer.slot("guest_3.vdi.xz")
    assert computer.run(newer) == 0
    (left,) = computer.unpacked()
    assert left.read_bytes() == CONTENT + b"newer"
    assert f"removed {image.name}" in newer.text("stderr.txt")


@pytest.mark.parametrize("damage", ["bytes", "size", "description", "no description"])
def test_a_damaged_image_is_one_clear_error(computer: Computer, damage: str) -> None:
    packed = computer.ship()
    description = packed.with_name(f"{packed.name}.json")
    content = packed.read_bytes()
    if damage == "bytes":
        packed.write_bytes(content[:20_000] + bytes([content[20_000] ^ 1]) + content[20_001:])
    elif damage == "size":
        packed.write_bytes(content[:-30])
    elif damage == "description":
        description.write_text("{}")
    else:
        description.unlink()
    slot = computer.slot()
    assert computer.run(slot) == 206
    said = [line for line in slot.text("stderr.txt").splitlines() if "<image>" in line]
    assert len(said) == 1, slot.text("stderr.txt")
    assert ("guest_1.vdi.xz is damaged" in said[0]) == (damage in ("bytes", "size"))
    assert ("resetting the project" in said[0]) == (damage in ("bytes", "size"))
    assert slot.text("boinc_finish_called").startswith("206")
    assert computer.unpacked() == []
    slot.assert_nothing_runs()


def test_no_room_to_unpack_is_a_temporary_exit_and_leaves_nothing(computer: Computer) -> None:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "small", str(computer.project)], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here (root only): {done.stderr.decode().strip()}")
    try:
        computer.ship()
        slot = computer.slot()
        assert computer.run(slot) == 0
        delay, reason = slot.text("boinc_temporary_exit").splitlines()[:2]
        assert int(delay) == 600
        assert "needs 0 MB once unpacked" in reason, "160 KB"
        assert "free some space" in reason
        assert computer.unpacked() == []
        subprocess.run(["mount", "-o", "remount,size=1m", str(computer.project)], check=True)
        assert computer.run(slot) == 0
        assert slot.text("boinc_finish_called").startswith("0")
    finally:
        subprocess.run(["umount", "-l", str(computer.project)], check=True)


def wait_for_part(computer: Computer) -> None:
    end = after(20)
    while not list(computer.project.glob("*.part")):
        assert time.monotonic() < end, "nothing is being unpacked"
        time.sleep(0.005)


def test_a_quit_is_obeyed_while_unpacking_and_the_next_start_goes_on(computer: Computer) -> None:
    computer.ship(content=bytes(LARGE))
    slot = computer.slot()
    process = computer.start(slot)
    wait_for_part(computer)
    began = time.monotonic()
    computer.clients[0].say("<quit/>")
    assert process.wait(20) == 0
    print(f"quit after {time.monotonic() - began:.2f} s")
    assert not (slot.folder / "boinc_finish_called").exists()
    assert computer.unpacked() == []
    assert computer.run(slot) == 0
    assert slot.text("boinc_finish_called").startswith("0")


def test_suspended_while_unpacking_it_stands(computer: Computer) -> None:
    computer.ship(content=bytes(LARGE))
    slot = computer.slot()
    process = computer.start(slot)
    wait_for_part(computer)
    computer.clients[0].say("<suspend/>")
    slot.wait_for("stderr.txt", "suspended by the client")
    assert [path.suffix for path in computer.unpacked()] == [".part"]
    assert process.poll() is None
    computer.clients[0].say("<resume/>")
    assert process.wait(60) == 0
    assert slot.text("boinc_finish_called").startswith("0")


def test_killed_while_unpacking_the_next_start_begins_again(computer: Computer) -> None:
    computer.ship(content=bytes(LARGE))
    slot = computer.slot()
    process = computer.start(slot)
    wait_for_part(computer)
    process.kill()
    process.wait()
    assert computer.run(slot) == 0
    assert [path.suffix for path in computer.unpacked()] == [""]


def test_by_hand(computer: Computer) -> None:
    """The compressed image lies in the slot; what is made of it lies there too, and is no output of the job."""
    packed = computer.ship()
    slot = computer.slot(client=False)
    packed.replace(slot.folder / "guest.vdi")
    packed.with_name(f"{packed.name}.json").replace(slot.folder / "guest.vdi.json")
    slot.job(
        HOST_MAIN_TASK,
        guest("make=out", more="<copy_file_from_VM>out</copy_file_from_VM>"),
        "<zip_output><zipfilename>all.zip</zipfilename><filename>.</filename></zip_output>",
    )
    assert slot.run("job.xml") == 0
    (image,) = (path for path in slot.folder.glob("vmwrapper_image_*") if path.suffix != ".lock")
    assert image.read_bytes() == CONTENT
    listing = subprocess.run(["python3", "-m", "zipfile", "-l", "all.zip"], cwd=slot.folder, capture_output=True)
    assert b"out" in listing.stdout
    assert b"vmwrapper_image" not in listing.stdout


def test_a_folder_that_cannot_be_written(computer: Computer) -> None:
    """Unpacked into the slot then."""
    computer.ship()
    slot = computer.slot()
    mounted = subprocess.run(["mount", "--bind", str(computer.project), str(computer.project)], capture_output=True)
    if mounted.returncode:
        pytest.skip("nothing can be mounted here (root only)")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(computer.project)], check=True)
        assert computer.run(slot) == 0, slot.text("stderr.txt")
        assert len(list(slot.folder.glob("vmwrapper_image_*"))) == 2, "image and lock"
    finally:
        subprocess.run(["umount", "-l", str(computer.project)], check=True)


def test_a_place_that_another_version_uses_is_left_to_it(computer: Computer) -> None:
    packed = computer.ship()
    description = shipped_image.read(packed.with_name(f"{packed.name}.json"), "description")
    lock = computer.project / f"{description.name}.lock"
    lock.write_bytes(b"vmwrapper-format 2\n")
    slot = computer.slot()
    assert computer.run(slot) == 0
    assert lock.read_bytes() == b"vmwrapper-format 2\n"
    assert computer.unpacked() == []
    assert (slot.folder / description.name).read_bytes() == CONTENT
    assert "is of another version of vmwrapper: the image is unpacked for this task alone" in slot.text("stderr.txt")
