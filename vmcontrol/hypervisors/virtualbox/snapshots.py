"""Snapshots of a VirtualBox VM: what they may be called, which is which, and VBoxManage's commands for them.

Knows neither files nor states of the VM: when a snapshot may be taken or gone back to is vm.py's business.
"""

from __future__ import annotations

import logging

from vmcontrol.hypervisors.interface import HypervisorError, SnapshotNotFound
from vmcontrol.hypervisors.virtualbox.output import Facts, Snapshot
from vmcontrol.hypervisors.virtualbox.vboxmanage import VBoxManage

log = logging.getLogger(__name__)

NAME_BYTES = 200
MERGE_LIMIT_S = 1800.0
"""Deleting a snapshot copies what was written since it; the guest runs meanwhile."""


def check_name(name: str) -> None:
    """Raises HypervisorError for a name that cannot be."""
    length = len(name.encode("utf-8", "replace"))
    if not name.isprintable() or not 0 < length <= NAME_BYTES or name.startswith(("-", "{")):
        raise HypervisorError(
            f"{name!r} cannot be a snapshot's name: 1 to {NAME_BYTES} printable bytes, not begun by '-'"
        )


def find(facts: Facts, name: str, snapshot: str | None) -> Snapshot:
    """The newest of the VM `name` that is called `snapshot`; for None the current one. Raises SnapshotNotFound."""
    for one in reversed(facts.snapshots):
        if one.uuid == facts.current_snapshot if snapshot is None else one.name == snapshot:
            return one
    raise SnapshotNotFound(f"{name} has no snapshot" + ("" if snapshot is None else f" {snapshot!r}"))


class Snapshots:
    """Of one VM. Each method is one call of VBoxManage and raises what VBoxManage.do raises."""

    def __init__(self, vbox: VBoxManage, name: str, uuid: str) -> None:
        self._vbox = vbox
        self._name = name
        self._uuid = uuid

    async def take(self, snapshot: str, description: str, *, live: bool, limit_s: float) -> None:
        """live: the guest goes on meanwhile, with a pause of some hundredths of a second."""
        words = ["snapshot", self._uuid, "take", snapshot]
        if description:
            words += [f"--description={description}"]
        if live:
            words.append("--live")
        await self._vbox.do(f"snapshot {snapshot} of {self._name}", *words, limit_s=limit_s)

    async def restore(self, snapshot: Snapshot, *, limit_s: float) -> None:
        words = ("snapshot", self._uuid, "restore", snapshot.uuid)
        await self._vbox.do(f"{self._name} back to {snapshot.name}", *words, limit_s=limit_s)

    async def delete(self, snapshot: Snapshot) -> None:
        """Nothing when it is gone already."""
        words = ("snapshot", self._uuid, "delete", snapshot.uuid)
        try:
            await self._vbox.do(f"deleting snapshot {snapshot.name} of {self._name}", *words, limit_s=MERGE_LIMIT_S)
        except SnapshotNotFound:
            log.info("%s: the snapshot %s is gone already", self._name, snapshot.name)
