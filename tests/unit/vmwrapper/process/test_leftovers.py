"""The list of a run's processes: what it says after a crash, whatever became of the clock or of the file."""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import pytest_twisted
from hypothesis import given
from hypothesis import strategies as st

from vmcontrol.common import birth
from vmcontrol.common.eventloop import the_reactor
from vmcontrol.common.slotfiles import PROCESSES
from vmwrapper.process import ending, leftovers, program
from vmwrapper.process.leftovers import ProcessList, Role
from vmwrapper.slot import Slot


@pytest.fixture
def slot(tmp_path: Path) -> Slot:
    return Slot(tmp_path)


@pytest.fixture
def saving() -> Iterator[subprocess.Popen[bytes]]:
    """Stands for a HostMain that saves its VMs."""
    with subprocess.Popen(["sleep", "0.5"]) as process:
        yield process
        process.kill()


def set_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    before = psutil._pslinux.boot_time()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: before + 1)


@pytest_twisted.ensureDeferred
async def test_a_hostmain_that_is_saving_is_waited_for_after_the_clock_was_set(
    slot: Slot, saving: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = ProcessList(slot)
    listed.begin()
    listed.add(Role.HOST_MAIN, saving.pid, birth.of(saving.pid))
    set_clock(monkeypatch)
    assert await leftovers.clear(the_reactor(), slot) == 1
    assert saving.wait() == 0, "it was not killed"


@pytest_twisted.ensureDeferred
async def test_a_tree_is_ended_after_the_clock_was_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = program.start_program(
        the_reactor(), ["/bin/sleep", "300"], folder=tmp_path, environment={}, streams=program.Streams()
    )
    set_clock(monkeypatch)
    await ending.kill_program(the_reactor(), running)
    assert running.ended is not None


def test_a_list_of_an_older_version_is_read(slot: Slot) -> None:
    me = psutil.Process()
    one = {"role": "hostmain", "pid": me.pid, "start_time": me.create_time()}
    slot.file(PROCESSES).write_text(json.dumps({"version": 1, "run": "0" * 32, "group": "", "processes": [one]}))
    (recorded,) = leftovers.read(slot.file(PROCESSES)).recorded
    assert birth.find(recorded.pid, recorded.began) == me


def test_what_was_written_is_read(slot: Slot) -> None:
    listed = ProcessList(slot)
    listed.begin()
    listed.note_group("/sys/fs/cgroup/vmwrapper_x")
    listed.add(Role.SUPERVISOR, os.getpid(), birth.of(os.getpid()))
    found = leftovers.read(slot.file(PROCESSES))
    assert (found.token, found.group) == (listed.token, "/sys/fs/cgroup/vmwrapper_x")
    assert [(one.role, one.pid, one.began) for one in found.recorded] == [
        (Role.SUPERVISOR, os.getpid(), birth.of(os.getpid()))
    ]


WORDS = st.sampled_from(["version", "run", "group", "processes", "role", "pid", "start_time", "start_ticks", "boot"])
VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["hostmain", "f" * 32, math.inf, -1, 1])
)  # fmt: skip
JSON = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=5), max_leaves=12
)
PROCESS = st.dictionaries(WORDS, VALUES, max_size=6) | st.fixed_dictionaries(
    {"role": VALUES, "pid": VALUES, "start_time": VALUES}
)
LISTS = st.fixed_dictionaries(
    {"version": st.just(1), "run": st.just("f" * 32) | JSON, "group": JSON, "processes": st.lists(PROCESS) | JSON}
)


def assert_usable(found: leftovers.Found) -> None:
    """Whatever is done with it raises nothing, and pids are pids."""
    assert found.token in ("", "f" * 32)
    for one in found.recorded:
        assert one.pid > 0
        birth.find(one.pid, one.began)


@given(JSON | LISTS)
def test_any_json_is_a_list_or_none(value: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PROCESSES
        path.write_text(json.dumps(value))
        assert_usable(leftovers.read(path))


@given(st.binary(max_size=100))
def test_any_bytes_are_a_list_or_none(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PROCESSES
        path.write_bytes(content)
        assert_usable(leftovers.read(path))


@pytest.mark.parametrize("pid", ["-1", "0", "1e999", "true", '"7"', str(1 << 70)])
def test_what_is_no_pid_makes_no_list(slot: Slot, pid: str) -> None:
    one = f'{{"role": "hostmain", "pid": {pid}, "start_time": 1.0}}'
    text = f'{{"version": 1, "run": "{"f" * 32}", "group": "", "processes": [{one}]}}'
    slot.file(PROCESSES).write_text(text)
    assert leftovers.read(slot.file(PROCESSES)) == leftovers.Found()


def test_what_is_no_file_is_no_list(slot: Slot) -> None:
    slot.file(PROCESSES).mkdir()
    assert leftovers.read(slot.file(PROCESSES)) == leftovers.Found()
    slot.file(PROCESSES).rmdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(slot.file(PROCESSES))
        assert leftovers.read(slot.file(PROCESSES)) == leftovers.Found()
