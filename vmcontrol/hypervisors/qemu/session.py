"""The driver's operations on a running QEMU, as QMP commands. Raises HypervisorErrors.

Knows nothing of a VM's files and states; which verb comes when is vm.py's business.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil

from vmcontrol.hypervisors.interface import HypervisorError, StateUnusable
from vmcontrol.hypervisors.qemu import command as qemu_command
from vmcontrol.hypervisors.qemu import problems
from vmcontrol.hypervisors.qemu.command import DISK, GRANTED_NETWORK, IMAGE, Machine
from vmcontrol.hypervisors.qemu.process import QemuProcess
from vmcontrol.hypervisors.qemu.qmp import QmpError
from vmcontrol.protocol.vm import PortForward

T = TypeVar("T")
log = logging.getLogger(__name__)

_FORWARD = re.compile(r"TCP\[HOST_FORWARD\]\s+\d+\s+\S+\s+(\d+)\s+\S+\s+(\d+)")
_job_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Room:
    """Space on a disk for what is about to be written. QEMU often has no words for a full one; the file system does."""

    folder: Path
    needed: int = 1024 * 1024
    """Bytes. Of a machine's state its memory: what was written of it may be gone again when we look."""

    def is_there(self) -> bool:
        return psutil.disk_usage(str(self.folder)).free >= self.needed


class QemuSession(QemuProcess):
    """A QemuProcess with these operations."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._closed: list[tuple[PortForward, PortForward]] = []
        """Forwards that were closed: as the VM is to have them, and with the ports that they had."""

    async def do(self, command: str, **arguments: Any) -> Any:
        """One QMP command; its result."""
        return await self._asked(self.qmp.execute(command, **arguments), command)

    async def job(self, command: str, limit_s: float, room: Room | None = None, **arguments: Any) -> None:
        """Run one of QEMU's background jobs to its end. room: what it writes has to find there."""
        job = f"job{next(_job_numbers)}"
        with self.watch("JOB_STATUS_CHANGE") as watch:
            await self.do(command, job_id=job, **arguments)
            ended = watch.until(lambda data: data == {"id": job, "status": "concluded"}, limit_s)
            await self._asked(ended, command)
        jobs = await self.do("query-jobs")
        await self.do("job-dismiss", id=job)
        for row in jobs:
            if row["id"] == job and "error" in row:
                what = f"{self.label}, {command}"
                raise problems.explain(what, row["error"], has_room=room is None or room.is_there())

    async def forwards(self) -> dict[int, int]:
        """Guest port -> port of this host, as the kernel chose it."""
        text = await self._monitor("info usernet")
        return {int(guest): int(host) for host, guest in _FORWARD.findall(text)}

    async def close_forwards(self, machine: Machine) -> None:
        """Let nobody connect any more while the guest stands: it cannot drop those that have no business here, and
        whoever held them all would leave QEMU without descriptors.
        """
        if self._closed:
            return
        ports = await self.forwards()
        for wanted in qemu_command.forwards_of(machine.definition):
            if port := ports.get(wanted.guest_port):
                forward = replace(wanted, host_port=port)
                await self._monitor(qemu_command.close_forward(forward))
                self._closed.append((wanted, forward))

    async def open_forwards(self) -> dict[int, int]:
        """The forwards again, after `close_forwards`: at the same ports, or at others where these have been taken."""
        closed, self._closed = self._closed, []
        for wanted, forward in closed:
            for one in (forward, wanted):
                refused = await self._monitor(qemu_command.open_forward(one))
                if not refused:
                    break
                log.warning("%s: port %d: %s", self.label, one.host_port, refused)
        return await self.forwards()

    async def _monitor(self, line: str) -> str:
        return str(await self.do("human-monitor-command", command_line=line)).strip()

    async def machine_type(self) -> str:
        """The versioned name behind an alias such as q35."""
        kind = await self.do("qom-get", path="/machine", property="type")
        return str(kind).removesuffix("-machine")

    async def set_link(self, up: bool) -> None:
        """Plug in or pull the granted network."""
        await self.do("set_link", name=GRANTED_NETWORK, up=up)

    async def write_state(self, path: Path, limit_s: float) -> None:
        """Write RAM and devices of a stopped guest to `path`; not synced."""
        await self._prepare_migration()
        fd = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        await self._hand_over(fd)
        with self.watch("MIGRATION") as watch:
            await self.do("migrate", uri="fd:state")
            outcome = await self._asked(watch.until(_migration_ended, limit_s), "saving")
        if outcome["status"] != "completed":
            details = await self.do("query-migrate")
            reason = str(details.get("error-desc") or "QEMU gave no reason")
            raise problems.explain(f"saving {self.label}", reason, has_room=Room(path.parent).is_there())

    async def load_state(self, path: Path, limit_s: float) -> None:
        """Load what `write_state` wrote, in a QEMU that was started for it. Raises StateUnusable."""
        try:
            await self._prepare_migration()
            await self._hand_over(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            with self.watch("MIGRATION") as watch:
                await self.do("migrate-incoming", uri="fd:state")
                outcome = await watch.until(_migration_ended, limit_s)
        except (HypervisorError, QmpError, OSError) as error:
            raise StateUnusable(f"{self.label}: the saved state cannot be loaded: {error}") from error
        if outcome["status"] != "completed":
            raise StateUnusable(f"{self.label}: the saved state cannot be loaded ({outcome['status']})")

    async def load_snapshot(self, tag: str, limit_s: float) -> None:
        """Load memory and disk of a snapshot, in a QEMU whose guest has not run. Raises StateUnusable."""
        try:
            await self.job("snapshot-load", limit_s, tag=tag, vmstate=DISK, devices=[DISK])
        except HypervisorError as error:
            raise StateUnusable(f"{self.label}: the snapshot {tag!r} cannot be loaded: {error}") from error

    async def save_snapshot(self, tag: str, machine: Machine, limit_s: float) -> None:
        """Memory and disk of a stopped guest, as a snapshot in its overlay; not synced."""
        async with self.without_image(machine):
            room = Room(machine.overlay.parent, machine.definition.memory_mb * 1024 * 1024)
            await self.job("snapshot-save", limit_s, room, tag=tag, vmstate=DISK, devices=[DISK])

    async def delete_snapshot(self, tag: str, limit_s: float) -> None:
        await self.job("snapshot-delete", limit_s, tag=tag, devices=[DISK])

    @contextlib.asynccontextmanager
    async def without_image(self, machine: Machine) -> AsyncIterator[None]:
        """For a stopped guest: take the image away from below the overlay, and put it back.

        QEMU writes no machine state while a VDI is open, even read-only. A stopped guest reads no disk, so for that
        time the overlay needs no image. Takes 5 ms. If it cannot be put back QEMU ends: it must not go on without.
        """
        if machine.definition.image_format not in qemu_command.MIGRATION_BLOCKED_BY:
            yield
            return
        await self.do("blockdev-reopen", options=[qemu_command.disk_node(None)])
        try:
            await self.do("blockdev-del", node_name=IMAGE)
            yield
        finally:
            if not self.ended.is_set():
                try:
                    await self.do("blockdev-add", **qemu_command.image_node(machine))
                    await self.do("blockdev-reopen", options=[qemu_command.disk_node(IMAGE)])
                except HypervisorError:
                    self.kill_now()
                    raise

    async def _prepare_migration(self) -> None:
        await self.do("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        await self.do("migrate-set-parameters", max_bandwidth=1 << 40)  # bytes/s; 128 MiB/s is the default

    async def _hand_over(self, fd: int) -> None:
        """Give QEMU a file, which it then knows as `state`, and close our end."""
        try:
            await self.do("getfd", pass_fd=fd, fdname="state")
        finally:
            os.close(fd)

    async def _asked(self, work: Awaitable[T], what: str) -> T:
        try:
            return await work
        except QmpError as error:
            raise problems.explain(f"{self.label}, {what}", str(error)) from error


def _migration_ended(data: Mapping[str, Any]) -> bool:
    return data.get("status") in ("completed", "failed", "cancelled")
