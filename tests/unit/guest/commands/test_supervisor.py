"""The supervisor of one command, as a process: what it does with what the agent says to it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from guest.commands.runner import SUPERVISOR
from guest.commands.supervisor import pack, unpack
from tests.support.limits import after


def told(folder: Path, command: list[str], *more: dict[str, Any]) -> dict[str, Any]:
    """The supervisor's last message, when request and more are written in one piece and the pipe then stays open."""
    request = {
        "command": command[0],
        "arguments": command[1:],
        "environment": {},
        "folder": str(folder),
        "places": [str(folder)],
        "stdin": "",
        "stdout": str(folder / "out"),
        "stderr": str(folder / "err"),
        "fraction_done_file": "",
    }
    with subprocess.Popen([sys.executable, *SUPERVISOR], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(b"".join(map(pack, [request, *more])))
            process.stdin.flush()
            said = process.stdout.read()
        finally:
            process.stdin.close()
    message: dict[str, Any] | None = {}
    while said:
        message, said = unpack(said)
        assert message is not None
    assert message is not None
    return message


def test_a_cancel_in_one_piece_with_the_request_is_obeyed(tmp_path: Path) -> None:
    began = time.monotonic()
    ended = told(tmp_path, ["sleep", "20"], {"cancel": 15.0})["ended"]
    assert time.monotonic() - began < 10
    assert (ended["cancelled"], ended["signal"]) == (True, signal.SIGTERM)


def test_the_shortest_grace_of_several_cancels_counts(tmp_path: Path) -> None:
    began = time.monotonic()
    stubborn = ["sh", "-c", "trap '' TERM; sleep 20"]
    ended = told(tmp_path, stubborn, {"cancel": 15.0}, {"cancel": 0.2}, {"cancel": 15.0})["ended"]
    assert time.monotonic() - began < 10
    assert ended["cancelled"]
    assert ended["signal"] in (signal.SIGTERM, signal.SIGKILL)  # TERM may come before the shell has set its trap


WORKER = (
    "trap 'echo asked >> asked; exit' TERM; echo > ready; while [ ! -e save ]; do sleep 0.02; done;"
    " sleep 0.4; echo > saved"
)


def launcher(trap: str) -> list[str]:
    """A shell with a worker; it is told to end as soon as the worker is ready."""
    script = f'{trap}sh -c "{WORKER}" & while [ ! -e ready ]; do sleep 0.02; done; echo > told; wait; wait'
    return ["sh", "-c", script]


def cancelled_when_ready(folder: Path, command: list[str], grace_s: float) -> tuple[dict[str, Any], float]:
    """How it ended, and seconds from the cancel."""
    request = {
        "command": command[0], "arguments": command[1:], "environment": {}, "folder": str(folder),
        "places": [str(folder)], "stdin": "", "stdout": str(folder / "out"), "stderr": str(folder / "err"),
        "fraction_done_file": "",
    }  # fmt: skip
    with subprocess.Popen([sys.executable, *SUPERVISOR], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(pack(request))
            process.stdin.flush()
            end = after(10)
            while not (folder / "told").exists():
                assert time.monotonic() < end
                time.sleep(0.01)
            began = time.monotonic()
            process.stdin.write(pack({"cancel": grace_s}))
            process.stdin.flush()
            said = process.stdout.read()
        finally:
            process.stdin.close()
    message: dict[str, Any] | None = {}
    while said:
        message, said = unpack(said)
    assert message is not None
    return message["ended"], time.monotonic() - began


def test_a_launcher_asks_its_worker_to_save(tmp_path: Path) -> None:
    ended, _ = cancelled_when_ready(tmp_path, launcher("trap 'echo > save; wait; exit 3' TERM; "), 15.0)
    assert (ended["exit_status"], ended["left"]) == (3, 0)
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "asked").exists()


def test_the_worker_of_a_launcher_that_dies_at_once_is_asked_once(tmp_path: Path) -> None:
    ended, took_s = cancelled_when_ready(tmp_path, launcher(""), 15.0)
    assert ended["signal"] == signal.SIGTERM
    assert (tmp_path / "asked").read_text() == "asked\n"
    assert took_s < 5


def test_all_are_asked_after_two_thirds_of_a_short_grace(tmp_path: Path) -> None:
    ended, took_s = cancelled_when_ready(tmp_path, launcher("trap : TERM; "), 1.5)
    assert ended["exit_status"] == 0
    assert (tmp_path / "asked").read_text() == "asked\n"
    assert 0.9 < took_s < 4
