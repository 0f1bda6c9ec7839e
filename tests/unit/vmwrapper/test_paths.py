"""Looks at files that never raise, and folders that are made in the slot and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmwrapper import paths


def test_what_can_be_no_file_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("n" * 300, "file/below", "none", "a\0b", "loop", "x/" * 3000):
        for look in (paths.is_file, paths.is_folder, paths.is_there):
            assert not look(tmp_path / name), (name, look)
    assert paths.is_file(tmp_path / "file")
    assert paths.is_folder(tmp_path)
    assert paths.is_there(tmp_path)
    assert not paths.is_file(tmp_path)


def test_a_folder_that_may_not_be_entered_has_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_path: Path, **_more: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", forbidden)
    assert not paths.is_file(tmp_path / "file")


def test_an_input_that_may_not_be_read_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").touch(mode=0)
    monkeypatch.setattr(os, "access", lambda _path, mode: mode != os.R_OK)  # to root everything may be read
    assert paths.fault_of_input(tmp_path / "in", tmp_path) == "may not be read"


def test_a_missing_input_is_told_with_what_is_there(tmp_path: Path) -> None:
    assert paths.fault_of_input(tmp_path / "in", tmp_path) == "is not in the slot; there is: nothing"
    for number in range(50):
        (tmp_path / f"{number:02}").touch()
    told = paths.fault_of_input(tmp_path / "in", tmp_path)
    assert told.startswith("is not in the slot; there is: 00, 01, ")
    assert told.endswith(", 39 and 10 more")
    (tmp_path / "in").mkdir()
    assert paths.fault_of_input(tmp_path / "in", tmp_path) == "is no file"
    assert paths.fault_of_input(tmp_path / "00", tmp_path) == ""


def test_folders_are_made_down_to_the_file(tmp_path: Path) -> None:
    paths.make_folder_for(tmp_path / "a" / "b" / "out", tmp_path)
    paths.make_folder_for(tmp_path / "a" / "b" / "out", tmp_path)
    assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a" / "b" / "out").exists()


def test_no_folder_is_made_outside_of_the_slot(tmp_path: Path) -> None:
    slot, elsewhere = tmp_path / "slot", tmp_path / "elsewhere"
    slot.mkdir()
    elsewhere.mkdir()
    (slot / "link").symlink_to(elsewhere)
    for out in (slot / ".." / "new" / "out", elsewhere / "new" / "out"):
        paths.make_folder_for(out, slot)
    with pytest.raises(OSError, match="link"):
        paths.make_folder_for(slot / "link" / "new" / "out", slot)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "link", "slot"]


def test_a_file_in_the_place_of_a_folder_is_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="taken"):
        paths.make_folder_for(tmp_path / "taken" / "out", tmp_path)
