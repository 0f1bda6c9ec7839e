"""One HostMain a slot."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vmcontrol.common.filelock import open_lock_file, try_lock
from vmcontrol.common.slotfiles import HOSTMAIN_LOCK
from vmcontrol.hostmain import slotlock
from vmcontrol.hostmain.slotlock import SlotTaken, slot_lock


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
    def and_removed(fd: int) -> bool:
        monkeypatch.setattr(slotlock, "try_lock", try_lock)
        (tmp_path / HOSTMAIN_LOCK).unlink()  # by the one that had it, which has just ended
        return try_lock(fd)

    monkeypatch.setattr(slotlock, "try_lock", and_removed)
    with slot_lock(tmp_path), pytest.raises(SlotTaken), slot_lock(tmp_path):
        pass


def test_where_there_are_no_locks_hostmain_runs_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(_fd: int) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(slotlock, "try_lock", no_locks)
    with slot_lock(tmp_path):
        pass


@pytest.mark.parametrize("mode", [0o600, 0o660])
def test_nobody_else_can_open_and_so_lock_a_lock_file(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "lock"
    before = os.umask(0)
    try:
        os.close(open_lock_file(path, mode=mode))
        assert path.stat().st_mode & 0o777 == mode
        path.chmod(0o666)  # as an older version left it
        os.close(open_lock_file(path, mode=mode))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_a_link_is_no_lock_file(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        open_lock_file(tmp_path / "lock")
    assert not (tmp_path / "elsewhere").exists()


def test_the_locks_of_slot_and_client_are_closed_to_others(tmp_path: Path) -> None:
    from vmwrapper.boinc.lockfile import SlotLock

    before = os.umask(0)
    try:
        slot = SlotLock(tmp_path)
        slot.acquire()
        with slot_lock(tmp_path / "vm"):
            modes = {path.name: path.stat().st_mode & 0o007 for path in tmp_path.rglob("*")}
        slot.release()
    finally:
        os.umask(before)
    assert modes == {"boinc_lockfile": 0, "vm": 0, HOSTMAIN_LOCK: 0}
