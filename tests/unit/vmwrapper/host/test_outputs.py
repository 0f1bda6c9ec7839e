"""vmwrapper.host.outputs: which files are synced before a checkpoint counts on them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vmwrapper.host import outputs
from vmwrapper.host.outputs import Outputs


def test_what_a_task_has_written_is_found_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slot, project = tmp_path / "slot", tmp_path / "project"
    (slot / "sub").mkdir(parents=True)
    project.mkdir()
    old = time.time_ns() - 10**12
    for name in ("old", "out", "sub/deep", "vmwrapper_checkpoint.json"):
        (slot / name).write_text("x")
    os.utime(slot / "old", ns=(old, old))
    (slot / "linked").write_text("<soft_link>../project/linked_7</soft_link>")
    os.utime(slot / "linked", ns=(old, old))
    (project / "linked_7").write_text("x")
    (slot / "symbolic").symlink_to(project / "other")
    (project / "other").write_text("x")
    os.mkfifo(slot / "pipe")
    chosen = Outputs(slot)
    found = chosen.changed(time.time_ns())
    assert found is not None
    assert sorted(str(path.relative_to(tmp_path)) for path in found) == [
        "project/linked_7", "project/other", "slot/out", "slot/sub/deep",
    ]  # fmt: skip
    synced: list[str] = []

    def fsync(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink().name)

    monkeypatch.setattr(os, "fsync", fsync)
    chosen.sync(time.time_ns())
    assert sorted(synced) == ["deep", "linked_7", "other", "out", "project", "sub"]


def test_a_large_slot_is_not_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        (tmp_path / str(number)).touch()
    monkeypatch.setattr(outputs, "MAX_ENTRIES", 4)
    called: list[bool] = []
    monkeypatch.setattr(os, "sync", lambda: called.append(True))
    Outputs(tmp_path).sync(time.time_ns())
    assert called == [True]
