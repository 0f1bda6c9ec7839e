"""Who uses a VM that was there before: a lock and a note, and what else may be in their place."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vmcontrol.hypervisors.interface import HostProblem
from vmcontrol.hypervisors.virtualbox.existing import LockedExisting
from vmcontrol.protocol.vm import VmState

UUID = "8fca9567-3e5d-443f-9984-c22bbf15b244"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VBOX_USER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def slot(folder: Path, name: str) -> LockedExisting:
    return LockedExisting(folder / name / "vm", UUID)


def taken(existing: LockedExisting) -> bool:
    try:
        existing.take("CernVM", VmState.SAVED)
    except HostProblem as problem:
        return problem.key != "vm-in-use"
    return True


def test_one_slot_at_a_time_also_when_its_task_is_stopped(home: Path, tmp_path: Path) -> None:
    one, two = slot(tmp_path, "one"), slot(tmp_path, "two")
    assert taken(one)
    assert not taken(two)
    one.close()
    assert not taken(two), "its note is there: it goes on later"
    again = slot(tmp_path, "one")
    assert taken(again)
    note = tmp_path / "one" / "vm" / f".existing-{UUID}.json"
    assert json.loads(note.read_text())["format"] == 1
    assert note.stat().st_mode & 0o077 == 0
    note.unlink()
    assert not taken(two), "locked"
    again.close()
    assert taken(two)


def test_a_slot_that_was_moved_uses_it_still_and_a_copy_waits(home: Path, tmp_path: Path) -> None:
    assert taken(slot(tmp_path, "one"))
    (tmp_path / "one").rename(tmp_path / "moved")
    moved = slot(tmp_path, "moved")
    assert moved.found() is VmState.SAVED
    assert taken(moved)


def test_a_version_that_knows_no_formats_finds_the_path_of_the_note_and_nothing_else(
    home: Path, tmp_path: Path
) -> None:
    one = slot(tmp_path, "one")
    assert taken(one)
    one.close()
    user = (home / f"vmwrapper-{UUID}.lock").read_text().strip()  # as it reads it
    assert Path(user).exists()
    other = tmp_path / "two" / "vm" / f".existing-{UUID}.json"
    other.parent.mkdir(parents=True)
    other.write_text(json.dumps({"name": "CernVM", "found": "Saved"}))  # as it writes them
    (home / f"vmwrapper-{UUID}.lock").write_text(f"{other}\n")
    assert not taken(slot(tmp_path, "one"))
    two = slot(tmp_path, "two")
    assert two.found() is VmState.SAVED
    assert taken(two)


def test_what_a_later_version_wrote_is_left_alone(home: Path, tmp_path: Path) -> None:
    lock = home / f"vmwrapper-{UUID}.lock"
    home.mkdir()
    lock.write_bytes(b"vmwrapper-format 2\nwhat we do not know")
    assert not taken(slot(tmp_path, "one"))
    assert lock.read_bytes() == b"vmwrapper-format 2\nwhat we do not know"


@pytest.mark.parametrize(
    "content", [b"/", b"\xff\xfe\0", b"/" + b"x" * 5000, b"x" * 100_000, b"{}", b"[" * 60_000, b"relative"]
)
def test_a_lock_file_that_says_nothing_is_begun_anew(home: Path, tmp_path: Path, content: bytes) -> None:
    home.mkdir()
    (home / f"vmwrapper-{UUID}.lock").write_bytes(content)
    assert taken(slot(tmp_path, "one"))
    assert not taken(slot(tmp_path, "two"))


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "dangling link"])
def test_what_is_no_file_keeps_nobody_from_working(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    home.mkdir()
    path, other = home / f"vmwrapper-{UUID}.lock", tmp_path / "other"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(other)
    if kind == "link":
        other.write_text("somebody's")
    assert taken(slot(tmp_path, "one"))
    assert "is no file" in caplog.text
    assert kind != "link" or other.read_text() == "somebody's"


@pytest.mark.parametrize("content", ["", "[]", "1", '{"found": "Sleeping"}', "[" * 90_000, '{"found": ["Saved"]}'])
def test_a_note_that_says_nothing_is_of_a_vm_that_was_off(home: Path, tmp_path: Path, content: str) -> None:
    one = slot(tmp_path, "one")
    assert taken(one)
    (tmp_path / "one" / "vm" / f".existing-{UUID}.json").write_text(content)
    assert one.found() is VmState.POWERED_OFF
