"""The keeper of one command, as a process: what it does with what the agent says to it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from guest.keeper import pack, unpack
from guest.runner import _KEEPER


def told(folder: Path, command: list[str], *more: dict[str, Any]) -> dict[str, Any]:
    """The keeper's last word, when the request and more are written in one piece and the pipe then stays open."""
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
    with subprocess.Popen([sys.executable, *_KEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        try:
            keeper.stdin.write(b"".join(map(pack, [request, *more])))
            keeper.stdin.flush()
            said = keeper.stdout.read()
        finally:
            keeper.stdin.close()
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
