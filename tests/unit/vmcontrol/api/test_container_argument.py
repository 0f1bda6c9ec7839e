"""runCommand's `container`: what a caller may send, and how the refusal reads."""

from __future__ import annotations

from typing import Any

import pytest

from vmcontrol.api.arguments import BadArgument, command_request
from vmcontrol.protocol.container import ContainerRun

DISK = "ab" * 32


def request(**container: Any) -> ContainerRun | None:
    return command_request({"id": "c", "command": "run", "container": container}, "request").container


def test_a_command_without_one_runs_in_the_guest() -> None:
    assert command_request({"id": "c", "command": "run"}, "request").container is None
    assert command_request({"id": "c", "command": "run", "container": None}, "request").container is None


def test_it_is_read_whole() -> None:
    read = request(disk=DISK, workdir="/app", uid=7, gid=8, groups=[9], stop_signal=2, network=True)
    assert read == ContainerRun(DISK, "/app", 7, 8, (9,), 2, True)
    assert request(disk=DISK, workdir="/app") == ContainerRun(DISK, "/app")


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"disk": DISK},
        {"disk": "AB" * 32, "workdir": "/app"},
        {"disk": DISK, "workdir": "app"},
        {"disk": DISK, "workdir": "/app", "uid": -1},
        {"disk": DISK, "workdir": "/app", "uid": "0"},
        {"disk": DISK, "workdir": "/app", "groups": "1"},
        {"disk": DISK, "workdir": "/app", "network": 1},
        {"disk": DISK, "workdir": "/app", "stop_signal": 65},
        {"disk": DISK, "workdir": "/app", "privileged": True},
    ],
)
def test_what_no_guest_would_take_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadArgument, match="container"):
        request(**wrong)


def test_it_is_a_struct() -> None:
    with pytest.raises(BadArgument, match="container: expected a struct"):
        command_request({"id": "c", "command": "run", "container": "app"}, "request")
