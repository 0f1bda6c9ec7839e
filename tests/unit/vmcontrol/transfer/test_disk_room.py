"""A file of a guest is copied when there is room for what it announces, and not a byte before."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vmcontrol.api.faults import to_fault
from vmcontrol.transfer.diskroom import MARGIN, SMALL, DiskRoom
from vmcontrol.transfer.interface import FileUnusable, TransferFailed

FREE = 10**9


@pytest.fixture(autouse=True)
def disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2 * FREE, FREE, FREE))


def test_what_the_disk_cannot_hold_is_the_computers_trouble(tmp_path: Path) -> None:
    room = DiskRoom(tmp_path)
    room.check(FREE - MARGIN, "out", tmp_path / "out")
    for size in (FREE, 2**60):
        with pytest.raises(OSError, match=f"{size} bytes are to be copied, {FREE} are free") as caught:
            room.check(size, "out", tmp_path / "out")
        assert caught.value.errno == errno.ENOSPC
    room.claim(FREE // 2)
    with pytest.raises(OSError, match="free"):
        room.check(FREE // 2, "second", tmp_path / "second")
    room.release(FREE // 2)
    room.check(FREE // 2, "second", tmp_path / "second")


def test_what_the_jobs_bound_does_not_allow_is_the_programs(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "there").write_bytes(b"x" * 2_000_000)
    room = DiskRoom(tmp_path, 10_000_000)
    room.check(7_000_000, "out", tmp_path / "out")
    with pytest.raises(FileUnusable, match=r"has 9000000 bytes, .* 10000000 bytes \(rsc_disk_bound\), .* leaves 7\d+"):
        room.check(9_000_000, "out", tmp_path / "out")
    room.check(SMALL, "small", tmp_path / "small")
    DiskRoom(tmp_path).check(9_000_000, "out", tmp_path / "out")


def test_a_copy_that_failed_for_this_computers_disk_is_its_trouble(tmp_path: Path) -> None:
    error: Any = TransferFailed("x")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "out")
    fault = to_fault(error)
    assert fault.faultCode == 1
    assert json.loads(fault.faultString)["key"] == "disk-full"
    error.__cause__ = OSError(errno.EISDIR, "Is a directory")
    assert to_fault(error).faultCode == -1
