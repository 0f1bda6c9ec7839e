"""One HostMain a slot."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import IO

import pytest

from vmcontrol import slotlock
from vmcontrol.filelock import lock
from vmcontrol.slotfiles import HOSTMAIN_LOCK
from vmcontrol.slotlock import SlotTaken, slot_lock


def test_a_slot_is_taken_until_its_hostmain_ends(tmp_path: Path) -> None:
    folder = tmp_path / "vm"
    with slot_lock(folder):
        assert folder.stat().st_mode & 0o777 == 0o700
        for _ in range(2):
            with pytest.raises(SlotTaken, match=str(tmp_path)), slot_lock(folder):
                pass
    assert not folder.exists(), "nothing is left of a slot without VMs"
    with slot_lock(folder):
        (folder / "one").mkdir()
    assert [path.name for path in folder.iterdir()] == ["one"]
    with slot_lock(folder):
        pass


def test_a_lock_that_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def and_removed(file: IO[str]) -> None:
        monkeypatch.setattr(slotlock, "lock", lock)
        (tmp_path / HOSTMAIN_LOCK).unlink()  # by the one that had it, which has just ended
        lock(file)

    monkeypatch.setattr(slotlock, "lock", and_removed)
    with slot_lock(tmp_path), pytest.raises(SlotTaken), slot_lock(tmp_path):
        pass


def test_where_there_are_no_locks_hostmain_runs_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(_file: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(slotlock, "lock", no_locks)
    with slot_lock(tmp_path):
        pass
