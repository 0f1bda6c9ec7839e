"""kill -9 of each process, and power loss, in each phase of a job of three tasks on one real virtual machine.

What was executed is read from the guest's serial console, which no rollback takes back. Each task must have worked on
the disk that the one before it left, and each start beyond the first must be explained by a rollback in stderr.txt.

The whole matrix takes half an hour: `pytest -s -m optin tests/integration/project/test_kill_matrix.py`; its printed
result stands in docs/results/under-client.md. What always runs goes through the same phases in three jobs.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.client_vm import HOST_CONFIG, TICKER, executions, qemu_of, task
from tests.support.limits import after
from tests.support.slots import HOST_MAIN_TASK, TestSlot

WRAPPER = [sys.executable, "-m", "vmwrapper"]
PHASES = {
    "start": "waiting for",
    "boot": "is made from",
    "copy in": "all ready",
    "run": r"running ticker\.py in the guest",
    "copy out": "ended in the guest",
    "between tasks": "snapshot vmwrapper_1 of VM",
}
"""Each begins where this line (a regular expression) stands in stderr.txt."""
BIG = 24 << 20
"""Bytes of an input file: copying it takes long enough to be killed in."""
MEMORY_MB = 256
"""Room for the shell that kills in the guest, too: at 128 MB it starves the agent for a minute and more."""
ROOT = Path(__file__).parents[3]
ACTIVEMQ_TASK = (
    "<VMmanage_task><application>./activemq/run_activemq</application>"
    "<stdout_filename>stdout_broker</stdout_filename><stderr_filename>stderr_broker</stderr_filename></VMmanage_task>"
)
IN_GUEST = {"agent": "start-agen[t]", "program": "ticker[.]p[y]"}
"""What is killed in the guest: a pattern for its command line that the one who looks does not fit himself."""
EVERYWHERE = list(PHASES)
MATRIX = {
    "wrapper": EVERYWHERE,
    "HostMain": EVERYWHERE,
    "broker": EVERYWHERE,
    "power": EVERYWHERE,
    "QEMU": EVERYWHERE[1:],
    "agent": EVERYWHERE[2:],
    "program": ["run"],
}
"""Who is killed when: in the phases in which there is one."""

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="package qemu-system-x86 is not installed"),
]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from guest.image.cache import guest_image

    copy = tmp_path_factory.mktemp("image") / "guest.vdi"
    shutil.copyfile(guest_image(Path(__file__).parents[3] / ".cache" / "guest-image"), copy)
    return copy


def lay_out(folder: Path, image: Path, *, activemq: bool = False) -> TestSlot:
    slot = TestSlot(folder)
    config = HOST_CONFIG.decode()
    slot.write("HostConfig.cfg", config.replace("type = embedded", "type = external") if activemq else config)
    slot.write("ticker.py", TICKER.decode(), executable=True)
    slot.write("guest.vdi", f"<soft_link>{image}</soft_link>\n")
    with (folder / "big").open("wb") as big:
        big.truncate(BIG)
    if activemq:
        shutil.copytree(ROOT / "examples" / "activemq", folder / "activemq")
    slot.job(
        *([ACTIVEMQ_TASK] if activemq else []),
        HOST_MAIN_TASK,
        task(20, "out0", memory_mb=MEMORY_MB, interval_s=600, more="<copy_file_to_VM>big</copy_file_to_VM>"),
        task(20, "out1", memory_mb=MEMORY_MB, interval_s=600),
        task(20, "out2", memory_mb=MEMORY_MB, interval_s=600),
    )
    return slot


@pytest.fixture
def slot(tmp_path: Path, image: Path) -> Iterator[TestSlot]:
    slot = lay_out(tmp_path, image)
    yield slot
    slot.clean()


class Victim:
    """A job that is killed at, and goes on to its end."""

    def __init__(self, slot: TestSlot) -> None:
        self.slot = slot
        self.seen = 0
        self.seen_executions = 0
        self.wrapper = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        self.wrapper = self.slot.start("job.xml", program=WRAPPER)
        return self.wrapper

    def story(self) -> str:
        path = self.slot.folder / "stderr.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, words: str, limit_s: float = 300) -> None:
        """Until stderr.txt has these words after all that was waited for before."""
        end = after(limit_s)
        while not (found := re.compile(words).search(self.story(), self.seen)):
            assert time.monotonic() < end, f"no {words!r}; stderr.txt:\n{self.story()}"
            assert self.wrapper.poll() is None, f"ended before {words!r}:\n{self.story()}"
            time.sleep(0.01)
        self.seen = found.end()
        if "running" in words:  # the line comes before the command is sent: until the guest has begun with it
            while len(self.executed()) == self.seen_executions:
                assert time.monotonic() < end, "the guest does not begin"
                time.sleep(0.01)
        self.seen_executions = len(self.executed())

    def executed(self) -> list[tuple[str, int]]:
        path = self.slot.folder / "guest_console.log"
        return executions(path.read_text(errors="replace")) if path.exists() else []

    def kill(self, who: str) -> None:
        """Killed, and if the wrapper was among the dead, started again."""
        if who == "wrapper":
            self.wrapper.kill()
        elif who == "HostMain":
            self.hostmain().kill()
        elif who == "QEMU":
            qemu_of(self.slot.folder).kill()
        elif who == "broker":
            self.broker().kill()
        elif who in IN_GUEST:
            self.kill_in_guest(IN_GUEST[who])
        else:
            for process in self.slot.leftovers():
                process.kill()
        if who in ("wrapper", "power"):
            self.wrapper.wait(10)
            self.start()

    def hostmain(self) -> psutil.Process:
        listed = json.loads(self.slot.text("vmwrapper_processes.json"))["processes"]
        return psutil.Process(next(one["pid"] for one in listed if one["role"] == "hostmain"))

    def broker(self) -> psutil.Process:
        """ActiveMQ's JVM, which has a working folder of its own."""
        for process in psutil.Process(self.wrapper.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any("activemq.jar" in word for word in process.cmdline()):
                    return process
        raise AssertionError("no broker in the slot")

    def kill_in_guest(self, pattern: str) -> None:
        """kill -9 in the guest of what has this in its command line, by a command of its own through HostMain."""
        secret = self.hostmain().environ()["VMWRAPPER_XMLRPC_SECRET"]
        port = json.loads(self.slot.text("vmwrapper_ports.json"))["xmlrpc"]
        host: Any = xmlrpc.client.ServerProxy(f"http://vmwrapper:{secret}@127.0.0.1:{port}/", allow_none=True)
        script = f"for p in /proc/[0-9]*; do grep -qa {pattern} $p/cmdline && kill -9 ${{p#/proc/}}; done"
        (vm,) = host.listRunningVMs()
        host.runCmd(vm, "/bin/sh", ["-c", script])

    def check_end(self) -> str:
        """It ends well, and everything was done once; a line for the table."""
        status = self.wrapper.wait(400)
        story = self.story()
        assert status == 0, story
        done = self.executed()
        assert len(set(done)) == len(done), f"the same attempt twice: {done}"
        explained = {int(n) for n in re.findall(r"rollback: \S+ is started again, attempt (\d+)", story)}
        for index in ("0", "1", "2"):
            attempts = [attempt for one, attempt in done if one == index]
            assert attempts, f"task {index} was never done: {done}"
            assert set(attempts[1:]) <= explained, (done, story)
        assert self.slot.text("out2") == "out0\nout1\nout2\n", "each task on the disk of the one before, each once"
        assert self.slot.text("out0") == "out0\n"
        assert not (self.slot.folder / "vm").exists()
        self.slot.assert_nothing_runs()
        return " ".join(f"{index}.{attempt}" for index, attempt in done)


def hostmain_is_listed(slot: TestSlot) -> bool:
    path = slot.folder / "vmwrapper_processes.json"
    return path.exists() and "hostmain" in path.read_text()


def test_each_process_while_a_task_runs(slot: TestSlot) -> None:
    """One job: the wrapper while the first task runs, HostMain while the second does, QEMU in the third."""
    victim = Victim(slot)
    for who in ("wrapper", "HostMain", "QEMU"):
        victim.wait(r"(running ticker\.py in the guest)")
        victim.kill(who)
        if who == "wrapper":
            victim.wait(r"task 2 of 3")
        elif who == "HostMain":
            victim.wait(r"task 3 of 3")
    print("executed (task.attempt):", victim.check_end())


def test_power_loss_in_each_phase(slot: TestSlot) -> None:
    """One job that loses power in one phase after the other."""
    victim = Victim(slot)
    for words in PHASES.values():
        victim.wait(words)
        victim.kill("power")
    print("executed (task.attempt):", victim.check_end())


def test_agent_and_program_in_the_guest_while_a_task_runs(slot: TestSlot) -> None:
    """One job: the agent while the first task runs, the program itself in the second."""
    victim = Victim(slot)
    for who, end in (("agent", r"task 2 of 3"), ("program", r"task 3 of 3")):
        victim.wait(r"(running ticker\.py in the guest)")
        victim.kill(who)
        victim.wait("rollback: ")
        victim.wait(end)
    print("executed (task.attempt):", victim.check_end())


@pytest.mark.optin
@pytest.mark.parametrize(("who", "phase"), [(who, phase) for who, phases in MATRIX.items() for phase in phases])
def test_matrix(tmp_path: Path, image: Path, who: str, phase: str) -> None:
    if who == "broker" and not Path("/usr/share/activemq/bin/activemq.jar").exists():
        pytest.skip("package activemq is not installed")
    slot = lay_out(tmp_path, image, activemq=who == "broker")
    try:
        victim = Victim(slot)
        victim.wait(PHASES[phase])
        end = after(60)
        while not is_there(victim, who):
            assert time.monotonic() < end
            time.sleep(0.01)
        began = time.monotonic()
        victim.kill(who)
        done = victim.check_end()
        print(f"| {who} | {phase} | {done} | {time.monotonic() - began:.0f} s |")
    finally:
        slot.clean()


def is_there(victim: Victim, who: str) -> bool:
    """Whether there is somebody to kill: a phase begins a moment before some of them."""
    try:
        if who == "QEMU":
            qemu_of(victim.slot.folder)
        elif who == "broker":
            victim.broker()
    except AssertionError:
        return False
    return hostmain_is_listed(victim.slot)
