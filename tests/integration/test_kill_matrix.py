"""kill -9 of each process, and power loss, in each phase of a job of three tasks on one real virtual machine.

What was executed is read from the guest's serial console, which no rollback takes back. Each task must have worked on
the disk that the one before it left, and each start beyond the first must be explained by a rollback in stderr.txt.

The whole matrix takes a quarter of an hour: `pytest -s -m optin tests/integration/test_kill_matrix.py`; what is known
of its result stands in docs/under-boinc.md. What always runs goes through the same phases in two jobs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.client_vm import HOST_CONFIG, TICKER, executions, qemu_of, task
from tests.integration.slots import HOST_MAIN_TASK, TestSlot

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
    shutil.copyfile(guest_image(Path(__file__).parents[2] / ".cache" / "guest-image"), copy)
    return copy


@pytest.fixture
def slot(tmp_path: Path, image: Path) -> Iterator[TestSlot]:
    slot = TestSlot(tmp_path)
    slot.write("HostConfig.cfg", HOST_CONFIG.decode())
    slot.write("ticker.py", TICKER.decode(), executable=True)
    slot.write("guest.vdi", f"<soft_link>{image}</soft_link>\n")
    with (tmp_path / "big").open("wb") as big:
        big.truncate(BIG)
    slot.job(
        HOST_MAIN_TASK,
        task(20, "out0", interval_s=600, more="<copy_file_to_VM>big</copy_file_to_VM>"),
        task(20, "out1", interval_s=600),
        task(20, "out2", interval_s=600),
    )
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
        end = time.monotonic() + limit_s
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
            listed = json.loads(self.slot.text("vmwrapper_processes.json"))["processes"]
            psutil.Process(next(one["pid"] for one in listed if one["role"] == "hostmain")).kill()
        elif who == "QEMU":
            qemu_of(self.slot.folder).kill()
        else:
            for process in self.slot.leftovers():
                process.kill()
        if who in ("wrapper", "power"):
            self.wrapper.wait(10)
            self.start()

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


@pytest.mark.optin
@pytest.mark.parametrize("who", ["wrapper", "HostMain", "QEMU", "power"])
@pytest.mark.parametrize("phase", list(PHASES))
def test_matrix(slot: TestSlot, who: str, phase: str) -> None:
    victim = Victim(slot)
    victim.wait(PHASES[phase])
    if who == "QEMU" and phase == "start":
        pytest.skip("there is no QEMU yet")
    end = time.monotonic() + 20
    while not hostmain_is_listed(slot) or (who == "QEMU" and not has_qemu(slot)):
        assert time.monotonic() < end
        time.sleep(0.01)
    began = time.monotonic()
    victim.kill(who)
    done = victim.check_end()
    print(f"| {phase} | {who} | {done} | {time.monotonic() - began:.0f} s |")


def has_qemu(slot: TestSlot) -> bool:
    try:
        qemu_of(slot.folder)
    except AssertionError:
        return False
    return True
