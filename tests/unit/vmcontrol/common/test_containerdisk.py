"""vmcontrol.common.containerdisk: what is written is read again, out of a VDI and raw, and no bytes are trusted."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcontrol.common.containerdisk import (
    HEADER_AT,
    MAGIC,
    BadContainerDisk,
    ContainerConfig,
    ContainerDisk,
    encode,
    parse,
    read,
)

DISK = ContainerDisk(
    "ab" * 32, "myapp:1.0", "amd64", 12, 3456,
    ContainerConfig(("python",), ("main.py",), ("A=ü",), "/app", "app", 7, 8, (9,), "SIGINT", {"a": "b"}),
)  # fmt: skip


def first_bytes(header: bytes) -> bytes:
    return (bytes(HEADER_AT) + header).ljust(1 << 20, b"\0")


def vdi(content: bytes, block: int = 1 << 20) -> bytes:
    header = bytearray(0x200)
    struct.pack_into("<I", header, 0x40, 0xBEDA107F)
    struct.pack_into("<II", header, 0x154, 0x200, 0x1000)
    struct.pack_into("<QIII", header, 0x170, 2 << 20, block, 0, 2)
    return bytes(header) + struct.pack("<II", 1, 0) + bytes(0x1000 - 0x208) + bytes(1 << 20) + content


def said(**changes: Any) -> bytes:
    value = asdict(DISK)
    config = {name: changes.pop(name) for name in tuple(changes) if name in value["config"]}
    text = json.dumps(value | changes | {"config": value["config"] | config}).encode()
    return first_bytes(MAGIC + b"%d\n" % len(text) + text)


def test_it_is_read_again_raw_and_out_of_a_vdi(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    for content in (first_bytes(encode(DISK)), vdi(first_bytes(encode(DISK)))):
        path.write_bytes(content)
        assert read(path) == DISK
    assert encode(DISK) == encode(parse(first_bytes(encode(DISK))))


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "x"}, {"image": 5}, {"entries": -1}, {"unpacked_bytes": True}, {"config": None}, {"uid": 65536},
        {"uid": "0"}, {"gid": -1}, {"groups": [True]}, {"groups": list(range(65))}, {"entrypoint": "sh"}, {"cmd": [1]},
        {"env": ["a\0b"]}, {"workdir": "\ud800"}, {"labels": {"a": 1}}, {"stop_signal": None},
    ],
)  # fmt: skip
def test_what_is_of_another_type_is_refused(changes: dict[str, Any]) -> None:
    if "config" in changes:
        text = json.dumps(asdict(DISK) | changes).encode()
        raw = first_bytes(MAGIC + b"%d\n" % len(text) + text)
    else:
        raw = said(**changes)
    with pytest.raises(BadContainerDisk):
        parse(raw)


def test_a_user_that_the_image_does_not_have_is_none() -> None:
    assert parse(said(uid=None, gid=None)).config.uid is None


@pytest.mark.parametrize("content", [b"", b"x" * 9000, vdi(b"")[:0x150], vdi(b""), vdi(first_bytes(b""), block=512)])
def test_another_file_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "disk").write_bytes(content)
    with pytest.raises(BadContainerDisk):
        read(tmp_path / "disk")


@given(st.binary(max_size=400), st.integers(0, 800))
def test_damage_is_told_or_read(damage: bytes, at: int) -> None:
    raw = bytearray(first_bytes(encode(DISK)))
    raw[HEADER_AT + at : HEADER_AT + at + len(damage)] = damage
    try:
        assert isinstance(parse(bytes(raw)), ContainerDisk)
    except BadContainerDisk as error:
        assert str(error)  # noqa: PT017
