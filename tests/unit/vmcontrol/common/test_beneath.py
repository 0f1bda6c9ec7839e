"""Files below a folder: no link on the way is followed, not even one that is put there meanwhile."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vmcontrol.common import beneath
from vmcontrol.common.beneath import held_folder, make_folders, open_file, parts_below
from vmcontrol.transfer.parts import part_of, put_in_place

READ, APPEND = os.O_RDONLY, os.O_WRONLY | os.O_CREAT | os.O_APPEND


@pytest.fixture(params=["by folder", "by name"])
def slot(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A slot with links that lead to a folder beside it; by name: as on systems that open nothing by its folder."""
    if request.param == "by name":
        monkeypatch.setattr(beneath, "_BY_FOLDER", False)
    slot, outside = tmp_path / "slot", tmp_path / "outside"
    for folder in (slot, outside, slot / "real"):
        folder.mkdir()
    (outside / "secret").write_text("secret")
    (slot / "folder").symlink_to(outside)
    (slot / "file").symlink_to(outside / "secret")
    (slot / "new").symlink_to(outside / "new")
    (slot / "real" / "inner").symlink_to("../..")
    return slot


@pytest.mark.parametrize("name", ["file", "folder/secret", "real/inner/outside/secret", "real/../file"])
def test_nothing_is_read_through_a_link(slot: Path, name: str) -> None:
    with pytest.raises(OSError, match="link") as caught:
        open_file(slot / name, slot, READ)
    assert caught.value.errno == errno.ELOOP
    os.close(open_file(slot / "file", None, READ))


@pytest.mark.parametrize("name", ["file", "new", "folder/new", "real/inner/outside/new"])
def test_nothing_is_written_through_a_link(slot: Path, name: str) -> None:
    with pytest.raises(OSError, match="link"):
        open_file(slot / name, slot, APPEND)
    assert [path.name for path in (slot.parent / "outside").iterdir()] == ["secret"]
    assert (slot.parent / "outside" / "secret").read_text() == "secret"


@pytest.mark.parametrize("name", ["folder/a/b", "real/inner/a", "folder"])
def test_no_folder_is_made_through_a_link(slot: Path, name: str) -> None:
    with pytest.raises(OSError, match=r"link|exists"):
        make_folders(slot / name, slot)
    assert {path.name for path in slot.parent.iterdir()} == {"slot", "outside"}
    assert [path.name for path in (slot.parent / "outside").iterdir()] == ["secret"]


def test_folders_are_made_where_they_are_missing(slot: Path) -> None:
    for _ in range(2):
        make_folders(slot / "real" / "a" / "b", slot)
    assert (slot / "real" / "a" / "b").is_dir()
    make_folders(slot.parent / "elsewhere", slot)
    assert not (slot.parent / "elsewhere").exists(), "not ours to make"
    (slot / "a file").touch()
    with pytest.raises(OSError, match="a file"):
        make_folders(slot / "a file" / "b", slot)


def test_what_is_not_below_is_opened_as_it_is(slot: Path) -> None:
    outside = slot.parent / "outside"
    (slot.parent / "link").symlink_to(outside)
    fd = open_file(slot.parent / "link" / "secret", slot, READ)
    assert os.read(fd, 10) == b"secret"
    os.close(fd)
    assert parts_below(slot / ".." / "outside", slot) is None
    assert parts_below(slot / "a" / ".." / "b", slot) == ("b",)


def test_a_copy_replaces_a_link_in_its_place(slot: Path) -> None:
    with part_of(slot / "file", slot) as (fd, part):
        os.write(fd, b"from the guest")
        put_in_place(fd, part, slot / "file")
    assert not (slot / "file").is_symlink()
    assert (slot / "file").read_text() == "from the guest"
    assert (slot / "file").stat().st_mode & 0o777 == 0o644
    assert (slot.parent / "outside" / "secret").read_text() == "secret"


def test_a_folder_that_becomes_a_link_while_a_copy_is_under_way(slot: Path) -> None:
    if not beneath._BY_FOLDER:
        pytest.skip("this system opens files by their names only")
    with part_of(slot / "real" / "out", slot) as (fd, part):
        (slot / "real").rename(slot / "moved")
        (slot / "real").symlink_to(slot.parent / "outside")
        os.write(fd, b"from the guest")
        put_in_place(fd, part, slot / "real" / "out")
    assert (slot / "moved" / "out").read_text() == "from the guest"
    assert [path.name for path in (slot.parent / "outside").iterdir()] == ["secret"]


def test_two_copies_into_one_folder_leave_each_others_parts(slot: Path) -> None:
    with part_of(slot / "out", slot) as (_, first), part_of(slot / "out", slot) as (_, second):
        assert first.name != second.name
        assert (slot / first.name).exists()
    with held_folder(slot, slot) as held:
        assert held.is_dir()
    assert not list(slot.glob(".vmwrapper_part_*"))
