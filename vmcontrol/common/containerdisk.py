"""The header of a container's disk: whose container it is, and what its image says of running it.

    read        out of a VDI, or of the raw disk
    parse       out of the disk's first bytes
    encode      the bytes that stand from HEADER_AT on

A disk is a partition table, this header in the gap before the first partition, and the partition: a squashfs with the
container's root. The header is a line, MAGIC and the length, and so many bytes of JSON. Whoever made the disk is not
trusted: everything is bounded, and of its type, or BadContainerDisk.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

HEADER_AT = 4096
HEADER_LIMIT = 512 * 1024
"""Bytes of JSON."""
FIRST_BYTES = 1024 * 1024
"""Of the disk, before the partition."""
MAGIC = b"vmwrapper container 1 "
FIRST_ID, IDS, VM_ID = 100_000, 65_536, 1000
"""In the squashfs: the id 0 of the container, how many there are, and the id of the user that the image names."""
MOST_TEXTS, MOST_GROUPS, TEXT_LIMIT = 4096, 64, 128 * 1024

_LINE = re.compile(re.escape(MAGIC) + rb"([0-9]{1,6})\n")
_ID = re.compile(r"[0-9a-f]{64}")
_VDI_AT, _VDI = 0x40, b"\x7f\x10\xda\xbe"
_VDI_TABLE_LIMIT = 1 << 22
"""Blocks: 4 TiB."""


class BadContainerDisk(Exception):  # noqa: N818
    """It is no disk of a container, or one that nobody can read; `str` is a sentence without its name."""


@dataclass(frozen=True, slots=True)
class ContainerConfig:
    """What the image says of running it."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    workdir: str = ""
    user: str = ""
    """As the image names it."""
    uid: int | None = 0
    """None: the image has no such user."""
    gid: int | None = 0
    groups: tuple[int, ...] = ()
    stop_signal: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ContainerDisk:
    """A container's disk."""

    id: str
    """SHA-256, hex, of its content."""
    image: str
    """Name and tag."""
    architecture: str = "amd64"
    entries: int = 0
    unpacked_bytes: int = 0
    config: ContainerConfig = field(default_factory=ContainerConfig)


def encode(disk: ContainerDisk) -> bytes:
    """The header. Raises BadContainerDisk when it is too large."""
    said = json.dumps(asdict(disk), sort_keys=True, ensure_ascii=False).encode()
    if len(said) > HEADER_LIMIT:
        raise BadContainerDisk(f"its configuration has {len(said)} bytes, more than {HEADER_LIMIT}")
    return MAGIC + b"%d\n" % len(said) + said


def read(path: Path) -> ContainerDisk:
    """Raises BadContainerDisk and OSError."""
    with path.open("rb") as file:
        start = file.read(0x200)
        if start[_VDI_AT : _VDI_AT + len(_VDI)] != _VDI:
            file.seek(0)
            return parse(file.read(FIRST_BYTES))
        return parse(_first_of_vdi(file, start))


def _first_of_vdi(file: BinaryIO, header: bytes) -> bytes:
    try:
        table_at, data_at = struct.unpack_from("<II", header, 0x154)
        size, block, extra, blocks = struct.unpack_from("<QIII", header, 0x170)
    except struct.error:
        raise BadContainerDisk("it is cut off in its header") from None
    if block != FIRST_BYTES or extra or not 0 < blocks <= _VDI_TABLE_LIMIT or size < FIRST_BYTES:
        raise BadContainerDisk("it is a VDI of another form than a container's disk has")
    file.seek(table_at)
    entry = file.read(4)
    number = int.from_bytes(entry, "little") if len(entry) == 4 else blocks
    if number >= blocks:
        raise BadContainerDisk("it is no container's disk: its first block is empty")
    file.seek(data_at + number * block)
    return file.read(block)


def parse(raw: bytes) -> ContainerDisk:
    """raw: the disk from its beginning. Raises BadContainerDisk."""
    line = _LINE.match(raw, HEADER_AT)
    if line is None:
        raise BadContainerDisk("it is no container's disk (vmwrapper container makes one)")
    length = int(line[1])
    said = raw[line.end() : line.end() + length]
    if length > HEADER_LIMIT or len(said) != length:
        raise BadContainerDisk("it is cut off in its header, or that is too long")
    try:
        value = json.loads(said.decode("utf-8"))
    except (ValueError, RecursionError):
        raise BadContainerDisk("its header is no JSON") from None
    fields = _Fields(value, "its header")
    disk = ContainerDisk(
        id=fields.text("id"),
        image=fields.text("image"),
        architecture=fields.text("architecture"),
        entries=fields.whole("entries"),
        unpacked_bytes=fields.whole("unpacked_bytes"),
        config=_config(_Fields(fields.value("config"), "its config")),
    )
    if not _ID.fullmatch(disk.id):
        raise BadContainerDisk("its header has no id")
    return disk


def _config(fields: _Fields) -> ContainerConfig:
    groups = fields.value("groups")
    if not isinstance(groups, list) or len(groups) > MOST_GROUPS or not all(_is_id(one) for one in groups):
        raise BadContainerDisk("its config: groups is no list of ids")
    labels = fields.value("labels")
    if not isinstance(labels, dict) or not all(isinstance(one, str) for one in labels.values()):
        raise BadContainerDisk("its config: labels are no texts by name")
    return ContainerConfig(
        entrypoint=fields.texts("entrypoint"),
        cmd=fields.texts("cmd"),
        env=fields.texts("env"),
        workdir=fields.text("workdir"),
        user=fields.text("user"),
        uid=fields.id("uid"),
        gid=fields.id("gid"),
        groups=tuple(groups),
        stop_signal=fields.text("stop_signal"),
        labels=labels,
    )


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < IDS


class _Fields:
    """A JSON object, read by name."""

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            raise BadContainerDisk(f"{what} is no JSON object")
        self._value: dict[str, Any] = value
        self._what = what

    def value(self, name: str) -> Any:
        if name not in self._value:
            raise BadContainerDisk(f"{self._what} has no {name}")
        return self._value[name]

    def text(self, name: str) -> str:
        return self._text(name, self.value(name))

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.value(name)
        if not isinstance(value, list) or len(value) > MOST_TEXTS:
            raise BadContainerDisk(f"{self._what}: {name} is no list of at most {MOST_TEXTS} texts")
        return tuple(self._text(name, one) for one in value)

    def whole(self, name: str) -> int:
        value = self.value(name)
        if type(value) is not int or not 0 <= value < 2**63:
            raise BadContainerDisk(f"{self._what}: {name} is no whole number")
        return value

    def id(self, name: str) -> int | None:
        value = self.value(name)
        if value is not None and not _is_id(value):
            raise BadContainerDisk(f"{self._what}: {name} is no id from 0 to {IDS - 1}")
        return value if value is None else int(value)

    def _text(self, name: str, value: object) -> str:
        if not isinstance(value, str) or len(value) > TEXT_LIMIT or "\0" in value:
            raise BadContainerDisk(f"{self._what}: {name} is no text of at most {TEXT_LIMIT} characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadContainerDisk(f"{self._what}: {name} is no Unicode") from None
        return value
