"""The lab cleans up after test runs that were killed, and only after those."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.virtualbox_world import the_lab
from tests.virtualbox.lab import CHECKOUT, end_stale

pytestmark = pytest.mark.virtualbox

RUN = """
import os, subprocess, sys
from pathlib import Path
from tests.virtualbox.lab import lab

here = lab()
with here.home(Path(sys.argv[1])) as environment:
    make = ["createvm", "--name", "x", "--register", "--basefolder", sys.argv[1]]
    for words in (make, ["startvm", "x", "--type=headless"]):
        subprocess.run([here.vboxmanage, *words], env=environment, check=True, stdout=subprocess.DEVNULL)
    print(environment["VBOX_IPC_SOCKETID"], flush=True)
    sys.stdin.read()
"""


def marked(mark: str) -> set[str]:
    """Names of the processes of a home."""
    found = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get("VBOX_IPC_SOCKETID") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.name())
        except psutil.Error:
            continue
    return found


def test_what_a_killed_run_left_is_ended_by_the_next(tmp_path: Path) -> None:
    the_lab()
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path / "home")],
        cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert run.stdout is not None
        mark = run.stdout.readline().strip()
        assert {"VBoxSVC", "VBoxHeadless"} <= marked(mark)
        end_stale()
        assert {"VBoxSVC", "VBoxHeadless"} <= marked(mark), "that run is still there"
    finally:
        run.kill()
        run.communicate()
    assert {"VBoxSVC", "VBoxHeadless"} <= marked(mark), "nobody else ends them"
    end_stale()
    assert marked(mark) == set()
    assert not Path(f"/tmp/.vbox-{mark}-ipc").exists()
