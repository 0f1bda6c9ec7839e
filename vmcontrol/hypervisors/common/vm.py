"""One VM of a driver: the operations as far as they are the same whatever the hypervisor.

Operations wait for each other (`lock`); `state` and `info` do not wait. Every wait has a limit.
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Generic

import psutil
from twisted.internet.defer import DeferredLock

from vmcontrol.common.diskusage import disk_usage
from vmcontrol.common.eventloop import Event, LimitReached, with_limit
from vmcontrol.common.threads import in_thread
from vmcontrol.hypervisors.common.existing import SNAPSHOT_PREFIX, Existing
from vmcontrol.hypervisors.common.folder import D, Record, VmFolder
from vmcontrol.hypervisors.common.imageid import ImageCheck, unusable
from vmcontrol.hypervisors.common.phases import Phases
from vmcontrol.hypervisors.interface import HypervisorError, WrongState
from vmcontrol.protocol.vm import LIVE_STATES, VmInfo, VmState

log = logging.getLogger(__name__)

STATE_BASE_LIMIT_S, STATE_MIB_PER_S = 60.0, 10.0
"""Limit of writing or reading a machine's state: so long, and the time of a very slow disk."""
_FOREIGN_MEMORY_MB = 8192
"""Assumed, for that limit, of a VM that we did not make."""
_SNAPSHOT_NAME_BYTES = 200
"""QEMU's limit is 255, with a number of ours."""


class BaseVm(ABC, Generic[D]):
    """A VM that exists."""

    release_grace_s = 0.0
    """For the guest of an existing VM to shut down, which is given back switched off."""

    def __init__(
        self, reactor: Any, phases: Phases, files: VmFolder[D] | None, record: Record[D] | None, existing: Existing
    ) -> None:
        """files, record: None for a VM that we did not make."""
        self.name = phases.name
        self.reactor = reactor
        self.lock = DeferredLock()
        self.phases = phases
        self._folder = files
        self._known = record
        self.existing = existing
        self._image_check = ImageCheck("image")
        self._disk_checks: dict[Path, ImageCheck] = {}

    # State ----------------------------------------------------------------------------------------------------------

    async def state(self) -> VmState:
        return await self.phases.state()

    @abstractmethod
    async def info(self) -> VmInfo: ...

    async def _info(self, state: VmState) -> VmInfo:
        """What can be said of a VM in this state whatever the hypervisor."""
        return VmInfo(
            self.name,
            state,
            mac="",
            trouble=self.phases.trouble if state in (VmState.ABORTED, VmState.STUCK) else "",
            unusable="" if state in LIVE_STATES else await self.unusable(),
            resumable=state is VmState.STUCK and self.phases.held,
        )

    async def unusable(self) -> str:
        """Why its disk is worth nothing; empty for one that was there before the job, whose disk is never given up."""
        return (await self._disk_fault())[1]

    async def _disk_fault(self) -> tuple[Path | None, str]:
        """The file that is to blame, and why as `unusable` says it."""
        if self._known is None or self.existing.found() is not None:
            return None, ""
        image, made_from = self.image(), self._known.definition.image_id
        if wrong := await in_thread(self.reactor, self._image_check.why_not, image, made_from):
            return image, wrong
        for disk, known in zip(self.further_disks(), self._known.definition.disks, strict=True):
            check = self._disk_checks.setdefault(disk, ImageCheck("further disk"))
            if wrong := await in_thread(self.reactor, check.why_not, disk, known.id):
                return disk, wrong
        return image, self.disk_trouble()

    def disk_trouble(self) -> str:
        """Why the VM's own disk cannot be used: the end of a sentence; empty: nothing is wrong with it."""
        return ""

    def image(self) -> Path:
        """The image of a VM that we made."""
        assert self._folder is not None  # noqa: S101 (the caller looked)
        assert self._known is not None  # noqa: S101
        return self._folder.path(self._known.definition.image)

    def further_disks(self) -> list[Path]:
        """The further disks of a VM that we made, where they are now."""
        assert self._folder is not None  # noqa: S101 (the caller looked)
        assert self._known is not None  # noqa: S101
        return [self._folder.path(disk.path) for disk in self._known.definition.disks]

    @abstractmethod
    async def performance(self) -> dict[str, float]: ...

    def usage(self, pid: int | None) -> dict[str, float]:
        """CPU seconds and resident bytes of a process and its children, and what the VM's files take."""
        cpu, memory = 0.0, 0
        with contextlib.suppress(psutil.Error):  # it ends just now
            process = psutil.Process(pid) if pid is not None else None
            for one in (process, *process.children(recursive=True)) if process is not None else ():
                with contextlib.suppress(psutil.Error):
                    times = one.cpu_times()
                    cpu += times.user + times.system
                    memory += one.memory_info().rss
        disk = disk_usage(self._folder.folder) if self._folder is not None else 0
        return {"cpu_time_s": cpu, "memory_bytes": float(memory), "disk_bytes": float(disk)}

    # Start and end --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        async with self.lock:
            before = await self.phases.asked()
            if before not in (VmState.POWERED_OFF, VmState.ABORTED, VmState.SAVED):
                raise WrongState(f"{self.name} cannot be started: it is {before}")
            file, why = await self._disk_fault()
            if why and file is not None:
                raise unusable(self.name, file, why)
            with self.phases.in_phase(VmState.RESTORING if before is VmState.SAVED else VmState.STARTING):
                await self._start(before)
            self.phases.report(VmState.RUNNING)

    @abstractmethod
    async def _start(self, before: VmState) -> None:
        """Start the guest from this state, with the lock held. After an error the VM is what it was."""

    @abstractmethod
    async def power_off(self, acpi_grace_s: float) -> None: ...

    async def _shut_down(self, press: Awaitable[object], ended: Event | None, grace_s: float) -> None:
        """Press the guest's power button and wait for the end of its process, for so long."""
        try:
            await press
            if ended is not None:
                await with_limit(self.reactor, grace_s, "the guest's shutdown", ended.wait())
        except (HypervisorError, LimitReached) as error:
            log.info("%s: %s; powering off", self.name, error)

    @abstractmethod
    async def delete(self) -> None: ...

    def is_gone(self) -> bool:
        """Whether `delete` got so far that there is no VM any more."""
        return self._folder is not None and not self._folder.definition_file.exists()

    # Pause, save ----------------------------------------------------------------------------------------------------

    @abstractmethod
    async def pause(self) -> None: ...

    @abstractmethod
    async def unpause(self) -> None: ...

    @abstractmethod
    async def save_state(self) -> None: ...

    def _stuck(self) -> tuple[VmState, ...]:
        """Stuck, for what may also be done to a guest that only a full disk or the like holds up: it lacks nothing."""
        return (VmState.STUCK,) if self.phases.held else ()

    async def _live(self, what: str, *allowed: VmState) -> VmState:
        """The state, which is one of these. Raises WrongState."""
        state = await self.phases.asked()
        if state not in allowed:
            raise WrongState(f"{self.name} cannot be {what}: it is {state}")
        return state

    def _state_limit_s(self) -> float:
        memory_mb = self._known.definition.memory_mb if self._known is not None else _FOREIGN_MEMORY_MB
        return STATE_BASE_LIMIT_S + memory_mb / STATE_MIB_PER_S

    # Snapshots ------------------------------------------------------------------------------------------------------

    @abstractmethod
    async def save_snapshot(self, snapshot: str, description: str) -> None: ...

    @abstractmethod
    async def restore_snapshot(self, snapshot: str | None) -> None: ...

    @abstractmethod
    async def delete_snapshot(self, snapshot: str) -> None: ...

    @abstractmethod
    async def list_snapshots(self) -> list[str]: ...

    # Network, processor ---------------------------------------------------------------------------------------------

    async def set_network(self, connected: bool) -> None:
        async with self.lock:
            if self._known is None or not self._known.definition.network:
                if connected:
                    raise WrongState(f"{self.name} was not granted the network")
                return
            self._known.change(network_connected=connected)
            await self._set_link(connected)

    @abstractmethod
    async def _set_link(self, connected: bool) -> None:
        """Plug in or pull the granted network of a VM that is live; the next start does so for another."""

    @abstractmethod
    async def set_cpu_cap(self, percent: int) -> None: ...

    # A VM that was there before the job -------------------------------------------------------------------------------

    async def take(self) -> None:
        self.existing.take(self.name, await self.state())

    async def release(self) -> None:
        found = self.existing.found()
        if found is None:
            return
        for snapshot in await self.list_snapshots():
            if snapshot.startswith(SNAPSHOT_PREFIX):
                await self.delete_snapshot(snapshot)
        if found in (VmState.POWERED_OFF, VmState.ABORTED):
            await self.power_off(self.release_grace_s)
        elif await self.state() in LIVE_STATES:  # Stuck, too: what cannot be saved is not given back as saved
            await self.save_state()
        self.existing.give_back()
        log.info("%s is left %s", self.name, await self.state())

    def close(self) -> None:
        """This HostMain ends; the VM is not touched."""
        self.existing.close()


def check_snapshot_name(name: str, *, refused: tuple[str, ...] = ()) -> None:
    """Raises HypervisorError for a name that cannot be. refused: what it may not begin with."""
    if not name.isprintable() or not 0 < len(name.encode("utf-8", "replace")) <= _SNAPSHOT_NAME_BYTES:
        raise HypervisorError(f"{name!r} cannot be a snapshot's name: 1 to {_SNAPSHOT_NAME_BYTES} printable bytes")
    if name.startswith(refused):
        raise HypervisorError(f"{name!r} cannot be a snapshot's name: it begins with {name[0]!r}")
