"""The container of a CMD_RUN."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcontrol.protocol.container import MOST_GROUPS, MOST_ID, ContainerRun
from vmcontrol.protocol.messages import CommandRun, decode, encode
from vmcontrol.protocol.text import BadMessage

MAC = "52:54:00:12:34:56"
DISK = "0123456789abcdef" * 4
GOOD: dict[str, Any] = {"disk": DISK, "workdir": "/app"}

ids = st.integers(0, MOST_ID)
names = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: name not in {".", "..", "proc", "sys", "dev"}
)
containers = st.builds(
    ContainerRun,
    disk=st.just(DISK),
    workdir=st.lists(names, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts)),
    uid=ids,
    gid=ids,
    groups=st.lists(ids, max_size=MOST_GROUPS).map(tuple),
    stop_signal=st.integers(1, 64),
    network=st.booleans(),
)


@given(containers)
def test_any_container_survives_the_wire(container: ContainerRun) -> None:
    run = CommandRun(MAC, "c1", "python3", ("main.py",), container=container)
    sent = encode(run)
    assert decode(sent.headers, sent.body) == run


def test_a_command_without_a_container_says_nothing_of_it() -> None:
    sent = encode(CommandRun(MAC, "c1", "ls"))
    assert "container" not in sent.body
    message = decode(sent.headers, sent.body)
    assert isinstance(message, CommandRun)
    assert message.container is None


def test_what_is_left_out_has_a_default() -> None:
    assert ContainerRun.from_json(GOOD) == ContainerRun(DISK, "/app", 0, 0, (), 15, False)


def test_protocol_1_has_no_containers() -> None:
    with pytest.raises(ValueError, match="protocol 1 has no containers"):
        encode(CommandRun(MAC, "c1", "ls", container=ContainerRun(DISK, "/app"), legacy=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"disk": DISK[1:]}, "no id of a container's disk"),
        ({"disk": DISK.upper()}, "no id of a container's disk"),
        ({"disk": DISK + "\n"}, "no id of a container's disk"),
        ({"disk": 5}, "disk is no text"),
        ({"workdir": ""}, "no plain absolute folder"),
        ({"workdir": "/"}, "no plain absolute folder"),
        ({"workdir": "app"}, "no plain absolute folder"),
        ({"workdir": "/app/../etc"}, "no plain absolute folder"),
        ({"workdir": "//app"}, "no plain absolute folder"),
        ({"workdir": "/app/"}, "no plain absolute folder"),
        ({"workdir": "/a\0b"}, "no plain absolute folder"),
        ({"workdir": "/\ud800"}, "is not UTF-8"),
        ({"workdir": "/" + "x" * 1024}, "1024 are taken"),
        ({"workdir": "/proc/self"}, "belongs to the system"),
        ({"workdir": "/dev"}, "belongs to the system"),
        ({"uid": -1}, "uid is no whole number"),
        ({"uid": 65536}, "uid is no whole number"),
        ({"uid": True}, "uid is no whole number"),
        ({"gid": "0"}, "gid is no whole number"),
        ({"groups": 5}, "groups is no list"),
        ({"groups": [True]}, "groups is no list"),
        ({"groups": [65536]}, "is not between"),
        ({"groups": [1] * 65}, "64 are taken"),
        ({"stop-signal": 0}, "there is no signal 0"),
        ({"stop-signal": 65}, "stop-signal is no whole number"),
        ({"network": 1}, "neither true nor false"),
        ({"privileged": True}, "'privileged' is not known"),
    ],
)
def test_nonsense_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadMessage, match=said):
        ContainerRun.from_json(GOOD | change)


@pytest.mark.parametrize("value", [None, [], "x", 5])
def test_it_is_an_object(value: object) -> None:
    with pytest.raises(BadMessage, match="no JSON object"):
        ContainerRun.from_json(value)
