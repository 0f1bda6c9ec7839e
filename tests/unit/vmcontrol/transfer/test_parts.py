"""Files that are being copied out of a guest, and what a killed HostMain leaves of them."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from vmcontrol.common.slotfiles import HOSTMAIN_LOCK
from vmcontrol.transfer.parts import DEPTH, PREFIX, part_of, sweep_parts


def left_of(target: Path) -> Path:
    """What a process that is killed now would leave."""
    with part_of(target) as (_, part):
        kept = shutil.copyfile(part, target.with_name("kept"))
    return kept.rename(part)


def test_a_part_is_beside_its_place_and_goes_with_a_copy_that_fails(tmp_path: Path) -> None:
    target = tmp_path / ("ü" * 127)
    with part_of(target) as (fd, part):
        os.write(fd, b"whole")
        part.rename(target)
    assert target.read_bytes() == b"whole"
    with pytest.raises(RuntimeError), part_of(target):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [target]


def test_a_new_copy_removes_what_a_killed_one_of_the_same_file_left(tmp_path: Path) -> None:
    stale, of_another = left_of(tmp_path / "out"), left_of(tmp_path / "other")
    with part_of(tmp_path / "out") as (_, first), part_of(tmp_path / "out") as (_, second):
        assert not stale.exists()
        assert first != second
        assert first.exists(), "one that is under way is not stale"
        assert of_another.exists(), "it may be another slot's"


def test_a_new_hostmain_removes_what_is_in_its_slot(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*"abcdefgh"[: DEPTH + 1])
    deep.mkdir(parents=True)
    stale = [left_of(tmp_path / "out"), left_of(deep.parent / "out")]
    for path in stale:
        os.utime(path, (1e9, 1e9))
    too_deep, young = left_of(deep / "out"), left_of(tmp_path / "young")
    (tmp_path / "out").write_text("whole")
    with part_of(tmp_path / "under way") as (_, part):
        os.utime(part, (1e9, 1e9))
        sweep_parts(tmp_path, time.time() - 3600)
        assert part.exists()
    assert not any(path.exists() for path in stale)
    assert too_deep.exists()
    assert young.exists()
    assert (tmp_path / "out").exists()
    assert young.name.startswith(PREFIX)


def test_the_slot_of_another_hostmain_is_its_own(tmp_path: Path) -> None:
    other = tmp_path / "slots" / "1"
    (other / "vm").mkdir(parents=True)
    (other / "vm" / HOSTMAIN_LOCK).touch()
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm" / HOSTMAIN_LOCK).touch()
    theirs, ours = left_of(other / "out"), left_of(tmp_path / "out")
    for path in (theirs, ours):
        os.utime(path, (1e9, 1e9))
    sweep_parts(tmp_path, time.time())
    assert theirs.exists()
    assert not ours.exists()
