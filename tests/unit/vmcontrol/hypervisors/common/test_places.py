"""What is remembered of a VM's files holds in another place, and an image is known by what is in it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vmcontrol.hypervisors.common import diskimage, imageid, places
from vmcontrol.hypervisors.common.diskimage import BadImage
from vmcontrol.hypervisors.common.imageid import ImageCheck
from vmcontrol.hypervisors.qemu.command import Machine
from vmcontrol.hypervisors.qemu.files import VmFiles


@pytest.mark.parametrize(
    ("path", "slot", "remembered"),
    [
        ("/var/boinc/projects/p/i.vdi", "/var/boinc/slots/3", "../../projects/p/i.vdi"),
        ("/var/boinc/slots/3/guest_console.log", "/var/boinc/slots/3", "guest_console.log"),
        ("/home/u/job/i.vdi", "/home/u/job/slot", "../i.vdi"),
        ("/data/i.vdi", "/var/boinc/slots/3", "/data/i.vdi"),
        ("/tmp/i.vdi", "/tmp/slot", "../i.vdi"),
        ("/data/i.vdi", "/tmp/slot", "/data/i.vdi"),
        ("/data/i.vdi", "/slot", "/data/i.vdi"),
    ],
)
def test_what_moves_along_is_remembered_as_seen_from_the_slot(path: str, slot: str, remembered: str) -> None:
    assert places.remember(Path(path), Path(slot)) == remembered
    assert places.recall(remembered, Path(slot)) == Path(path)


def of_an_older_version(slot: Path, console: str) -> dict[str, object]:
    return {
        "format": 1,
        "name": "one",
        "image": str(slot.parent.parent / "projects/p/i.vdi"),
        "image_format": "vdi",
        "memory_mb": 32,
        "cpus": 1,
        "mac": "52:54:00:00:00:02",
        "agent_port": 4616,
        "secret_file": str(slot / "vmwrapper_secret"),
        "console_log": str(slot / console),
        "network": False,
    }


@pytest.mark.parametrize("console", ["guest_console.log", "vm/one/console.log"])
@pytest.mark.parametrize("moved", [False, True])
def test_absolute_paths_of_an_older_version_lead_into_the_slot_where_they_are_found(
    tmp_path: Path, console: str, moved: bool
) -> None:
    old, slot = tmp_path / "old" / "slots" / "0", tmp_path / ("new" if moved else "old") / "slots" / "0"
    files = VmFiles(slot / "vm" / "one")
    files.folder.mkdir(parents=True)
    files.definition_file.write_text(json.dumps(of_an_older_version(old, console)))
    definition = files.load()
    assert definition is not None
    machine = Machine.of(definition, files)
    assert machine.image == slot.parent.parent / "projects/p/i.vdi"
    assert machine.secret_file == slot / "vmwrapper_secret"
    assert places.recall(definition.console_log, files.slot) == slot / console
    files.store(definition)
    assert str(tmp_path) not in files.definition_file.read_text()
    again = files.load()
    assert again is not None
    assert (again.image, again.secret_file) == ("../../projects/p/i.vdi", "vmwrapper_secret")


def test_an_image_is_the_same_wherever_and_whenever(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    content = os.urandom(6 << 20)
    first.write_bytes(content)
    second.write_bytes(content)
    os.utime(second, (1, 1))
    identity = imageid.identify(first)
    assert imageid.identify(second) == identity
    assert ImageCheck("image").why_not(second, identity) == ""


@pytest.mark.parametrize("at", [0, 1 << 20, (6 << 20) - 1])
def test_another_content_of_the_same_size_and_time_is_another_image(tmp_path: Path, at: int) -> None:
    path = tmp_path / "i.vdi"
    content = bytearray(os.urandom(6 << 20))
    path.write_bytes(content)
    os.utime(path, (1, 1))
    check, identity = ImageCheck("image"), imageid.identify(path)
    content[at] ^= 1
    fresh = tmp_path / "fresh"
    fresh.write_bytes(content)
    os.utime(fresh, (1, 1))
    assert check.why_not(path, identity) == ""
    fresh.replace(path)
    assert "of the same size" in check.why_not(path, identity), "also for a check that has seen the older one"


@pytest.mark.parametrize("what", ["pipe", "folder", "missing", "dangling link"])
def test_what_is_no_image_is_said_without_waiting(tmp_path: Path, what: str) -> None:
    path = tmp_path / "i.vdi"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "dangling link":
        path.symlink_to("nowhere")
    assert "not to be had" in ImageCheck("image").why_not(path, "1:0")


@pytest.mark.parametrize(
    ("at", "changed", "good"),
    [(0, b"XXXX", False), (4, b"\0\0\0\2", False), (72, b"\0" * 7 + b"\4", False), (72, b"\0" * 7 + b"\2", False),
     (32, b"\0\0\0\1", False), (8, b"\0" * 6 + b"\1\0", True), (72, b"\0" * 7 + b"\1", True)],
)  # fmt: skip
def test_an_overlay_that_is_not_ours_any_more_is_refused(tmp_path: Path, at: int, changed: bytes, good: bool) -> None:
    """Magic, version, external data file, corrupt, encrypted; that it names a file below it is not believed anyway."""
    header = bytearray(b"QFI\xfb\0\0\0\3".ljust(112, b"\0"))
    header[at : at + len(changed)] = changed
    path = tmp_path / "disk.qcow2"
    path.write_bytes(header)
    if good:
        diskimage.check_overlay(path)
    else:
        with pytest.raises(BadImage):
            diskimage.check_overlay(path)
