"""What a CMD_RUN says of the container that its program runs in. Pure: JSON in, typed and bounded values out.

The image's configuration has been decided upon by the wrapper: only what the guest needs is sent.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vmcontrol.protocol.text import BadMessage, text_field, whole_field

MOST_ID = 65535
"""Highest uid and gid in a container."""
MOST_GROUPS = 64
"""Further groups of the container's user."""
WORKDIR_LIMIT = 1024
"""Bytes of the working folder's name."""
MOST_SIGNAL = 64

_DISK = re.compile(r"[0-9a-f]{64}")
_KEYS = frozenset({"disk", "workdir", "uid", "gid", "groups", "stop-signal", "network"})


@dataclass(frozen=True, slots=True)
class ContainerRun:
    """The container of a command. Raises ValueError for values that no guest would take."""

    disk: str
    """Id of the container's disk: 64 hexadecimal digits."""
    workdir: str
    """Working folder in the container, absolute: the task's folder is laid over the image's."""
    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    stop_signal: int = int(signal.SIGTERM)
    """Sent to the container's first process by CMD_CANCEL."""
    network: bool = False
    """Joined to the guest's network; else it has its own loopback alone."""

    def __post_init__(self) -> None:
        if not _DISK.fullmatch(self.disk):
            raise ValueError(f"{self.disk[:80]!r} is no id of a container's disk")
        check_workdir(self.workdir)
        for number in (self.uid, self.gid, *self.groups):
            if not 0 <= number <= MOST_ID:
                raise ValueError(f"the id {number} is not between 0 and {MOST_ID}")
        if len(self.groups) > MOST_GROUPS:
            raise ValueError(f"{len(self.groups)} groups of the container's user; {MOST_GROUPS} are taken")
        if not 1 <= self.stop_signal <= MOST_SIGNAL:
            raise ValueError(f"there is no signal {self.stop_signal}")

    def to_json(self) -> dict[str, Any]:
        """As CMD_RUN has it."""
        return {
            "disk": self.disk,
            "workdir": self.workdir,
            "uid": self.uid,
            "gid": self.gid,
            "groups": list(self.groups),
            "stop-signal": self.stop_signal,
            "network": self.network,
        }

    @classmethod
    def from_json(cls, value: object) -> ContainerRun:
        """Raises BadMessage."""
        if not isinstance(value, Mapping):
            raise BadMessage("container is no JSON object")
        if unknown := sorted(str(name) for name in value.keys() - _KEYS):
            raise BadMessage(f"container: {unknown[0][:40]!r} is not known")
        groups = value.get("groups", [])
        if not isinstance(groups, list | tuple) or not all(type(group) is int for group in groups):
            raise BadMessage("container: groups is no list of whole numbers")
        network = value.get("network", False)
        if not isinstance(network, bool):
            raise BadMessage("container: network is neither true nor false")
        try:
            return cls(
                disk=text_field(value, "disk"),
                workdir=text_field(value, "workdir"),
                uid=whole_field(value, "uid", 0, MOST_ID),
                gid=whole_field(value, "gid", 0, MOST_ID),
                groups=tuple(groups),
                stop_signal=whole_field(value, "stop-signal", int(signal.SIGTERM), MOST_SIGNAL),
                network=network,
            )
        except (ValueError, BadMessage) as error:
            raise BadMessage(f"container: {error}") from error


def check_workdir(workdir: str) -> None:
    """Raises ValueError for what cannot be a container's working folder: it is absolute, plain and not the root."""
    try:
        size = len(workdir.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{workdir[:80]!r} is not UTF-8") from None
    parts = workdir.split("/")
    if parts[0] or len(parts) < 2 or any(part in {"", ".", ".."} for part in parts[1:]) or "\0" in workdir:
        raise ValueError(f"{workdir[:80]!r} is no plain absolute folder below /")
    if size > WORKDIR_LIMIT:
        raise ValueError(f"a working folder of {size} bytes; {WORKDIR_LIMIT} are taken")
    if parts[1] in {"proc", "sys", "dev"}:
        raise ValueError(f"{workdir[:80]!r} belongs to the system and is no working folder")
