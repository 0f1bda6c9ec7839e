"""A container's configuration, and requests of an agent that may be anybody."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest.containers import mounts, spec
from vmcontrol.protocol.text import BadMessage

DISK = "ab" * 32
GOOD: dict[str, Any] = {"container": {"disk": DISK, "workdir": "/app"}, "arguments": ["sh"], "environment": {}}


def made(request: spec.Request) -> Any:
    return spec.configuration(request, root="/r", work="/w", etc="/e", cgroup="/c", masked=("/app/.vmwrapper",))


@given(st.integers(0, 65535), st.integers(0, 65535))
def test_an_id_map_holds_each_id_once_and_as_the_disk_has_it(user: int, own: int) -> None:
    ranges = spec.id_map(user)
    assert sum(one["size"] for one in ranges) == spec.IDS
    (found,) = [one for one in ranges if one["containerID"] <= own < one["containerID"] + one["size"]]
    assert found["hostID"] + own - found["containerID"] == spec.guest_id(own, user)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda t: st.lists(t) | st.dictionaries(st.text(), t)
    )
)
def test_nonsense_is_refused_and_nothing_else_is_raised(value: Any) -> None:
    for request in (value, GOOD | {"container": value}, GOOD | {"arguments": value}, GOOD | {"environment": value}):
        try:
            read = spec.read_request(json.dumps(request).encode())
        except BadMessage:
            continue
        assert made(read)["process"]["args"] == list(read.arguments)


@pytest.mark.parametrize(
    "change",
    [{"arguments": []}, {"arguments": [""]}, {"arguments": ["a\0"]}, {"environment": {"A=B": "1"}}, {"mounts": []}],
)
def test_what_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadMessage):
        spec.read_request(json.dumps(GOOD | change).encode())


def test_the_template() -> None:
    made_of = made(spec.read_request(json.dumps(GOOD).encode()))
    assert {one["type"] for one in made_of["linux"]["namespaces"]} == set(spec.NAMESPACES)
    assert "CAP_SYS_ADMIN" not in made_of["process"]["capabilities"]["bounding"]
    assert "/app/.vmwrapper" in made_of["linux"]["maskedPaths"]
    seccomp = made_of["linux"]["seccomp"]
    allowed = {name for rule in seccomp["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}
    assert seccomp["defaultAction"] == "SCMP_ACT_ERRNO"
    assert not allowed & {"mount", "bpf", "setns", "unshare", "keyctl", "init_module", "reboot", "io_uring_setup"}
    assert "clone3" not in allowed


@given(st.binary(max_size=300))
def test_a_disk_that_is_no_containers(raw: bytes) -> None:
    for content in (raw, b"vmwrapper container 1 %d\n" % len(raw) + raw):
        with contextlib.suppress(BadMessage, ValueError):
            assert mounts.disk_id(content) is None
