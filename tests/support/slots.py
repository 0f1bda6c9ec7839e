"""Slots for tests: laid out by hand, the wrapper started in them as a program, and what it left looked at."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.support.limits import after, stretched
from vmwrapper.boinc import channels

DRIVER = Path(__file__).with_name("drive_wrapper.py")
HOST_MAIN_TASK = (
    "<VMmanage_task><application>HostMain</application><command_line>./HostConfig.cfg</command_line>"
    "<stdout_filename>stdout_HostMain</stdout_filename><stderr_filename>stderr_HostMain</stderr_filename></VMmanage_task>"
)


ONCE = frozenset({"kill", "die", "vm_dies", "agent_dies", "hush", "faults", "cannot_begin"})
"""Parts of a plan that are taken out when they happen (tests/support/fake_hostmain.py)."""


class TestSlot:
    """A slot directory and the programs that were started in it."""

    __test__ = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []

    def write(self, name: str, text: str, *, executable: bool = False) -> Path:
        path = self.folder / name
        path.write_text(text)
        if executable:
            path.chmod(0o755)
        return path

    def text(self, name: str) -> str:
        return (self.folder / name).read_text()

    def job(self, *elements: str) -> None:
        self.write("job.xml", "<job_desc>\n" + "\n".join(elements) + "\n</job_desc>\n")

    def plan(self, **plan: Any) -> None:
        """What the scripted HostMain is to do wrong. What an earlier plan expected must have happened."""
        assert not self.unused_plan()
        self.write("fake_plan.json", json.dumps(plan))

    def plan_is_used_up(self) -> bool:
        return not any(value for key, value in self._left_of_plan().items() if key != "lifeline")

    def unused_plan(self) -> dict[str, Any]:
        """What was to happen once and has not: the test would show nothing of it."""
        return {key: value for key, value in self._left_of_plan().items() if key in ONCE and value}

    def _left_of_plan(self) -> dict[str, Any]:
        path = self.folder / "fake_plan.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def start(
        self, *words: str, program: list[str] | None = None, stderr: Any = subprocess.DEVNULL, **environment: str
    ) -> subprocess.Popen[bytes]:
        command = program or [sys.executable, str(DRIVER)]
        root = str(Path(__file__).parents[2])
        process = subprocess.Popen(
            [*command, *words],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": root, "VMWRAPPER_BOINC_RUNTIME": "python", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, *words: str, limit_s: float = 30, program: list[str] | None = None, **environment: str) -> int:
        """The exit status; negative: a signal."""
        return self.start(*words, program=program, **environment).wait(stretched(limit_s))

    def run_to_the_end(self, *words: str, tries: int = 6) -> int:
        """As the client does: started again after a kill."""
        for _ in range(tries):
            status = self.run(*words)
            if status >= 0:
                return status
        raise AssertionError("killed again and again")

    def wait_for(self, name: str, text: str = "", limit_s: float = 20) -> None:
        """Until a file is there and has this in it."""
        end = after(limit_s)
        while time.monotonic() < end:
            path = self.folder / name
            if path.exists() and text in path.read_text(errors="replace"):
                return
            time.sleep(0.02)
        story = self.text("stderr.txt") if (self.folder / "stderr.txt").exists() else ""
        raise AssertionError(f"no {text!r} in {name}; stderr.txt:\n{story}")

    def leftovers(self) -> list[psutil.Process]:
        """Processes whose working folder is this slot."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def assert_nothing_runs(self, limit_s: float = 5) -> None:
        end = after(limit_s)
        while left := self.leftovers():
            assert time.monotonic() < end, [process.cmdline() for process in left]
            time.sleep(0.05)

    def clean(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
        for left in self.leftovers():
            left.kill()
        assert not self.unused_plan()


def is_frozen(pid: int) -> bool:
    """Whether a process stands because its control group is frozen."""
    try:
        group = next(line[3:] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if line[:3] == "0::")
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        root = next(line.split()[4] for line in mounts if " - cgroup2 " in line)
        return "frozen 1" in (Path(root) / group.lstrip("/") / "cgroup.events").read_text()
    except (OSError, StopIteration):
        return False


def ten_times_as_fast() -> list[str]:
    """The wrapper as a program whose patience with programs that are to end, or that are left, is a tenth."""
    script = (
        "import sys\n"
        "from vmwrapper.process.patience import Patience\n"
        "from vmwrapper.cli.main import main\n"
        "Patience.scale = 0.1\n"
        "sys.exit(main())\n"
    )
    return [sys.executable, "-c", script]


class PlayedClient:
    """The client's side of a slot: init_data.xml and the shared memory, played by the test."""

    def __init__(self, slot: TestSlot, *, result: str = "result_0", more: str = "") -> None:
        """more: further elements of init_data.xml."""
        with (slot.folder / "boinc_mmap_file").open("wb+") as file:
            file.truncate(channels.SEGMENT_BYTES)
            self._memory = mmap.mmap(file.fileno(), channels.SEGMENT_BYTES)
        self._channels = channels.Channels(self._memory)
        slot.write(
            "init_data.xml",
            f"<app_init_data>\n<result_name>{result}</result_name>\n<slot>0</slot>\n<shm_key>-1</shm_key>\n"
            f"<client_pid>{os.getpid()}</client_pid>\n<checkpoint_period>1</checkpoint_period>\n"
            f"{more}</app_init_data>\n",
        )

    def say(self, message: str, channel: channels.Channel = channels.Channel.PROCESS_CONTROL_REQUEST) -> None:
        """To process control, or in another channel."""
        end = after(10)
        while not self._channels.send(channel, message):
            assert time.monotonic() < end, "the wrapper does not read"
            time.sleep(0.01)

    def beat(self, text: str) -> None:
        """A heartbeat with something in it."""
        self._channels.replace(channels.Channel.HEARTBEAT, f"<heartbeat/>\n{text}\n")

    def hears(self, channel: channels.Channel, limit_s: float = 15) -> str:
        """The next message of the wrapper in a channel."""
        end = after(limit_s)
        while (text := self._channels.receive(channel)) is None:
            assert time.monotonic() < end, f"nothing in {channel.name}"
            time.sleep(0.01)
        return text

    def last(self, channel: channels.Channel) -> str:
        """What stands in a channel, read already or not; empty when nothing was ever written."""
        return self._channels.text(channel)

    def status(self, limit_s: float = 10) -> str:
        """The next report of the wrapper."""
        self._channels.receive(channels.Channel.APP_STATUS)
        end = after(limit_s)
        while (text := self._channels.receive(channels.Channel.APP_STATUS)) is None:
            assert time.monotonic() < end, "the wrapper does not report"
            time.sleep(0.01)
        return text
