"""The overlay of a QEMU VM and the snapshots in it: read, synced, and changed with qemu-img while no QEMU has it open.

A snapshot's name in the file (tag) is `<number>:<name>`: the number gives the order, and the same name can be taken
again before the older one goes. A running QEMU changes the overlay itself (session.py). Knows nothing of the VM's
state, never touches another file: what vm.json says of snapshots is the caller's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Protocol

from vmcontrol.common.threads import in_thread
from vmcontrol.hypervisors.common import diskimage
from vmcontrol.hypervisors.common.diskimage import InternalSnapshot
from vmcontrol.hypervisors.common.tool import ToolResult
from vmcontrol.hypervisors.common.vm import check_snapshot_name
from vmcontrol.hypervisors.interface import HypervisorError, SnapshotNotFound
from vmcontrol.hypervisors.qemu import problems
from vmcontrol.hypervisors.qemu.files import VmFiles

_TAG = re.compile(r"([0-9]{1,9}):(.+)", re.DOTALL)


class Host(Protocol):
    """What is needed of the driver."""

    reactor: Any

    async def image_tool(self, *arguments: str) -> ToolResult: ...


class Overlay:
    """Of one VM. Raises HypervisorErrors."""

    def __init__(self, host: Host, name: str, files: VmFiles) -> None:
        self._host = host
        self._name = name
        self._files = files

    def why_not(self) -> str:
        """Why it cannot be used: the end of a sentence; "": nothing is wrong with its header."""
        try:
            diskimage.check_overlay(self._files.overlay)
        except (diskimage.BadImage, OSError) as error:
            said = error.strerror if isinstance(error, OSError) else error
            return f"its disk {self._files.overlay.name} cannot be used: {said}"
        return ""

    def snapshots(self) -> list[InternalSnapshot]:
        """Ours, oldest first. The overlay is the truth about snapshots."""
        try:
            found = diskimage.snapshots(self._files.overlay)
        except FileNotFoundError:
            return []
        except (diskimage.BadImage, OSError) as error:
            raise HypervisorError(f"{self._files.overlay}: {error}") from error
        return sorted((one for one in found if _TAG.fullmatch(one.tag)), key=lambda one: number_of(one.tag))

    async def take(self, tag: str) -> None:
        """A snapshot of the disk alone; durable on return."""
        await self._image_tool("taking a snapshot", "-c", tag)
        await self.sync()

    async def go_back(self, tag: str) -> None:
        """What the guest wrote since is lost; durable on return."""
        await self._image_tool("going back", "-a", tag)
        await self.sync()

    async def delete(self, tag: str) -> None:
        await self._image_tool("deleting a snapshot", "-d", tag)

    async def sync(self) -> None:
        """Make it durable, whoever wrote to it."""
        await in_thread(self._host.reactor, self._files.sync_overlay)

    async def _image_tool(self, what: str, option: str, tag: str) -> None:
        if why := self.why_not():
            raise HypervisorError(f"{self._name}, {what}: {why}")
        file = {"driver": "file", "filename": str(self._files.overlay)}
        # what its header may say of a file below it is not followed
        node = json.dumps({"driver": "qcow2", "file": file, "backing": None})
        result = await self._host.image_tool("snapshot", option, tag, f"json:{node}")
        if result.status != 0:
            raise problems.explain(f"{self._name}, {what}", result.text)


def new_tag(known: Sequence[InternalSnapshot], name: str) -> str:
    """The tag under which `name` is taken now. Raises HypervisorError for a name that cannot be."""
    check_snapshot_name(name)
    return f"{max((number_of(one.tag) for one in known), default=0) + 1}:{name}"


def find(known: Sequence[InternalSnapshot], name: str | None, current: str | None) -> InternalSnapshot:
    """The newest of that name; for None the one with the tag `current`, else the newest. Raises SnapshotNotFound."""
    for one in reversed(known):
        if one.tag == current if name is None else name_of(one.tag) == name:
            return one
    if name is None and known:
        return known[-1]
    raise SnapshotNotFound("there is no snapshot" + ("" if name is None else f" {name!r}"))


def name_of(tag: str) -> str:
    return tag.partition(":")[2]


def number_of(tag: str) -> int:
    return int(tag.partition(":")[0])
