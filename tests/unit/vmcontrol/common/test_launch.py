"""The exec helper: what the program it becomes finds, and that it does not outlive its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from vmcontrol.common import launch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the launcher was run on Linux only")

SHOW = "import os, signal, sys; print(os.getpid(), os.getsid(0), *sorted(signal.pthread_sigmask(0, [])), *sys.argv[1:])"


def test_the_program_runs_under_the_same_pid_with_signals_blocked_and_words_untouched() -> None:
    words, extra = launch.command([sys.executable, "-c", SHOW, "a b", "--", "ü\n"])
    assert extra == {}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        output = process.communicate(timeout=30)[0]
    blocked = sorted([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    pid = process.pid
    assert output == f"{pid} {pid} {' '.join(str(int(number)) for number in blocked)} a b -- ü\n\n"


def test_without_a_session_it_stays_in_ours() -> None:
    words, _ = launch.command([sys.executable, "-c", SHOW], session=False)
    output = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout
    assert int(output.split()[1]) == os.getsid(0)


def test_ignored_signals_are_not_handed_on() -> None:
    words, _ = launch.command(["grep", "SigIgn", "/proc/self/status"])
    output = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout
    ignored = int(output.split()[1], 16)
    assert not ignored & (1 << (signal.SIGPIPE - 1))


def test_inherited_files_stay_open() -> None:
    ours, theirs = os.pipe()
    words, _ = launch.command([sys.executable, "-c", f"import os; os.write({theirs}, b'here')"])
    subprocess.run(words, pass_fds=[theirs], timeout=30, check=True)
    os.close(theirs)
    with os.fdopen(ours) as file:
        assert file.read() == "here"


@pytest.mark.parametrize("program", ["no-such-program", "/etc/passwd"])
def test_what_cannot_be_executed_is_said(program: str) -> None:
    words, _ = launch.command([program])
    result = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert result.returncode == (launch.NOT_FOUND if program.startswith("no") else launch.NOT_EXECUTABLE)
    assert program in result.stderr


def test_a_parent_that_is_gone_already_ends_it_at_once() -> None:
    words, _ = launch.command(["sleep", "60"])
    words = [f"--parent={2**22 - 3}" if word.startswith("--parent=") else word for word in words]
    assert subprocess.run(words, timeout=30).returncode == launch.PARENT_GONE


def test_it_dies_with_its_parent() -> None:
    script = (
        "import subprocess, sys\nfrom vmcontrol.common import launch\n"
        "child = subprocess.Popen(launch.command(['sh', '-c', 'echo ready; exec sleep 60'])[0], stdout=1)\n"
        "print(child.pid, file=sys.stderr, flush=True)\nchild.wait()"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stderr is not None
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stderr.readline()))
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
    assert psutil.wait_procs([child], timeout=5)[0]


def test_a_frozen_program_becomes_the_launcher_by_a_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", "/opt/vmwrapper")
    words, extra = launch.command(["true", "x"])
    assert words == ["/opt/vmwrapper", "true", "x"]
    seen: list[list[str]] = []
    monkeypatch.setattr(launch, "main", lambda arguments: seen.append(list(arguments)))
    launch.run_if_asked(words[1:], {})
    assert seen == []
    launch.run_if_asked(words[1:], extra)
    assert seen == [["--launch", "--session", f"--parent={os.getpid()}", "--", "true", "x"]]
