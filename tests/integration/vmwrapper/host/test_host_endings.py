"""How programs on the host are ended, what they may leave running, and what is counted of it: real processes, in a time
that passes ten times as fast (`vmwrapper.process.patience`).
"""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import pytest_twisted

from tests.integration.vmwrapper.process.test_host_processes import Rig, groups_work, rig  # noqa: F401 (a fixture)
from tests.support.limits import after
from tests.support.slots import PlayedClient, TestSlot, ten_times_as_fast
from vmcontrol.common import proctable
from vmcontrol.common.eventloop import sleep, start
from vmwrapper.boinc.channels import Channel
from vmwrapper.process import cgroups, family
from vmwrapper.process.patience import Patience


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path)
    yield slot
    slot.clean()


def program(slot: TestSlot, name: str, script: str, more: str = "<stdout_filename>out</stdout_filename>") -> str:
    """A task that runs a script: of sh, or of Python when it begins with import."""
    first = sys.executable if script.startswith("import") else "/bin/sh"
    slot.write(name, f"#!{first}\n{script}", executable=True)
    return f"<task><application>{name}</application>{more}</task>"


def run(slot: TestSlot, limit_s: float = 30) -> int:
    return slot.start("job.xml", program=ten_times_as_fast()).wait(limit_s)


SAVES = """import os, signal, sys, time
n = int(open('state').read()) if os.path.exists('state') else 0
print('begins at', n, flush=True)
def save(*_):
    time.sleep({})
    open('state', 'w').write('7')
    print('saved', flush=True)
    sys.exit({})
signal.signal(signal.SIGTERM, save)
if n == 0:
    open('ready', 'w').close()
    while True: time.sleep(0.05)
"""


# --- the order of the signals


@pytest.fixture
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Without control groups, which make no difference to most of this."""
    kind = str(getattr(request, "param", "scan"))
    if kind == "scan":
        monkeypatch.setattr(cgroups, "open_group", lambda _run: None)
    elif not groups_work():
        pytest.skip("this computer allows no control group (cgroup2) to be made")
    monkeypatch.setattr(family, "GROUP_AFTER_S", 0.0)
    return kind


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patience, "scale", 0.1)


async def ready(rig: Rig, name: str = "ready") -> None:  # noqa: F811
    await rig.until((rig.folder / name).exists)


WORKER = """
import signal, sys, time, os
def term(*_):
    open({!r}, 'w').close()
    sys.exit(1)
signal.signal(signal.SIGTERM, term)
open('ready', 'w').close()
while not os.path.exists('control'): time.sleep(0.01)
time.sleep(0.5)
open('saved', 'w').close()
"""


@pytest_twisted.ensureDeferred
@pytest.mark.usefixtures("quickly")
async def test_a_launcher_asks_its_worker_to_save(rig: Rig) -> None:  # noqa: F811
    group, running = await rig.start(
        "import os, signal, subprocess, sys\n"
        f"worker = subprocess.Popen([sys.executable, '-c', {WORKER.format('hit')!r}])\n"
        "signal.signal(signal.SIGTERM, lambda *_: open('control', 'w').close())\n"
        "os.waitpid(worker.pid, 0)\nsys.exit(3)\n"
    )
    await ready(rig)
    began = time.monotonic()
    await group.end(rig.patience(45))
    assert (rig.folder / "saved").exists()
    assert not (rig.folder / "hit").exists()
    assert running.ended is not None
    assert running.ended.status == 3
    assert time.monotonic() - began < 3


@pytest_twisted.ensureDeferred
@pytest.mark.usefixtures("quickly")
async def test_the_worker_of_a_launcher_that_dies_at_once_is_asked_then(rig: Rig) -> None:  # noqa: F811
    group, running = await rig.start(
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {WORKER.format('asked')!r}]).wait()"
    )
    await ready(rig)
    await group.end(rig.patience(45))
    assert running.ended is not None
    assert running.ended.signal == signal.SIGTERM
    assert (rig.folder / "asked").exists()


@pytest_twisted.ensureDeferred
@pytest.mark.usefixtures("quickly")
async def test_all_are_asked_after_ten_seconds(rig: Rig) -> None:  # noqa: F811
    group, running = await rig.start(
        "import signal, subprocess, sys\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', {WORKER.format('asked')!r}], start_new_session=True).wait()\n"
    )
    await ready(rig)
    began = time.monotonic()
    await group.end(rig.patience(45))
    assert 0.9 < time.monotonic() - began < 3.5
    assert (rig.folder / "asked").exists()
    assert running.ended is not None
    assert running.ended.status == 0


@pytest_twisted.ensureDeferred
@pytest.mark.usefixtures("quickly")
async def test_what_a_program_starts_in_order_to_save_is_not_asked_at_once(rig: Rig) -> None:  # noqa: F811
    save = "import time; time.sleep(0.5); open('saved', 'w').close()"
    group, _ = await rig.start(
        "import os, signal, subprocess, sys, time\n"
        "def term(*_):\n"
        f"    subprocess.Popen([sys.executable, '-c', {save!r}], start_new_session=True)\n"
        "    os._exit(0)\n"
        "signal.signal(signal.SIGTERM, term)\nopen('ready', 'w').close()\ntime.sleep(300)\n"
    )
    await ready(rig)
    await group.end(rig.patience(45))
    assert (rig.folder / "saved").exists()


@pytest_twisted.ensureDeferred
@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("by", ["us", "itself"])
@pytest.mark.parametrize("kind", ["scan", "group"], indirect=True)
async def test_a_stopped_program_is_let_go_on_to_save(rig: Rig, by: str) -> None:  # noqa: F811
    group, running = await rig.start(SAVES.format(0.3, 4))
    await ready(rig)
    if by == "us":
        rig.programs.set_suspended(True)
    else:
        assert running.pid
        psutil.Process(running.pid).send_signal(signal.SIGSTOP)
    await sleep(rig.reactor, 0.1)
    await group.end(rig.patience(45))
    assert (rig.folder / "state").read_text() == "7"
    assert running.ended is not None
    assert running.ended.status == 4


@pytest_twisted.ensureDeferred
@pytest.mark.usefixtures("quickly")
async def test_a_stopped_child_gets_its_term(rig: Rig) -> None:  # noqa: F811
    child = WORKER.format("asked").replace("open('ready', 'w').close()", "os.kill(os.getpid(), signal.SIGSTOP)")
    group, _ = await rig.start(
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "os.waitpid(child.pid, os.WUNTRACED)\nopen('ready', 'w').close()\ntime.sleep(300)\n"
    )
    await ready(rig)
    await group.end(rig.patience(45))
    assert (rig.folder / "asked").exists()


@pytest_twisted.ensureDeferred
@pytest.mark.usefixtures("quickly")
async def test_many_that_ignore_term_are_gone_in_time(rig: Rig) -> None:  # noqa: F811
    group, running = await rig.start(
        "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "for number in range(60):\n    if os.fork() == 0:\n"
        "        if number % 2: os.setsid()\n        time.sleep(300)\n"
        "open('ready', 'w').close()\ntime.sleep(300)\n"
    )
    await ready(rig)
    assert len(rig.here()) == 61
    began = time.monotonic()
    await group.end(rig.patience(15))
    assert 1.4 < time.monotonic() - began < 5
    assert rig.here() == []
    assert running.ended is not None
    assert running.ended.signal == signal.SIGKILL


@pytest_twisted.ensureDeferred
@pytest.mark.usefixtures("quickly")
async def test_an_end_that_is_under_way_can_be_given_another_patience(rig: Rig) -> None:  # noqa: F811
    group, _ = await rig.start(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen('ready', 'w').close()\n"
        "time.sleep(300)\n"
    )
    await ready(rig)
    first = start(group.end(rig.patience(3000)))
    await sleep(rig.reactor, 0.1)
    rig.programs.set_suspended(True)
    began = time.monotonic()
    await group.end(rig.patience(5))
    await first
    assert time.monotonic() - began < 3
    assert rig.here() == []


@pytest_twisted.ensureDeferred
async def test_a_process_whose_first_thread_has_ended_lives(rig: Rig) -> None:  # noqa: F811
    """Its state reads Z, as that of one that has ended."""
    group, running = await rig.start(
        "import ctypes, threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), open('ready', 'w').close(), time.sleep(300))).start()\n"
        "ctypes.CDLL(None).pthread_exit(None)\n"
    )
    await ready(rig)
    assert Path(f"/proc/{running.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    assert [entry.pid for entry in group.members()] == [running.pid]
    await group.end(rig.patience(5))
    assert running.ended is not None
    entry = proctable.look_at(running.pid)
    assert entry is None or not entry.is_alive


# --- quit, abort, time limit: the wrapper as a program


def test_a_program_that_saves_for_14_s_at_a_quit_loses_nothing(slot: TestSlot) -> None:
    slot.job(program(slot, "p", SAVES.format(1.4, 1)))
    client = PlayedClient(slot)
    process = slot.start(program=ten_times_as_fast())
    slot.wait_for("ready")
    client.say("<quit/>")
    assert process.wait(15) == 0
    assert slot.text("out").splitlines() == ["begins at 0", "saved"]
    assert slot.start(program=ten_times_as_fast()).wait(15) == 0
    assert slot.text("out").splitlines()[2:] == ["begins at 7"]


def test_an_abort_while_a_program_saves_shortens_it(slot: TestSlot) -> None:
    slot.job(program(slot, "p", SAVES.format(100, 1)))
    client = PlayedClient(slot)
    process = slot.start(program=ten_times_as_fast())
    slot.wait_for("ready")
    client.say("<quit/>")
    time.sleep(0.3)
    began = time.monotonic()
    client.say("<abort/>")
    assert process.wait(10) == 194
    assert 1.2 < time.monotonic() - began < 3.5
    slot.assert_nothing_runs()


def test_a_time_limit_gives_15_s_to_save(slot: TestSlot) -> None:
    more = "<stdout_filename>out</stdout_filename><time_limit>1</time_limit>"
    slot.job(program(slot, "p", SAVES.format(0.8, 1), more), program(slot, "q", "echo next"))
    assert run(slot) == 0
    assert slot.text("out").splitlines() == ["begins at 0", "saved", "next"]


def test_daemons_are_there_while_the_task_saves(slot: TestSlot) -> None:
    server = "trap 'echo daemon ended; exit' TERM\necho > there\nwhile :; do sleep 0.05; done\n"
    task = (
        "trap 'sleep 0.4; echo task saved; exit 1' TERM\nwhile [ ! -e there ]; do sleep 0.02; done\n"
        "echo > ready\nwhile :; do sleep 0.05; done\n"
    )
    more = "<stdout_filename>out</stdout_filename>"
    slot.job(program(slot, "d", server, f"<daemon/>{more}"), program(slot, "p", task, more))
    client = PlayedClient(slot)
    process = slot.start(program=ten_times_as_fast())
    slot.wait_for("ready")
    client.say("<quit/>")
    assert process.wait(15) == 0
    assert slot.text("out").splitlines() == ["task saved", "daemon ended"]


# --- what a task leaves running

SERVER = """import os, sys, time
if os.fork(): sys.exit()
os.setsid()
for number in (0, 1, 2): os.close(number)
if os.fork(): os._exit(0)
open('server', 'w').write(str(os.getpid()))
while not os.path.exists('ask'): time.sleep(0.02)
open('answer', 'w').write('answer\\n')
"""
ASKS = "echo > ask\ni=0; while [ ! -e answer ] && [ $i -lt 100 ]; do i=$((i+1)); sleep 0.05; done; cat answer\n"


def test_a_server_that_a_task_leaves_serves_the_next_one_and_is_named(slot: TestSlot) -> None:
    slot.job(program(slot, "p", SERVER), program(slot, "q", ASKS))
    assert run(slot) == 0
    assert slot.text("out") == "answer\n"
    assert re.search(r"task 1 has ended and leaves running: \S+ \(pid \d+\)", slot.text("stderr.txt"))
    assert json.loads(slot.text("vmwrapper_checkpoint.json")).get("left_running") is None


def test_a_task_whose_server_went_with_a_killed_run_runs_again(slot: TestSlot) -> None:
    wait = "echo middle\n"
    long = "[ -e again ] && exec ./q2\necho > again\nsleep 300\n"
    slot.write("q2", f"#!/bin/sh\n{ASKS}", executable=True)
    slot.job(program(slot, "p", SERVER), program(slot, "m", wait), program(slot, "q", long))
    process = slot.start("job.xml", program=ten_times_as_fast())
    slot.wait_for("again")
    assert json.loads(slot.text("vmwrapper_checkpoint.json"))["left_running"] == [0]
    process.kill()
    process.wait()
    assert run(slot) == 0
    assert slot.text("out") == "middle\nanswer\n", "only the task that had left it ran again"
    assert "task 1 runs again" in slot.text("stderr.txt")


def test_a_task_whose_server_has_ended_does_not_run_again(slot: TestSlot) -> None:
    leaves = "echo one\n(setsid sleep 0.6 >/dev/null 2>&1 &)\n"
    long = "[ -e again ] && exit 0\necho > again\nsleep 300\n"
    slot.job(program(slot, "p", leaves), program(slot, "q", long))
    process = slot.start("job.xml", program=ten_times_as_fast())
    slot.wait_for("vmwrapper_checkpoint.json", "left_running")
    end = after(10)
    while "left_running" in slot.text("vmwrapper_checkpoint.json"):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert run(slot) == 0
    assert slot.text("out") == "one\n"


def test_a_worker_whose_launcher_ends_first_is_waited_for_while_it_works(slot: TestSlot) -> None:
    """It neither computes nor writes for less than the limit at a time; its result is there before the archive."""
    worker = "for i in 1 2 3 4 5 6; do sleep 0.3; echo $i >> progress; done; echo result > result"
    slot.job(
        program(slot, "p", f"(setsid sh -c '{worker}' >/dev/null 2>&1 &)\n"),
        "<zip_output><zipfilename>z.zip</zipfilename><filename>result</filename></zip_output>",
    )
    assert run(slot) == 0
    assert slot.text("result") == "result\n"
    assert b"result" in (slot.folder / "z.zip").read_bytes()
    assert "neither computes" not in slot.text("stderr.txt")


@pytest.mark.parametrize(
    ("left", "why", "limits"),
    [
        ("exec sleep 300", "it neither computes nor writes", (0.4, 3.5)),
        ("while :; do :; done", "it still works", (5.5, 10)),
        ("while :; do echo >> log; sleep 0.1; done", "it still works", (5.5, 10)),
    ],
    ids=["idle", "computes", "writes"],
)
def test_what_is_left_at_the_end_is_ended(slot: TestSlot, left: str, why: str, limits: tuple[float, float]) -> None:
    slot.job(program(slot, "p", f"(setsid sh -c '{left}' >/dev/null 2>&1 &)\ntouch ended\n"))
    assert run(slot) == 0
    assert limits[0] < time.time() - (slot.folder / "ended").stat().st_mtime < limits[1]
    assert why in slot.text("stderr.txt")
    slot.assert_nothing_runs(1)


def test_what_was_left_is_suspended_counted_and_saves_at_a_quit(slot: TestSlot) -> None:
    worker = (
        "import os, signal, sys, time\n"
        "if os.fork(): sys.exit()\n"
        "os.setsid()\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), open('saved', 'w').close(), os._exit(0)))\n"
        "open('worker', 'w').write(str(os.getpid()))\n"
        "while True: open('pulse', 'a').write('.')\n"
    )
    slot.job(program(slot, "p", worker, ""), program(slot, "q", "echo > second\nexec sleep 300\n"))
    client = PlayedClient(slot)
    process = slot.start(program=ten_times_as_fast())
    slot.wait_for("second")
    end = after(10)
    while cpu_of(client.status()) < 0.3:
        assert time.monotonic() < end
    client.say("<suspend/>")
    left = psutil.Process(int(slot.text("worker")))
    end = after(5)
    size = -1
    while size != (size := (slot.folder / "pulse").stat().st_size):
        assert time.monotonic() < end
        time.sleep(0.2)
    client.say("<quit/>")
    assert process.wait(15) == 0
    assert (slot.folder / "saved").exists()
    assert not left.is_running()
    assert json.loads(slot.text("vmwrapper_checkpoint.json"))["left_running"] == [0]


@pytest_twisted.ensureDeferred
async def test_what_forks_away_while_it_is_looked_for_is_found(rig: Rig) -> None:  # noqa: F811
    """A look at the system's processes takes milliseconds, in which a chain of forks can pass by it."""
    script = "import os, time\nfor _ in range(40):\n    if os.fork(): os._exit(0)\n    os.setsid()\ntime.sleep(300)"
    for _ in range(10):
        group, running = await rig.start(script)
        await running.wait()
        assert await group.left_running() != []
        await group.end(rig.patience(0))


# --- CPU time


def cpu_of(status: str) -> float:
    found = re.search(r"<current_cpu_time>([^<]*)<", status)
    assert found, status
    return float(found[1])


BURN = "import sys, time\nwhile time.process_time() < 0.4: pass\nsys.exit({})\n"


@pytest.mark.parametrize("how", ["fails", "children", "limit"])
def test_the_cpu_time_of_a_task_that_fails_or_is_killed_is_told(slot: TestSlot, how: str) -> None:
    burn = BURN.format(3)
    if how == "children":
        burn = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])\nsys.exit(3)\n"
    elif how == "limit":
        burn = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass\n"
    more = "<time_limit>0.5</time_limit>" if how == "limit" else ""
    slot.job(program(slot, "p", burn, more))
    client = PlayedClient(slot)
    assert slot.start(program=ten_times_as_fast()).wait(20) == (0 if how == "limit" else 195)
    assert cpu_of(client.last(Channel.APP_STATUS)) > (0.1 if how == "limit" else 0.35)


def test_what_a_program_uses_to_save_is_counted(slot: TestSlot) -> None:
    save = (
        "import signal, sys, time\n"
        "def save(*_):\n    begun = time.process_time()\n"
        "    while time.process_time() - begun < 0.2: pass\n    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, save)\nopen('ready', 'w').close()\ntime.sleep(300)\n"
    )
    slot.job(program(slot, "p", save, ""))
    client = PlayedClient(slot)
    process = slot.start(program=ten_times_as_fast())
    slot.wait_for("ready")
    client.say("<quit/>")
    assert process.wait(15) == 0
    assert cpu_of(client.last(Channel.APP_STATUS)) > 0.2
    assert json.loads(slot.text("vmwrapper_checkpoint.json"))["cpu_time_s"] > 0.2
