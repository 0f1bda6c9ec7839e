"""The slot's checkpoint: read strictly, written so that a crash at any point leaves a usable one."""

from __future__ import annotations

import errno
import json
import os
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcontrol.common.jsonfile import Damaged
from vmcontrol.common.slotfiles import CHECKPOINT, PREVIOUS_CHECKPOINT
from vmwrapper.slot import Slot
from vmwrapper.state.checkpoint import (
    Checkpoint,
    CheckpointStore,
    GuestProgress,
    Phase,
    SnapshotRecord,
    VmRecord,
    from_bytes,
    to_bytes,
)

DIGEST = "ab" * 32
SECONDS = st.floats(0, 1e9, allow_nan=False)
TEXT = st.text(max_size=20)
PROGRESS = st.builds(GuestProgress, st.just(3), st.text(min_size=1), st.integers(1, 9), st.sampled_from(Phase))
SNAPSHOTS = st.builds(
    SnapshotRecord, st.text(min_size=1), st.booleans(), st.just(3), st.none() | PROGRESS, SECONDS, SECONDS
)
VMS = st.builds(
    VmRecord,
    TEXT,
    st.text(min_size=1, max_size=20),
    st.booleans(),
    st.lists(SNAPSHOTS, max_size=2).map(tuple),
    st.booleans(),
    st.booleans(),
)
COUNTS = st.dictionaries(TEXT, st.integers(0, 9), max_size=3)


@st.composite
def checkpoints(draw: st.DrawFn) -> Checkpoint:
    done = draw(st.integers(0, 100))
    current = draw(
        st.none()
        | st.builds(GuestProgress, st.just(done), st.text(min_size=1), st.integers(1, 9), st.sampled_from(Phase))
    )
    return Checkpoint(
        job_digest=draw(st.text("0123456789abcdef", min_size=64, max_size=64)),
        result=draw(TEXT),
        unzip_done=draw(st.integers(0, 100)),
        tasks_done=done,
        cpu_time_s=draw(SECONDS),
        elapsed_s=draw(SECONDS),
        task_elapsed_s=draw(SECONDS),
        fraction_done=draw(st.floats(0, 1)),
        snapshots_made=draw(st.integers(0, 1000)),
        current=current,
        vms=tuple(draw(st.lists(VMS, max_size=3))),
        temporary_exits=draw(COUNTS),
        attempts=draw(COUNTS),
        rollbacks=draw(st.integers(0, 9)),
        rolled_back_to=draw(st.integers(0, 9)),
        left_running=tuple(sorted(draw(st.sets(st.integers(0, done - 1), max_size=3)))) if done else (),
    )


@given(checkpoints())
def test_what_is_written_is_read(checkpoint: Checkpoint) -> None:
    assert from_bytes(to_bytes(checkpoint)) == checkpoint


@given(checkpoints(), st.data())
def test_a_cut_file_is_damaged(checkpoint: Checkpoint, data: st.DataObject) -> None:
    content = to_bytes(checkpoint).rstrip()
    with pytest.raises(Damaged):
        from_bytes(content[: data.draw(st.integers(0, len(content) - 1))])


@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_nothing_else(content: bytes) -> None:
    with pytest.raises(Damaged):
        from_bytes(content)


@given(checkpoints(), st.data())
def test_a_field_of_another_type_is_damaged(checkpoint: Checkpoint, data: st.DataObject) -> None:
    value = json.loads(to_bytes(checkpoint))
    name = data.draw(st.sampled_from(sorted(value)))
    wrong = data.draw(st.sampled_from([None, "x", -1, 1.5, True, [], [1], {}, {"a": "b"}, float("nan")]))
    same_kind = (
        type(wrong) is type(value[name])
        or (name.endswith("_s") and wrong == 1.5)
        or (name == "current" and wrong is None)
    )
    if not same_kind:
        value[name] = wrong
        with pytest.raises(Damaged):
            from_bytes(json.dumps(value).encode())


@given(checkpoints(), st.text(string.ascii_lowercase, min_size=1))
def test_an_unknown_or_missing_field_is_damaged(checkpoint: Checkpoint, name: str) -> None:
    value = json.loads(to_bytes(checkpoint))
    with pytest.raises(Damaged):
        from_bytes(json.dumps({**value, f"x{name}": 1}).encode())
    needed = sorted(value.keys() - {"left_running"})
    value.pop(needed[len(name) % len(needed)])
    with pytest.raises(Damaged):
        from_bytes(json.dumps(value).encode())


def test_a_checkpoint_in_which_nothing_is_left_running_is_read_by_older_versions() -> None:
    done = Checkpoint("0" * 64, tasks_done=2)
    assert "left_running" not in json.loads(to_bytes(done))
    assert from_bytes(to_bytes(replace(done, left_running=(1,)))).left_running == (1,)
    for wrong in ([2], [1, 0], [0, 0], [True], "1"):
        with pytest.raises(Damaged):
            from_bytes(json.dumps({**json.loads(to_bytes(done)), "left_running": wrong}).encode())


def test_a_job_that_an_older_version_left_goes_on() -> None:
    """What vmwrapper wrote before a VM's snapshots had entries of their own."""
    old = {
        "version": 1, "job_digest": DIGEST, "result": "r", "inputs_unzipped": True, "unzip_done": 1, "tasks_done": 2,
        "outputs_zipped": False, "cpu_time_s": 7.5, "elapsed_s": 9.0, "task_elapsed_s": 3.0, "fraction_done": 0.5,
        "snapshots_made": 4, "temporary_exits": {"disk": 1},
        "current": {"task": 2, "command_id": "id", "attempt": 3, "phase": "sent"},
        "vms": [
            {"virtualmachine": "a", "name": "vmwrapper_a", "ours": True, "snapshot": "vmwrapper_4",
             "saved_state_expected": True},
            {"virtualmachine": "b", "name": "vmwrapper_b", "ours": True, "snapshot": "", "saved_state_expected": False},
        ],
    }  # fmt: skip
    current = GuestProgress(2, "id", 3, Phase.SENT)
    snapshot = SnapshotRecord("vmwrapper_4", True, 2, current, 7.5, 3.0)
    a, b = VmRecord("a", "vmwrapper_a", True, (snapshot,), True), VmRecord("b", "vmwrapper_b")
    read = from_bytes(json.dumps(old).encode())
    assert read == Checkpoint(
        DIGEST, "r", True, 1, 2, False, 7.5, 9.0, 3.0, 0.5, 4, current, (a, b), {"disk": 1}, attempts={"2": 3}
    )
    assert from_bytes(to_bytes(read)) == read


def test_another_version_is_reported() -> None:
    value = {**json.loads(to_bytes(Checkpoint(DIGEST))), "version": 3}
    with pytest.raises(Damaged, match="version 3"):
        from_bytes(json.dumps(value).encode())


def store_with(tmp_path: Path, *generations: Checkpoint) -> CheckpointStore:
    store = CheckpointStore(Slot(tmp_path))
    for checkpoint in generations:
        store.save(checkpoint)
    return CheckpointStore(Slot(tmp_path))


FIRST, SECOND = Checkpoint(DIGEST, "r", tasks_done=1), Checkpoint(DIGEST, "r", tasks_done=2)


def test_an_empty_slot_begins_at_the_beginning(tmp_path: Path) -> None:
    loaded = CheckpointStore(Slot(tmp_path)).load(DIGEST, "r")
    assert loaded.checkpoint is None
    assert loaded.complaints == ()


def test_the_newest_is_used(tmp_path: Path) -> None:
    loaded = store_with(tmp_path, FIRST, SECOND).load(DIGEST, "r")
    assert loaded.checkpoint == SECOND
    assert loaded.complaints == ()


def test_a_damaged_one_is_reported_and_the_older_used_and_kept(tmp_path: Path) -> None:
    store = store_with(tmp_path, FIRST, SECOND)
    (tmp_path / CHECKPOINT).write_bytes(b"{")
    loaded = store.load(DIGEST, "r")
    assert loaded.checkpoint == FIRST
    assert any("damaged" in line for line in loaded.complaints)
    store.save(SECOND)
    assert from_bytes((tmp_path / PREVIOUS_CHECKPOINT).read_bytes()) == FIRST, "not overwritten by the damaged one"
    assert CheckpointStore(Slot(tmp_path)).load(DIGEST, "r").checkpoint == SECOND


def as_a_folder(path: Path) -> None:
    path.mkdir()
    (path / "something").write_text("in it")


def as_a_loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize("what", [as_a_folder, as_a_loop, os.mkfifo])
@pytest.mark.parametrize("name", [CHECKPOINT, PREVIOUS_CHECKPOINT])
def test_what_is_no_file_is_damaged_and_the_next_one_takes_its_place(
    tmp_path: Path, what: Callable[[Path], None], name: str
) -> None:
    store_with(tmp_path, FIRST, FIRST)
    (tmp_path / name).unlink()
    what(tmp_path / name)
    store = CheckpointStore(Slot(tmp_path))
    assert store.load(DIGEST, "r").checkpoint == FIRST
    for _ in range(2):
        store.save(SECOND)
    assert CheckpointStore(Slot(tmp_path)).load(DIGEST, "r").checkpoint == SECOND
    (tmp_path / CHECKPOINT).unlink()
    assert CheckpointStore(Slot(tmp_path)).load(DIGEST, "r").checkpoint == SECOND


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ENOMEM])
def test_only_what_will_never_be_read_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    store = store_with(tmp_path, FIRST, SECOND)
    open_file = os.open

    def opens(path: Any, *arguments: Any, **named: Any) -> int:
        if Path(path).name == CHECKPOINT:
            raise OSError(number, os.strerror(number))
        return open_file(path, *arguments, **named)

    monkeypatch.setattr(os, "open", opens)
    if number == errno.EIO:
        loaded = store.load(DIGEST, "r")
        assert loaded.checkpoint == FIRST
        assert "cannot be read" in loaded.complaints[0]
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            store.load(DIGEST, "r")


def test_both_damaged_begins_at_the_beginning(tmp_path: Path) -> None:
    store = store_with(tmp_path, FIRST, SECOND)
    for name in (CHECKPOINT, PREVIOUS_CHECKPOINT):
        (tmp_path / name).write_bytes(b"x")
    loaded = store.load(DIGEST, "r")
    assert loaded.checkpoint is None
    assert len(loaded.complaints) == 3


def test_another_job_is_not_ours_but_its_vms_are_to_be_removed(tmp_path: Path) -> None:
    other = replace(FIRST, job_digest="cd" * 32, vms=(VmRecord("a", "b"),))
    loaded = store_with(tmp_path, other).load(DIGEST, "r")
    assert loaded.checkpoint is None
    assert loaded.stale_vms == other.vms
    assert store_with(tmp_path, FIRST).load(DIGEST, "another result").checkpoint is None


def test_a_crash_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    store_with(tmp_path, FIRST, SECOND)
    (tmp_path / CHECKPOINT).replace(tmp_path / PREVIOUS_CHECKPOINT)
    assert CheckpointStore(Slot(tmp_path)).load(DIGEST, "r").checkpoint == SECOND


def test_a_failed_write_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_with(tmp_path, FIRST, SECOND)

    def refuse(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        store.save(FIRST)
    assert store.load(DIGEST, "r").checkpoint == SECOND
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, PREVIOUS_CHECKPOINT]
