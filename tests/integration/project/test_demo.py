"""The example as people run it, to its end, interrupted and refused; and the set-up where it may not install.

./demo is tools/setup and then tools/demo.py; the tests run under ./check, which has done the set-up.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from guest.image import build
from tests.support.limits import after
from tests.support.owned import owned
from tests.support.slots import TestSlot
from vmcontrol.common import virtualbox
from vmwrapper.context.timeline import STAGES

ROOT = Path(__file__).parents[3]
RUN_LIMIT_S = 200
A_BAR = re.compile(r"\[#+\.+\] +\d+\.\d %  task 1 of 1")
NOBODY = 65534


def with_guest(test: Callable[..., None]) -> Callable[..., None]:
    """A test that boots one."""
    missing = shutil.which("qemu-system-x86_64") is None
    for mark in (
        pytest.mark.qemu,
        pytest.mark.slow,
        pytest.mark.skipif(missing, reason="package qemu-system-x86 is not installed"),
    ):
        test = mark(test)
    return test


class Demo:
    """Runs of tools/demo.py. Without --slot its slot is below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.slot = TestSlot(folder / "slot")
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *words: str, stderr: Any = subprocess.PIPE) -> subprocess.Popen[str]:
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which is inherited
        try:
            started = subprocess.Popen(
                owned([sys.executable, str(ROOT / "tools" / "demo.py"), *words], "TERM"),
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        finally:
            signal.signal(signal.SIGHUP, before)
        self._started.append(started)
        return started

    def run(self, *words: str) -> tuple[int, str, str]:
        """Exit status (negative: a signal), stdout, stderr."""
        started = self.start(*words)
        out, err = started.communicate(timeout=RUN_LIMIT_S)
        return started.returncode, out, err

    def temporary_slots(self) -> list[Path]:
        return list(self.folder.glob("vmwrapper-demo-*"))

    def clean(self) -> None:
        for started in self._started:
            if started.poll() is None:
                started.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.communicate(timeout=30)
        self.slot.clean()


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    demo = Demo(tmp_path)
    yield demo
    demo.clean()


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, list[str]]]:
    """A pseudo-terminal: the end to write to, and what came out of the other one."""
    ours, theirs = pty.openpty()
    seen: list[str] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
            while data := os.read(ours, 65536):
                seen.append(data.decode(errors="replace"))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield theirs, seen
    finally:
        os.close(theirs)
        reader.join(10)
        os.close(ours)


def assert_results(text: str) -> None:
    assert "--- out\nTHIS FILE IS CALLED IN. " in text
    assert "--- stdout_worker\nSTANDARD INPUT OF THE WORKER" in text
    assert "--- stderr_worker\nworker: " in text


def timeline(story: str) -> dict[str, float]:
    told = re.search(r"done: (.* s)$", story, re.MULTILINE)
    assert told is not None, story
    return {name.strip(" ,"): float(seconds) for name, seconds in re.findall(r"([A-Za-z ,]+?) ([\d.]+) s", told[1])}


@with_guest
def test_from_the_start_to_the_results_and_again(demo: Demo) -> None:
    """With a terminal there is a bar. The same command in the finished slot ends at once, whatever is left there."""
    words = ("--slot", "slot", "--hypervisor", "qemu")
    with terminal() as (end, seen):
        started = demo.start(*words, stderr=end)
        out, _ = started.communicate(timeout=RUN_LIMIT_S)
    shown = "".join(seen)
    assert started.returncode == 0, shown
    assert A_BAR.search(shown), shown
    assert_results(out)
    stages = timeline(shown.replace("\r\n", "\n"))
    assert set(stages) == set(STAGES)
    assert list(stages.values()) == sorted(stages.values())
    in_order = [stage for stage in stages if stage not in ("broker ready", "VM booted")]  # these two go side by side
    assert in_order == [stage for stage in STAGES if stage in in_order]
    for name in ("out", "stdout_worker", "stderr_worker", "stderr.txt"):
        assert demo.slot.text(name)
    assert demo.slot.text("boinc_finish_called").startswith("0")
    demo.slot.assert_nothing_runs(0.5)

    (demo.slot.folder / "stderr_worker").unlink()
    status, out, err = demo.run(*words)
    assert (status, "finished already" in err) == (0, True), err
    assert "waiting for" not in err
    assert "--- out\nTHIS FILE" in out
    assert "--- stderr_worker\n(cannot be shown: No such file or directory)" in out


@with_guest
def test_ctrl_c_and_the_same_command_go_on_where_it_was(demo: Demo) -> None:
    words = ("--slot", "slot", "--hypervisor", "qemu")
    started = demo.start(*words)
    demo.slot.folder.mkdir(exist_ok=True)
    demo.slot.wait_for("stderr.txt", "running ./worker.py", limit_s=120)
    time.sleep(1)
    os.killpg(started.pid, signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == -signal.SIGINT, err
    assert "demo: interrupted; the same command goes on where it stopped" in out
    assert list(demo.slot.folder.glob("vm/*/saved.state"))
    assert not (demo.slot.folder / "out").exists()
    demo.slot.assert_nothing_runs(0.5)

    status, out, err = demo.run(*words)
    assert status == 0, err
    assert_results(out)
    assert "%" not in err, "no bar where nobody watches"
    assert "its saved state is resumed" in err
    assert "the guest has ./worker.py (attempt 1): running" in err
    assert "rollback" not in err
    assert demo.slot.text("stderr_worker").count("worker: ") == 1
    demo.slot.assert_nothing_runs(0.5)


@with_guest
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything_and_takes_the_temporary_slot_away(demo: Demo, number: signal.Signals) -> None:
    started = demo.start("--hypervisor", "qemu")
    below: list[psutil.Process] = []
    end = after(60)
    while not any("qemu-system" in process.name() for process in below):
        assert time.monotonic() < end, "no QEMU"
        assert started.poll() is None
        time.sleep(0.1)
        with contextlib.suppress(psutil.Error):
            below = psutil.Process(started.pid).children(recursive=True)
    started.send_signal(number)
    out, err = started.communicate(timeout=60)
    assert started.returncode == -number, err
    assert f"ending: signal {number.name}" in err
    assert "demo: interrupted" in out
    assert not [process for process in below if process.is_running()]
    assert demo.temporary_slots() == []


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="package qemu-utils is not installed")
def test_a_signal_while_the_slot_is_laid_out(demo: Demo) -> None:
    """The image is being waited for: another program makes it just now."""
    with build.locked((ROOT / ".cache" / "guest-image").resolve()):
        started = demo.start()
        assert started.stdout is not None
        assert "the guest image" in started.stdout.readline()
        time.sleep(0.5)
        started.send_signal(signal.SIGTERM)
        _, err = started.communicate(timeout=20)
    assert (started.returncode, err) == (-signal.SIGTERM, "")
    assert demo.temporary_slots() == []


@pytest.mark.skipif(virtualbox.program() is not None, reason="VirtualBox is installed")
def test_a_hypervisor_that_is_not_there(demo: Demo) -> None:
    status, out, err = demo.run("--hypervisor", "virtualbox")
    assert status == 208
    assert [line for line in err.splitlines() if "VirtualBox is not installed" in line] == err.splitlines()[-1:]
    assert "---" not in out
    assert demo.temporary_slots() == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--slot", "a_file"], "a_file: cannot be used as a folder"),
        (["--slot", "a_file/below"], "a_file/below: cannot be used as a folder"),
        (["--slot", ""], "--slot: the name of a folder is expected"),
        (["--slot"], "--slot: expected one argument"),
        (["--hypervisor", "hyper-v"], "invalid choice: 'hyper-v'"),
        (["more"], "unrecognized arguments: more"),
    ],
)
def test_wrong_arguments_are_one_line(demo: Demo, words: list[str], told: str) -> None:
    (demo.folder / "a_file").write_text("")
    status, out, err = demo.run(*words)
    assert (status, out, err.count("\n")) == (206, "", 1), err
    assert told in err
    assert demo.temporary_slots() == []


def test_a_slot_in_which_a_file_cannot_be_laid_out(demo: Demo) -> None:
    (demo.slot.folder / "job.xml").mkdir(parents=True)
    status, _, err = demo.run("--slot", "slot")
    assert (status, err.count("\n")) == (206, 1), err
    assert "cannot be laid out" in err
    assert "job.xml" in err


def test_help_needs_no_set_up_and_says_what_there_is(tmp_path: Path) -> None:
    done = subprocess.run([str(ROOT / "demo"), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--slot DIR" in done.stdout


def everything(folder: Path) -> Mapping[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.skipif(shutil.which("dpkg-query") is None or shutil.which("setpriv") is None, reason="not Debian")
@pytest.mark.parametrize(
    ("missing", "lists", "told"),
    [
        ("lz4", "yes", ["these Debian packages are missing", "neither root nor may I use sudo: lz4"]),
        ("", "no", ["apt has no package lists: somebody must run apt-get update"]),
    ],
)
def test_the_set_up_names_what_is_missing_and_stops(missing: str, lists: str, told: list[str]) -> None:
    """Neither root nor allowed to use sudo: nothing is installed, downloaded or written."""
    with tempfile.TemporaryDirectory() as name:  # tmp_path is closed to other users
        checkout = Path(name)
        checkout.chmod(0o755)
        (checkout / "tools").mkdir()
        shutil.copy(ROOT / "tools" / "setup", checkout / "tools" / "setup")
        shutil.copy(ROOT / "pyproject.toml", checkout / "pyproject.toml")
        programs = checkout / "programs"
        programs.mkdir()
        for program, text in {
            "dpkg-query": f'[ "$3" != "{missing}" ] && printf installed',
            "apt-cache": f"[ {lists} = yes ]",
            "sudo": f'echo "sudo $*" >>{checkout}/calls; exit 1',
            "apt-get": f'echo "apt-get $*" >>{checkout}/calls',
            "python3": f'echo "python3 $*" >>{checkout}/calls',
        }.items():
            (programs / program).write_text(f"#!/bin/sh\n{text}\n")
            (programs / program).chmod(0o755)
        (checkout / "calls").touch()
        as_user = []
        if os.geteuid() == 0:
            as_user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
            for path in (checkout, *checkout.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        before = everything(checkout)
        done = subprocess.run(
            [*as_user, str(checkout / "tools" / "setup"), "demo"],
            env={"PATH": f"{programs}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=30,
        )
        after = everything(checkout)
        assert (checkout / "calls").read_text() == "sudo -n true\n"
    assert done.returncode == 1
    for words in told:
        assert words in done.stderr
    calls = str(checkout / "calls")
    assert {**after, calls: b""} == before
