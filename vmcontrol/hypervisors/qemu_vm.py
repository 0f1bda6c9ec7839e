"""One QEMU VM: what is done to it, in the order that makes every crash harmless.

Operations wait for each other; `state` and `info` do not wait. `power_off` without grace and `delete` end an operation
that is under way. Every wait has a limit. The file operations and their meaning: qemu_files.py.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil
from twisted.internet import threads
from twisted.internet.defer import DeferredLock

from vmcontrol.eventloop import LimitReached, with_limit
from vmcontrol.hypervisors import diskimage, qemu_command, qemu_faults
from vmcontrol.hypervisors.interface import (
    LIVE_STATES,
    Fault,
    HypervisorError,
    SnapshotNotFound,
    StateUnusable,
    VmInfo,
    VmState,
    WrongState,
)
from vmcontrol.hypervisors.qemu_command import DISK, GRANTED_NETWORK, IMAGE, Accelerator
from vmcontrol.hypervisors.qemu_files import Definition, VmFiles, bound_console, with_snapshot
from vmcontrol.hypervisors.qemu_process import QemuProcess, end_stale
from vmcontrol.hypervisors.qmp import ConnectionGone, QmpError
from vmcontrol.hypervisors.tool import ToolResult

log = logging.getLogger(__name__)
T = TypeVar("T")

STATE_BASE_LIMIT_S, STATE_MIB_PER_S = 60.0, 10.0
"""Limit of writing or reading a machine's state: so long, and the time of a very slow disk."""

_STATES = {
    "running": VmState.RUNNING,
    "suspended": VmState.RUNNING,  # the guest sleeps by itself
    "paused": VmState.PAUSED,
    "debug": VmState.PAUSED,
    "prelaunch": VmState.STARTING,
    "inmigrate": VmState.RESTORING,
    "restore-vm": VmState.RESTORING,
    "save-vm": VmState.SAVING,
    "finish-migrate": VmState.SAVING,
    "postmigrate": VmState.SAVING,
    "shutdown": VmState.STOPPING,
}
"""QMP's RunState; what is not here (io-error, internal-error, guest-panicked) is Stuck."""

_FORWARD = re.compile(r"TCP\[HOST_FORWARD\]\s+\d+\s+\S+\s+(\d+)\s+\S+\s+(\d+)")


class Host(Protocol):
    """What a VM needs of its driver."""

    reactor: Any
    qemu: str

    async def accelerator(self, *, again: bool = False) -> Accelerator: ...
    async def image_tool(self, *arguments: str) -> ToolResult: ...
    async def make_overlay(self, files: VmFiles, definition: Definition) -> None: ...
    def state_changed(self, name: str, state: VmState) -> None: ...


@dataclass(frozen=True, slots=True)
class _Live:
    """A QEMU and where it listens: guest port -> host port."""

    process: QemuProcess
    forwards: Mapping[int, int]


class QemuVm:
    """A VM that exists: its folder holds a vm.json."""

    def __init__(self, host: Host, files: VmFiles) -> None:
        self.files = files
        self.definition = files.load()
        self.name = self.definition.name
        self.trouble = ""
        """Why it is Aborted or Stuck, as far as known."""
        self._host = host
        self._lock = DeferredLock()
        self._process: QemuProcess | None = None
        self._forwards: Mapping[int, int] = {}
        self._phase: VmState | None = None
        """What the VM counts as while an operation is under way."""
        self._ending = False
        """We end the process ourselves; its end is no news."""
        self._shutdown_reason = ""
        self._told: VmState | None = None
        self._job_numbers = itertools.count(1)

    async def adopt(self) -> None:
        """First thing in a new HostMain: end a QEMU that an earlier one left (it should have died with it)."""
        stale = self.files.stale_process()
        if stale is not None:
            log.warning("%s: QEMU, pid %d, of an earlier HostMain still lives; killing it", self.name, stale.pid)
            await end_stale(self._host.reactor, stale)
        self.files.remove_leftovers()

    # State ----------------------------------------------------------------------------------------------------------

    async def state(self) -> VmState:
        if self._phase is not None:
            return self._phase
        return await self._state_now()

    async def _state_now(self) -> VmState:
        process = self._process
        if process is None:
            return self.files.state(self.definition)
        try:
            status = (await process.qmp.execute("query-status"))["status"]
        except ConnectionGone:
            with contextlib.suppress(LimitReached):
                await with_limit(self._host.reactor, 2.0, "the end of QEMU", process.ended.wait())
            return VmState.STUCK if self._process is process else self.files.state(self.definition)
        except QmpError as error:
            self.trouble = str(error)
            return VmState.STUCK
        return _STATES.get(status, VmState.STUCK)

    async def info(self) -> VmInfo:
        state = await self.state()
        live = state in LIVE_STATES and self._process is not None
        definition = self.definition
        forwards = dict(self._forwards) if live else {}
        agent = forwards.pop(definition.agent_port, None)
        current = definition.current_snapshot
        return VmInfo(
            name=self.name,
            state=state,
            mac=definition.mac,
            image=Path(definition.image),
            current_snapshot=None if current is None else _name_of(current),
            pid=self._process.pid if self._process is not None else None,
            agent_address=("127.0.0.1", agent) if agent else None,
            forwards=forwards,
            trouble=self.trouble if state in (VmState.ABORTED, VmState.STUCK) else "",
        )

    def performance(self) -> dict[str, float]:
        bound_console(Path(self.definition.console_log))
        values = {"cpu_time_s": 0.0, "memory_bytes": 0.0, "disk_bytes": float(self.files.disk_bytes())}
        if self._process is not None:
            with contextlib.suppress(psutil.Error):  # it ends just now
                process = psutil.Process(self._process.pid)
                times = process.cpu_times()
                values |= {"cpu_time_s": times.user + times.system, "memory_bytes": float(process.memory_info().rss)}
        return values

    # Start and end --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        async with self._lock:
            before = await self._state_now()
            if before not in (VmState.POWERED_OFF, VmState.ABORTED, VmState.SAVED):
                raise WrongState(f"{self.name} cannot be started: it is {before}")
            with self._in_phase(VmState.RESTORING if before is VmState.SAVED else VmState.STARTING):
                try:
                    if before is not VmState.SAVED:
                        await self._prepare_cold_boot(before)
                    self.files.remove_leftovers()
                    await self._boot(resume=before is VmState.SAVED)
                except BaseException:
                    await self._end_process(kill=True)
                    if before is not VmState.ABORTED:
                        self.files.ended_orderly()  # the guest never ran: the VM is what it was
                    raise
            self._tell(VmState.RUNNING)

    async def _prepare_cold_boot(self, before: VmState) -> None:
        """A guest that boots finds a disk that fits: as it left it, or a new one. Never one from the middle."""
        if before is not VmState.ABORTED and not self.definition.unclean:
            return
        if await self._snapshots():
            log.warning("%s: boots from a disk that was in use, although there are snapshots", self.name)
            return
        log.info("%s: boots from a new overlay; the old one was in the middle of something", self.name)
        await self._host.make_overlay(self.files, self.definition)
        self._store(unclean=False, current_snapshot=None, snapshot_hardware=None)

    async def _boot(self, *, resume: bool) -> None:
        accelerator = await self._accelerator_for(resume)
        try:
            live = await self._spawn(accelerator, resume)
        except Fault as fault:
            if fault.key != "accelerator-taken" or resume:
                raise
            log.warning("%s: %s; trying the accelerators again", self.name, fault.reason)
            await self._end_process(kill=True)
            accelerator = await self._host.accelerator(again=True)
            live = await self._spawn(accelerator, resume)
        self._forwards = live.forwards
        process, tag = live.process, self.definition.resume_snapshot
        if resume and tag is not None:
            await self._load_snapshot(process, tag)
        elif resume:
            await self._load_saved(process)
        if self.definition.network:  # also after a load, which brings back the state of the link
            await self._set_link(process)
        # From here on what was resumed from is of the past; the file must say so before the guest moves.
        if tag is not None:
            self._store(resume_snapshot=None)
        elif resume:
            self.files.use_saved()
        await self._do(process, "cont")
        self.files.remove_leftovers()
        self.trouble = ""

    async def _accelerator_for(self, resume: bool) -> Accelerator:
        chosen = await self._host.accelerator()
        if not resume:
            return chosen
        definition = self.definition
        tag = definition.resume_snapshot
        known = (definition.snapshot_hardware or {}).get(tag) if tag is not None else None
        name, cpu = known or (definition.accelerator or chosen.name, definition.cpu or chosen.cpu)
        needed = Accelerator(name, cpu)
        if needed.hardware and needed.name != chosen.name:
            raise Fault(
                f"{self.name} was saved with hardware virtualization ({name}), which does not work now: another"
                " program may use it, or it was switched off",
                key="accelerator-changed",
                delay_s=qemu_faults.HOUR,
            )
        return needed

    async def _spawn(self, accelerator: Accelerator, resume: bool) -> _Live:
        """A QEMU that stands before its first instruction; vm.json and running.json know of it."""
        definition = self.definition
        incoming = resume and definition.resume_snapshot is None
        words = qemu_command.arguments(self._host.qemu, self._machine(), accelerator, incoming=incoming)
        self._ending, self._shutdown_reason = False, ""
        try:
            process = QemuProcess.spawn(self._host.reactor, words, self.name, self._event)
        except OSError as error:
            raise qemu_faults.explain(f"starting {self.name}", str(error)) from error
        self._process = process
        process.ended.wait().addCallback(lambda _: self._process_ended(process))
        try:
            await process.connect()
        except QmpError as error:
            raise qemu_faults.explain(f"starting {self.name}", process.last_words() or str(error)) from error
        self.files.write_running(process.pid, process.started)
        if (definition.accelerator, definition.cpu) != (accelerator.name, accelerator.cpu) or not definition.machine:
            kind = str(await self._do(process, "qom-get", path="/machine", property="type"))
            hardware = {"accelerator": accelerator.name, "cpu": accelerator.cpu}
            self._store(machine=kind.removesuffix("-machine"), **hardware)
        text = await self._do(process, "human-monitor-command", command_line="info usernet")
        return _Live(process, {int(guest): int(host) for host, guest in _FORWARD.findall(str(text))})

    def _machine(self) -> qemu_command.Machine:
        definition = self.definition
        return qemu_command.Machine(
            name=self.name,
            machine=definition.machine or qemu_command.LATEST_MACHINE,
            memory_mb=definition.memory_mb,
            cpus=definition.cpus,
            mac=definition.mac,
            overlay=self.files.overlay,
            image=Path(definition.image),
            image_format=definition.image_format,
            console_log=Path(definition.console_log),
            agent_port=definition.agent_port,
            secret_file=None if definition.secret_file is None else Path(definition.secret_file),
            network=definition.network,
            port_forwards=definition.port_forwards,
        )

    async def power_off(self, acpi_grace_s: float) -> None:
        if self._lock.locked and acpi_grace_s <= 0:
            self._abandon()
        async with self._lock:
            state = await self._state_now()
            if self._process is not None:
                if acpi_grace_s > 0 and state is VmState.RUNNING:
                    await self._ask_to_shut_down(self._process, acpi_grace_s)
                if self._process is not None:  # the guest did not end it
                    with self._in_phase(VmState.STOPPING):
                        await self._end_process(kill=False)
                self.files.ended_orderly()
            elif state in (VmState.SAVED, VmState.ABORTED):
                self._store(unclean=True, resume_snapshot=None)
                self.files.discard_saved()
                self.files.ended_orderly()
            self._tell(self.files.state(self.definition))

    async def _ask_to_shut_down(self, process: QemuProcess, grace_s: float) -> None:
        try:
            await self._do(process, "system_powerdown")
            await with_limit(self._host.reactor, grace_s, "the guest's shutdown", process.ended.wait())
        except (HypervisorError, LimitReached) as error:
            log.info("%s: %s; powering off", self.name, error)

    async def delete(self) -> None:
        if self._lock.locked:
            self._abandon()
        async with self._lock:
            await self._end_process(kill=True)
            await self._in_thread(self.files.remove)
            self._tell(VmState.POWERED_OFF)

    def _abandon(self) -> None:
        """Make the operation that holds the lock fail now."""
        if self._process is not None:
            self._ending = True
            self._process.kill_now()

    async def _end_process(self, *, kill: bool) -> None:
        process = self._process
        if process is None:
            return
        self._ending = True
        try:
            await (process.kill() if kill else process.quit())
        except QmpError as error:
            raise Fault(
                f"{error}; only a restart of this computer may help", key="process-stuck", delay_s=qemu_faults.HOUR
            ) from error
        self._process = None

    def _process_ended(self, process: QemuProcess) -> None:
        if self._process is not process:
            return
        self._process = None
        if self._ending or self._phase is not None:
            return  # the operation under way tells
        if process.status == 0 and self._shutdown_reason == "guest-shutdown":
            log.info("%s: the guest shut down", self.name)
            self.files.ended_orderly()
        else:
            self.trouble = process.last_words()
            log.warning("%s: QEMU ended by itself (%s)", self.name, self.trouble)
        self._tell(self.files.state(self.definition))

    # Pause, save ----------------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        async with self._lock:
            process, state = await self._live("paused", VmState.RUNNING, VmState.PAUSED)
            if state is VmState.RUNNING:
                await self._do(process, "stop")

    async def unpause(self) -> None:
        async with self._lock:
            process, state = await self._live("resumed", VmState.RUNNING, VmState.PAUSED, VmState.STUCK)
            if state is not VmState.RUNNING:
                await self._do(process, "cont")

    async def save_state(self) -> None:
        async with self._lock:
            process, before = await self._live("saved", VmState.RUNNING, VmState.PAUSED)
            with self._in_phase(VmState.SAVING, before):
                try:
                    await self._do(process, "stop")
                    async with self._without_image(process):
                        await self._write_state(process)
                        await self._in_thread(self.files.complete_saved)
                        await self._end_process(kill=False)
                except BaseException as error:
                    self.files.partial.unlink(missing_ok=True)
                    await self._go_on(process, before)
                    if isinstance(error, OSError):
                        raise qemu_faults.explain(f"saving {self.name}", error.strerror or str(error)) from error
                    raise
                self.files.ended_orderly()
            self._tell(VmState.SAVED)

    @contextlib.asynccontextmanager
    async def _without_image(self, process: QemuProcess) -> AsyncIterator[None]:
        """For a stopped VM: take the image away from below the overlay, and put it back.

        QEMU writes no machine state while a VDI is open, even read-only. A stopped guest reads no disk, so for that
        time the overlay needs no image. Takes 5 ms. If it cannot be put back the VM ends: it must not go on without.
        """
        if self.definition.image_format not in qemu_command.MIGRATION_BLOCKED_BY:
            yield
            return
        await self._do(process, "blockdev-reopen", options=[qemu_command.disk_node(None)])
        try:
            await self._do(process, "blockdev-del", node_name=IMAGE)
            yield
        finally:
            if not process.ended.is_set():
                try:
                    await self._do(process, "blockdev-add", **qemu_command.image_node(self._machine()))
                    await self._do(process, "blockdev-reopen", options=[qemu_command.disk_node(IMAGE)])
                except HypervisorError:
                    process.kill_now()
                    raise

    async def _go_on(self, process: QemuProcess, before: VmState) -> None:
        if before is VmState.RUNNING and not process.ended.is_set() and not self._ending:
            await self._do(process, "cont")

    async def _write_state(self, process: QemuProcess) -> None:
        await self._prepare_migration(process)
        fd = os.open(self.files.partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            await self._do(process, "getfd", pass_fd=fd, fdname="state")
        finally:
            os.close(fd)
        with process.watch("MIGRATION") as watch:
            await self._do(process, "migrate", uri="fd:state")
            outcome = await self._qmp(watch.until(_migration_ended, self._state_limit_s()), "saving")
        if outcome["status"] != "completed":
            details = await self._do(process, "query-migrate")
            # QEMU 7.2 often has no words for a full disk; the file system does
            reason = str(details.get("error-desc") or _why_not_written(self.files.folder))
            raise qemu_faults.explain(f"saving {self.name}", reason)

    async def _load_saved(self, process: QemuProcess) -> None:
        try:
            await self._prepare_migration(process)
            fd = os.open(self.files.saved, os.O_RDONLY | os.O_CLOEXEC)
            try:
                await self._do(process, "getfd", pass_fd=fd, fdname="state")
            finally:
                os.close(fd)
            with process.watch("MIGRATION") as watch:
                await self._do(process, "migrate-incoming", uri="fd:state")
                outcome = await watch.until(_migration_ended, self._state_limit_s())
        except (HypervisorError, QmpError, OSError) as error:
            raise StateUnusable(f"{self.name}: the saved state cannot be loaded: {error}") from error
        if outcome["status"] != "completed":
            raise StateUnusable(f"{self.name}: the saved state cannot be loaded ({outcome['status']})")

    async def _prepare_migration(self, process: QemuProcess) -> None:
        await self._do(process, "migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        await self._do(process, "migrate-set-parameters", max_bandwidth=1 << 40)  # bytes/s; 128 MiB/s is the default

    def _state_limit_s(self) -> float:
        return STATE_BASE_LIMIT_S + self.definition.memory_mb / STATE_MIB_PER_S

    # Snapshots ------------------------------------------------------------------------------------------------------

    async def save_snapshot(self, snapshot: str) -> None:
        _check_snapshot_name(snapshot)
        async with self._lock:
            state = await self._state_now()
            older = await self._snapshots()
            tag = f"{max((_number_of(one.tag) for one in older), default=0) + 1}:{snapshot}"
            if self._process is None:
                if state is VmState.SAVED:
                    raise WrongState(f"{self.name}: no snapshot of a saved VM; start it first")
                await self._image_tool("taking a snapshot", "snapshot", "-c", tag, str(self.files.overlay))
                await self._in_thread(self.files.sync_overlay)
                self._store(current_snapshot=tag)
            else:
                process, state = await self._live("snapshotted", VmState.RUNNING, VmState.PAUSED)
                with self._in_phase(state, state):
                    await self._take(process, tag, state)
                    await self._in_thread(self.files.sync_overlay)
                    self.definition = with_snapshot(self.definition, tag)
                    self.files.store(self.definition)
                self._tell(state)
            for one in older:  # the same name taken again replaces the older one, which was kept until now
                if _name_of(one.tag) == snapshot:
                    await self._delete(one.tag)

    async def _take(self, process: QemuProcess, tag: str, state: VmState) -> None:
        await self._do(process, "stop")
        try:
            async with self._without_image(process):
                await self._job(process, "snapshot-save", tag=tag, vmstate=DISK, devices=[DISK])
        finally:
            await self._go_on(process, state)

    async def restore_snapshot(self, snapshot: str | None) -> None:
        async with self._lock:
            if self._process is not None:
                raise WrongState(f"{self.name}: a VM that is live cannot go back to a snapshot; power it off first")
            found = self._find(await self._snapshots(), snapshot)
            if found.memory_bytes:
                # This order: a crash in between leaves a VM that is Saved, in the snapshot's state.
                self._store(resume_snapshot=found.tag, current_snapshot=found.tag, unclean=False)
                self.files.discard_saved()
            else:
                self._store(unclean=True, resume_snapshot=None)
                self.files.discard_saved()
                await self._image_tool("going back", "snapshot", "-a", found.tag, str(self.files.overlay))
                await self._in_thread(self.files.sync_overlay)
                self._store(current_snapshot=found.tag, unclean=False)
            self.files.ended_orderly()
            self.trouble = ""
            self._tell(self.files.state(self.definition))

    def _find(self, known: list[diskimage.InternalSnapshot], name: str | None) -> diskimage.InternalSnapshot:
        for one in reversed(known):
            if one.tag == self.definition.current_snapshot if name is None else _name_of(one.tag) == name:
                return one
        if name is None and known:
            return known[-1]
        raise SnapshotNotFound(f"{self.name} has no snapshot" + ("" if name is None else f" {name!r}"))

    async def delete_snapshot(self, snapshot: str) -> None:
        async with self._lock:
            for one in await self._snapshots():
                if _name_of(one.tag) == snapshot:
                    if one.tag == self.definition.resume_snapshot:
                        raise WrongState(f"{self.name} is to be resumed from the snapshot {snapshot!r}")
                    await self._delete(one.tag)

    async def _delete(self, tag: str) -> None:
        if self._process is not None:
            await self._job(self._process, "snapshot-delete", tag=tag, devices=[DISK])
        else:
            await self._image_tool("deleting a snapshot", "snapshot", "-d", tag, str(self.files.overlay))
        hardware = {key: value for key, value in (self.definition.snapshot_hardware or {}).items() if key != tag}
        current = self.definition.current_snapshot
        if current == tag:
            rest = await self._snapshots()
            current = rest[-1].tag if rest else None
        self._store(snapshot_hardware=hardware, current_snapshot=current)

    async def list_snapshots(self) -> list[str]:
        return list(dict.fromkeys(_name_of(one.tag) for one in await self._snapshots()))

    async def _snapshots(self) -> list[diskimage.InternalSnapshot]:
        """Ours, oldest first. The overlay is the truth."""
        try:
            found = diskimage.snapshots(self.files.overlay)
        except FileNotFoundError:
            return []
        except (diskimage.BadImage, OSError) as error:
            raise HypervisorError(f"{self.name}: {self.files.overlay.name}: {error}") from error
        return sorted((one for one in found if _TAG.fullmatch(one.tag)), key=lambda one: _number_of(one.tag))

    async def _load_snapshot(self, process: QemuProcess, tag: str) -> None:
        try:
            await self._job(process, "snapshot-load", tag=tag, vmstate=DISK, devices=[DISK])
        except HypervisorError as error:
            raise StateUnusable(f"{self.name}: the snapshot {_name_of(tag)!r} cannot be loaded: {error}") from error

    async def _job(self, process: QemuProcess, command: str, **arguments: Any) -> None:
        """Run one of QEMU's background jobs to its end. Raises HypervisorError."""
        job = f"job{next(self._job_numbers)}"
        with process.watch("JOB_STATUS_CHANGE") as watch:
            await self._do(process, command, job_id=job, **arguments)
            ended = watch.until(lambda data: data == {"id": job, "status": "concluded"}, self._state_limit_s())
            await self._qmp(ended, command)
        jobs = await self._do(process, "query-jobs")
        await self._do(process, "job-dismiss", id=job)
        for row in jobs:
            if row["id"] == job and "error" in row:
                raise qemu_faults.explain(f"{self.name}, {command}", row["error"])

    # Network --------------------------------------------------------------------------------------------------------

    async def set_network(self, connected: bool) -> None:
        async with self._lock:
            if not self.definition.network:
                if connected:
                    raise WrongState(f"{self.name} was not granted the network")
                return
            self._store(network_connected=connected)
            if self._process is not None:
                await self._set_link(self._process)

    async def _set_link(self, process: QemuProcess) -> None:
        await self._do(process, "set_link", name=GRANTED_NETWORK, up=self.definition.network_connected)

    # Helpers --------------------------------------------------------------------------------------------------------

    async def _live(self, what: str, *allowed: VmState) -> tuple[QemuProcess, VmState]:
        state = await self._state_now()
        if self._process is None or state not in allowed:
            raise WrongState(f"{self.name} cannot be {what}: it is {state}")
        return self._process, state

    async def _do(self, process: QemuProcess, command: str, **arguments: Any) -> Any:
        return await self._qmp(process.qmp.execute(command, **arguments), command)

    async def _qmp(self, work: Awaitable[T], what: str) -> T:
        try:
            return await work
        except QmpError as error:
            raise qemu_faults.explain(f"{self.name}, {what}", str(error)) from error

    async def _image_tool(self, what: str, *arguments: str) -> None:
        result = await self._host.image_tool(*arguments)
        if result.status != 0:
            raise qemu_faults.explain(f"{self.name}, {what}", result.text)

    async def _in_thread(self, function: Callable[[], None]) -> None:
        reactor = self._host.reactor
        await threads.deferToThreadPool(reactor, reactor.getThreadPool(), function)

    def _store(self, **changes: Any) -> None:
        self.definition = replace(self.definition, **changes)
        self.files.store(self.definition)

    @contextlib.contextmanager
    def _in_phase(self, phase: VmState, before: VmState = VmState.RUNNING) -> Iterator[None]:
        """What the VM counts as until the end of the block; after an error it is what it was `before`, if it lives."""
        self._phase = phase
        self._tell(phase)
        try:
            yield
        except BaseException:
            self._phase = None
            live = self._process is not None
            self._tell(before if live else self.files.state(self.definition))
            raise
        self._phase = None

    def _tell(self, state: VmState) -> None:
        if state is not self._told:
            self._told = state
            self._host.state_changed(self.name, state)

    def _event(self, name: str, data: Mapping[str, Any]) -> None:
        if name == "SHUTDOWN":
            self._shutdown_reason = str(data.get("reason", ""))
        elif name == "RESET" and data.get("guest"):
            log.warning("%s: the guest restarted itself", self.name)
        elif name == "GUEST_PANICKED":
            self.trouble = "the guest's kernel crashed"
        elif name == "BLOCK_IO_ERROR" and data.get("action") == "stop":
            self.trouble = f"the virtual machine's disk cannot be written: {data.get('reason', 'no reason given')}"
            log.error("%s: %s", self.name, self.trouble)
        elif self._phase is None and name == "STOP":
            self._tell(VmState.STUCK if self.trouble else VmState.PAUSED)
        elif self._phase is None and name == "RESUME":
            self.trouble = ""
            self._tell(VmState.RUNNING)


_TAG = re.compile(r"([0-9]{1,9}):(.+)", re.DOTALL)
"""How a snapshot is called in the overlay: a number, so that the order is known and a name can be used again."""
SNAPSHOT_NAME_BYTES = 200
"""QEMU's limit is 255 with our number."""


def _name_of(tag: str) -> str:
    return tag.partition(":")[2]


def _number_of(tag: str) -> int:
    return int(tag.partition(":")[0])


def _check_snapshot_name(name: str) -> None:
    length = len(name.encode("utf-8", "replace"))
    if not name.isprintable() or not 0 < length <= SNAPSHOT_NAME_BYTES:
        raise HypervisorError(f"{name!r} cannot be a snapshot's name: 1 to {SNAPSHOT_NAME_BYTES} printable bytes")


def _migration_ended(data: Mapping[str, Any]) -> bool:
    return data.get("status") in ("completed", "failed", "cancelled")


def _why_not_written(folder: Path) -> str:
    """The likeliest reason for a state that could not be written without words."""
    free = psutil.disk_usage(str(folder)).free
    return "No space left on device" if free < 1024 * 1024 else "QEMU gave no reason"
