"""Jobs with a virtual machine under the real BOINC client: their files, and how what happened is measured. No tests.

Times are those of the client's message in shared memory, not of our request to the client, which acts once a second.
"""

from __future__ import annotations

import mmap
import re
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import psutil

from tests.support.boinc_client import BoincClient, Job, JobFile
from tests.support.limits import after
from tests.support.slots import HOST_MAIN_TASK
from vmwrapper.boinc import channels

ROOT = Path(__file__).parents[2]
HOST_CONFIG = b"[Broker]\ntype = embedded\nport = 0\n[Host]\nxmlrpc_port = 0\n[Hypervisor]\nhypervisor = QEMU\n"

PAUSED, RUNNING = r"driver: \S+: Paused$", r"driver: \S+: Running$"

TICKER = b"""\
#!/usr/bin/env python3
'''usage: ticker.py TICKS OUT: a tick is a tenth of a second, and hardly any work. A trickle-down message ends it.'''
import sys, time
from pathlib import Path
ticks, out = int(sys.argv[1]), sys.argv[2]
with open("trace", "a") as trace:
    trace.write(out + "\\n")
Path(out + ".started").touch()
for tick in range(ticks):
    Path("fraction_done").write_text(f"{tick / ticks:.4f}\\n")
    time.sleep(0.1)
    if list(Path(".").glob("trickle_down*")):
        break
Path(out).write_text(Path("trace").read_text())
print(f"{time.time():.2f}")
"""


def task(
    ticks: int, out: str = "out", *, memory_mb: int = 128, more: str = "", interval_s: float = 1, vm: str = "one"
) -> str:
    """A guest task that lasts ticks/10 seconds; its output file is the list of all outputs made on this disk so far."""
    return (
        f"<task><virtualmachine>{vm}</virtualmachine><image>guest.vdi</image><hypervisor>qemu</hypervisor>"
        f"<memory_size_mb>{memory_mb}</memory_size_mb><application>ticker.py</application>"
        f"<copy_app_to_VM>1</copy_app_to_VM><command_line>{ticks} {out}</command_line>"
        f"<stdout_filename>stdout_{out}</stdout_filename><copy_file_from_VM>{out}</copy_file_from_VM>"
        "<fraction_done_filename>fraction_done</fraction_done_filename>"
        f"<minimum_checkpoint_interval>{interval_s}</minimum_checkpoint_interval>{more}</task>"
    )


def job(
    name: str, image: Path, tasks: Sequence[str], *, kind: str, outputs: Sequence[str] = ("out",), more: str = ""
) -> Job:
    """A job of the client: the wrapper as it stands here is its main program."""
    script = (
        f'#!/bin/sh\nexport PYTHONPATH="{ROOT}" VMWRAPPER_BOINC_RUNTIME={kind}\n'
        f'exec "{sys.executable}" -m vmwrapper "$@"\n'
    )
    xml = f"<job_desc>\n{HOST_MAIN_TASK}\n" + "\n".join(tasks) + f"\n{more}</job_desc>\n"
    files = [
        JobFile("job.xml", xml.encode()),
        JobFile("HostConfig.cfg", HOST_CONFIG, copied=True),
        JobFile("ticker.py", TICKER, executable=True),
        JobFile("guest.vdi", image),
    ]
    return Job(name, script.encode(), files=files, outputs=outputs)


class Messages:
    """The client's messages to one slot, with the time at which each was in shared memory. Looks 500 times a second."""

    def __init__(self, slot: Path) -> None:
        with (slot / "boinc_mmap_file").open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), channels.SEGMENT_BYTES, prot=mmap.PROT_READ)
        self._last = self._text()
        self._seen: list[tuple[float, str]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _text(self) -> bytes:
        return self._memory[1 : channels.CHANNEL_BYTES].split(b"\0")[0]

    def _look(self) -> None:
        while not self._over.wait(0.002):
            text = self._text()
            if text != self._last:
                self._last = text
                self._seen.append((time.time(), text.decode()))

    def time_of(self, message: str, limit_s: float = 10) -> float:
        """When the newest message with this text came; waits for one."""
        end = after(limit_s)
        while time.monotonic() < end:
            for at, text in reversed(self._seen):
                if message in text:
                    return at
            time.sleep(0.005)
        raise AssertionError(f"no {message} in {self._seen}")

    def forget(self) -> None:
        self._seen.clear()

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._memory.close()


def end_program(slot: Path) -> None:
    """ticker.py ends soon: a trickle-down message as the client gives it."""
    (slot / "trickle_down_1").write_text("that will do\n")
    with (slot / "boinc_mmap_file").open("r+b") as file, mmap.mmap(file.fileno(), channels.SEGMENT_BYTES) as memory:
        told = channels.Channels(memory).send(channels.Channel.TRICKLE_DOWN, channels.HAVE_TRICKLE_DOWN)
    assert told, "the wrapper has not read what came before"


def times_of(slot: Path, words: str, log: str = "stderr_HostMain") -> list[float]:
    """When HostMain logged these words (a regular expression), seconds since the epoch."""
    found = []
    for line in (slot / log).read_text(errors="replace").splitlines():
        if re.search(words, line):
            stamp = re.match(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) ", line)
            if stamp:
                found.append(datetime.strptime(stamp[1], "%Y-%m-%d %H:%M:%S,%f").timestamp())
    return found


def executions(console: str) -> list[tuple[str, int]]:
    """Each start of a command, as the guest's serial console recorded it: index of the task, attempt."""
    return [
        (match[1], int(match[2]))
        for match in re.finditer(r"guest\.commands\.runner: command \S+_(\d+)_[0-9a-f]{8} \(attempt (\d+)\): ", console)
    ]


def processes_in(slot: Path) -> list[psutil.Process]:
    """Live processes whose working folder is this slot."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(slot) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def wrapper_of(slot: Path) -> psutil.Process:
    """The wrapper's process in a slot."""
    for process in processes_in(slot):
        try:
            if process.cmdline()[1:3] == ["-m", "vmwrapper"]:
                return process
        except psutil.Error:
            continue
    raise AssertionError("no wrapper in the slot")


def qemu_of(slot: Path) -> psutil.Process:
    """The VM's process in a slot."""
    for process in processes_in(slot):
        try:
            if process.name().startswith("qemu-system"):
                return process
        except psutil.Error:
            continue
    raise AssertionError("no QEMU in the slot")


def wait_gone(process: psutil.Process, limit_s: float) -> float:
    """When it was gone, seconds since the epoch. A zombie that its parent has not fetched is gone."""
    end = after(limit_s)
    while time.monotonic() < end:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return time.time()
        except psutil.NoSuchProcess:
            return time.time()
        time.sleep(0.005)
    raise AssertionError(f"{process} is still there after {limit_s} s")


class Curve:
    """What boinccmd would show of a job, looked at again and again: nothing of it may go back."""

    def __init__(self, client: BoincClient, name: str) -> None:
        self._client, self._name = client, name
        self.points: list[tuple[float, float, float]] = []

    def look(self) -> None:
        result = self._client.result(self._name)
        if result.is_running:
            self.points.append((result.current_cpu_time, result.checkpoint_cpu_time, result.fraction_done))

    def assert_monotone(self) -> None:
        for before, later in zip(self.points, self.points[1:], strict=False):
            for then, now in zip(before, later, strict=True):
                assert now >= then - 0.011, (before, later)
