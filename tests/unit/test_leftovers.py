"""The list of a run's processes: what it says after a crash, whatever became of the clock or of the file."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import pytest_twisted

from vmcontrol import birth
from vmcontrol.eventloop import the_reactor
from vmwrapper import leftovers, processes
from vmwrapper.leftovers import ProcessList, Role
from vmwrapper.slot import PROCESSES, Slot


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
    running = processes.start_program(
        the_reactor(), ["/bin/sleep", "300"], folder=tmp_path, environment={}, streams=processes.Streams()
    )
    set_clock(monkeypatch)
    await processes.end_tree(the_reactor(), running, grace_s=0)
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
    listed.add(Role.KEEPER, os.getpid(), birth.of(os.getpid()))
    found = leftovers.read(slot.file(PROCESSES))
    assert (found.token, found.group) == (listed.token, "/sys/fs/cgroup/vmwrapper_x")
    assert [(one.role, one.pid, one.began) for one in found.recorded] == [
        (Role.KEEPER, os.getpid(), birth.of(os.getpid()))
    ]
