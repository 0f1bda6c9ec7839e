"""Process trees of host tasks: stopped without a race against their forks, counted whole, ended whole. Each with the
control group, where this computer allows one, and without."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
import pytest_twisted

from tests.support.limits import after
from tests.support.slots import PlayedClient, TestSlot, is_frozen
from vmcontrol.common import proctable, supervisor
from vmcontrol.common.eventloop import sleep, the_reactor
from vmwrapper.host import spawn
from vmwrapper.process import cgroups, family, orphans
from vmwrapper.process.family import ProcessFamily
from vmwrapper.process.orphans import RUN_MARK
from vmwrapper.process.patience import Patience
from vmwrapper.process.program import Running
from vmwrapper.process.programs import HostPrograms

FORKS = """
import os, time
# A chain of forks: each process lives for some milliseconds, and its child goes on after it.
while True:
    time.sleep({})
    if os.fork():
        os._exit(0)
"""
ORPHAN = "import subprocess, os; subprocess.Popen(['sleep', '300'], start_new_session=True); os._exit(0)"
BURN = "import time\nend = time.process_time() + {0}\nwhile time.process_time() < end: pass\n"


def groups_work() -> bool:
    group = cgroups.open_group("0" * 16)
    if group is None:
        return False
    group.remove()
    return True


@pytest.fixture(params=["scan", "group"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "group":
        if not groups_work():
            pytest.skip("this computer allows no control group (cgroup2) to be made")
        monkeypatch.setattr(family, "GROUP_AFTER_S", 0.0)
    else:
        monkeypatch.setattr(cgroups, "open_group", lambda _run: None)
    return str(request.param)


class Rig:
    """Programs in a folder, as the wrapper has them."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.reactor = the_reactor()
        self.token = f"test{os.getpid()}{time.monotonic_ns()}"
        self.noted: list[str] = []
        self.kind = kind
        self.programs = HostPrograms(self.reactor, self.token, note_group=self.noted.append)

    async def start(self, script: str) -> tuple[ProcessFamily, Running]:
        group = self.programs.begin(multi_process=False)
        program = spawn.Program(
            sys.executable, [sys.executable, "-c", script], folder=self.folder,
            environment=(*(f"{k}={v}" for k, v in os.environ.items()), f"{RUN_MARK}={group.mark}"),
        )  # fmt: skip
        running = spawn.spawn(self.reactor, program)
        group.started(running)
        if self.kind == "group":
            await self.until(lambda: group._cgroup is not None or running.ended is not None)
        return group, running

    async def until(self, condition: object, limit_s: float = 60) -> None:
        end = after(limit_s)
        assert callable(condition)
        while not condition():
            assert time.monotonic() < end
            await sleep(self.reactor, 0.02)

    def patience(self, seconds: float) -> Patience:
        return Patience(self.reactor, seconds)

    def is_still(self) -> bool:
        """Whether all that runs here is stopped, or in a frozen control group (which takes the kernel a moment)."""
        members = self.here()
        return bool(members) and all(entry.is_stopped or is_frozen(entry.pid) for entry in members)

    def here(self) -> list[proctable.Entry]:
        """All processes in the folder, found in another way than the code under test."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    entry = proctable.look_at(process.pid)
                    found += [entry] if entry is not None else []
            except (psutil.Error, OSError):
                continue
        return found


@pytest_twisted.async_yield_fixture
async def rig(tmp_path: Path, kind: str) -> AsyncIterator[Rig]:
    orphans.become_subreaper()
    rig = Rig(tmp_path, kind)
    yield rig
    for group in tuple(rig.programs._living):
        await group.end(rig.patience(0))
    rig.programs.close()
    orphans.collect_orphans()
    assert rig.here() == []


@pytest_twisted.ensureDeferred
async def test_a_tree_that_forks_all_the_time_is_stopped_as_a_whole(rig: Rig) -> None:
    for pause_s in (0.002, 0.01):
        group, _ = await rig.start(FORKS.format(pause_s))
        await sleep(rig.reactor, 0.15)
        for _ in range(3):
            rig.programs.set_suspended(True)
            await rig.until(rig.is_still)
            before = {entry.pid for entry in rig.here()}
            assert before
            await sleep(rig.reactor, 0.05)
            assert {entry.pid for entry in rig.here()} == before, "nothing was forked"
            rig.programs.set_suspended(False)
            await rig.until(lambda before=before: {entry.pid for entry in rig.here()} != before)
        await group.end(rig.patience(0))
        assert rig.here() == []


@pytest.fixture(params=[True, False], ids=["adopted", "not adopted"])
def adopting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether orphans become our children; they must not where VirtualBox's service may be one."""
    if not request.param:
        monkeypatch.setattr(orphans, "_adopts", False)
        assert ctypes.CDLL(None).prctl(supervisor._PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0
    yield bool(request.param)
    orphans.become_subreaper()


@pytest_twisted.ensureDeferred
async def test_orphans_in_sessions_of_their_own_are_stopped_and_ended(rig: Rig, adopting: bool) -> None:
    assert orphans.strays_possible() != adopting
    group, running = await rig.start("import time, subprocess, sys\n"
                                     f"subprocess.Popen([sys.executable, '-c', {ORPHAN!r}]).wait()\n"
                                     "open('ready', 'w').close()\ntime.sleep(300)")  # fmt: skip
    await rig.until((rig.folder / "ready").exists)
    assert len(rig.here()) == 2
    rig.programs.set_suspended(True)
    if rig.kind == "scan":
        await rig.until(lambda: all(entry.is_stopped for entry in rig.here()))
    await group.end(rig.patience(1))
    assert rig.here() == []
    assert running.ended is not None
    assert running.ended.signal == signal.SIGTERM


@pytest_twisted.ensureDeferred
async def test_orphans_of_another_program_stay(rig: Rig) -> None:
    daemon, daemon_running = await rig.start(ORPHAN)
    task, task_running = await rig.start("pass")
    await daemon_running.wait()
    await task_running.wait()
    if rig.kind == "scan":
        assert await task.left_running() == []
        assert [entry.pid for entry in rig.here()] == [entry.pid for entry in daemon.members()]
        orphans.end_orphans()
        assert len(rig.here()) == 1
    await daemon.end(rig.patience(5))
    assert rig.here() == []


@pytest_twisted.ensureDeferred
async def test_cpu_time_counts_children_that_have_ended_and_orphans(rig: Rig) -> None:
    before = rig.programs.cpu_time_s()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    script = (
        "import subprocess, sys, time, os, signal\n"
        f"subprocess.run([sys.executable, '-c', {BURN.format(0.2)!r}])\n"
        f"if os.fork() == 0:\n    exec({BURN.format(0.2)!r})\n    os._exit(0)\n"
        "open('ready', 'w').close()\ntime.sleep(300)\n"
    )
    group, _ = await rig.start(script)
    await rig.until((rig.folder / "ready").exists)
    await rig.until(lambda: rig.programs.cpu_time_s() - before > 0.4)
    await group.end(rig.patience(0.5))
    assert 0.4 < rig.programs.cpu_time_s() - before < 3
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime > usage.ru_utime


@pytest_twisted.ensureDeferred
async def test_only_a_control_group_counts_children_that_nobody_waits_for(rig: Rig) -> None:
    script = (
        "import os, signal, time\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\ntime.sleep(0.3)\n"
        f"if os.fork() == 0:\n    exec({BURN.format(0.3)!r})\n    os._exit(0)\n"
        "open('ready', 'w').close()\ntime.sleep(300)\n"
    )
    before = rig.programs.cpu_time_s()
    group, _ = await rig.start(script)
    await rig.until((rig.folder / "ready").exists)
    await rig.until(lambda: len(rig.here()) == 1)  # the child has ended
    used = rig.programs.cpu_time_s() - before
    await group.end(rig.patience(0))
    if rig.kind == "group":
        assert used > 0.3
        assert rig.programs.cpu_time_s() - before > 0.3, "also after its end"


@pytest_twisted.ensureDeferred
async def test_a_program_that_ignores_term_is_killed(rig: Rig) -> None:
    group, running = await rig.start(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open('ready', 'w').close()\ntime.sleep(300)"
    )
    await rig.until((rig.folder / "ready").exists)
    await group.end(rig.patience(0.2))
    assert running.ended is not None
    assert running.ended.signal == signal.SIGKILL


@pytest_twisted.ensureDeferred
async def test_what_a_program_leaves_gets_term_and_time_to_go(rig: Rig) -> None:
    left = "trap 'sleep 0.2; echo > went; exit' TERM; echo > ready; while :; do sleep 0.02; done"
    group, running = await rig.start(
        f"import subprocess, os, time\nsubprocess.Popen(['sh', '-c', {left!r}])\n"
        "while not os.path.exists('ready'): time.sleep(0.01)"
    )
    await running.wait()
    await group.end(rig.patience(5))
    assert (rig.folder / "went").exists()
    assert rig.here() == []


@pytest_twisted.ensureDeferred
async def test_cpu_time_of_an_orphan_that_ends_is_counted_once(rig: Rig) -> None:
    """It was a living one's time, and becomes that of an ended child of ours, between two looks."""
    script = (
        f"import os, time\nif os.fork() == 0:\n    exec({BURN.format(0.5)!r})\n    open('burnt', 'w').close()\n"
        "    while not os.path.exists('go'): time.sleep(0.01)\n    os._exit(0)\nos._exit(0)\n"
    )
    before = rig.programs.cpu_time_s()
    group, running = await rig.start(script)
    await running.wait()
    await rig.until((rig.folder / "burnt").exists)
    rig.programs._look_at = 0.0
    used = rig.programs.cpu_time_s() - before
    (rig.folder / "go").touch()
    await rig.until(lambda: rig.here() == [])
    orphans.collect_orphans()
    assert used > 0.45, "the kernel counts in hundredths"
    assert rig.programs.cpu_time_s() - before < used + 0.3
    await group.end(rig.patience(5))
    assert used <= rig.programs.cpu_time_s() - before < used + 0.3


def test_what_a_killed_run_left_in_its_group_is_killed(tmp_path: Path) -> None:
    if not groups_work():
        pytest.skip("this computer allows no control group (cgroup2) to be made")
    group = cgroups.open_group("f" * 16)
    assert group is not None
    child = group.child("p1")
    assert child is not None
    import subprocess

    with subprocess.Popen(["sleep", "300"], cwd=tmp_path, env={}) as process:
        assert child.take_in(lambda: [process.pid])
        assert child.stop()
        assert cgroups.end_left(str(group.folder)) == 1
        assert process.wait(5) == -signal.SIGKILL
    assert not group.folder.exists()
    assert cgroups.end_left(str(tmp_path)) == 0, "only groups of ours"


# --- the wrapper as a program


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path)
    yield slot
    slot.clean()


def test_a_task_dies_with_a_wrapper_that_is_killed(slot: TestSlot) -> None:
    slot.job(
        "<task><application>sh</application><command_line>-c 'echo > started; exec sleep 300'</command_line></task>"
    )
    process = slot.start("job.xml", program=[sys.executable, "-m", "vmwrapper"])
    slot.wait_for("started")
    process.kill()
    process.wait()
    slot.assert_nothing_runs(1)


def test_suspended_within_a_fifth_of_a_second(slot: TestSlot) -> None:
    client = PlayedClient(slot)
    slot.job("<task><application>sh</application><command_line>-c 'while :; do :; done'</command_line></task>")
    slot.start(program=[sys.executable, "-m", "vmwrapper"])
    end = after(10)
    while not [process for process in slot.leftovers() if process.name() == "sh"]:
        assert time.monotonic() < end
        time.sleep(0.02)
    (shell,) = [process for process in slot.leftovers() if process.name() == "sh"]
    delays = []
    for message, stopped in (("<suspend/>", True), ("<resume/>", False)) * 3:
        began = time.monotonic()
        client.say(message)
        while (shell.status() == psutil.STATUS_STOPPED or is_frozen(shell.pid)) != stopped:
            assert time.monotonic() - began < 5
            time.sleep(0.002)
        delays.append(time.monotonic() - began)
    assert sorted(delays)[len(delays) // 2] < 0.2, delays


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_is_a_temporary_exit(tmp_path: Path) -> None:
    import subprocess
    import zipfile

    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    slot = TestSlot(folder)
    try:
        with zipfile.ZipFile(tmp_path / "in", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("large", bytes(2_000_000))
        slot.write("in.zip", f"<soft_link>{tmp_path / 'in'}</soft_link>")
        slot.job("<unzip_input><zipfilename>in.zip</zipfilename></unzip_input>")
        assert slot.run("job.xml", program=[sys.executable, "-m", "vmwrapper"]) == 75
        assert "free some space on BOINC's disk" in slot.text("stderr.txt")
    finally:
        slot.clean()
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("later", ["", "processes.become_subreaper()"], ids=["never", "later"])
def test_what_programs_left_is_found_by_its_mark_where_nothing_is_adopted(tmp_path: Path, later: str) -> None:
    """VirtualBox's service must not be adopted, so for a job with it nothing is until another hypervisor is used."""
    script = f"""
import os, subprocess, sys, time
from vmwrapper.process import orphans as processes
processes.adopt_nothing()
environment = {{**os.environ, processes.RUN_MARK: "token"}}
sleep = "import time, pathlib, os; pathlib.Path(str(os.getpid())).touch(); time.sleep(300)"
ours = subprocess.Popen([sys.executable, "-c", sleep], env=environment, cwd={str(tmp_path)!r})
processes.reapProcessHandlers[ours.pid] = None  # as if Twisted had started it
leave = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {{sleep!r}}], start_new_session=True)"
subprocess.run([sys.executable, "-c", leave], env=environment, cwd={str(tmp_path)!r}, check=True)
while len(os.listdir({str(tmp_path)!r})) < 2:
    time.sleep(0.01)
{later}
processes.end_orphans("token", everything=True)
table = processes.proctable.look()
alive = [pid for pid in map(int, os.listdir({str(tmp_path)!r})) if pid in table and table[pid].is_alive]
print(alive == [ours.pid])
ours.kill()
ours.wait()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr
