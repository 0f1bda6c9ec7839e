"""One QEMU VM: what is done to it, in the order that makes every crash harmless.

Operations wait for each other; `state` and `info` do not wait. `power_off` without grace and `delete` end an operation
that is under way. Every wait has a limit. The file operations and their meaning: qemu_files.py.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil
from twisted.internet import threads
from twisted.internet.defer import CancelledError, DeferredLock
from twisted.python.failure import Failure

from vmcontrol.eventloop import Event, LimitReached, with_limit
from vmcontrol.hypervisors import diskimage, qemu_command, qemu_faults, qemu_snapshots
from vmcontrol.hypervisors.interface import (
    LIVE_STATES,
    Fault,
    HypervisorError,
    VmInfo,
    VmState,
    WrongState,
)
from vmcontrol.hypervisors.qemu_command import DISK, Accelerator
from vmcontrol.hypervisors.qemu_files import Definition, VmFiles, bound_console, with_snapshot
from vmcontrol.hypervisors.qemu_process import end_stale
from vmcontrol.hypervisors.qemu_session import QemuSession
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


class Host(Protocol):
    """What a VM needs of its driver."""

    reactor: Any
    qemu: str

    async def accelerator(self, *, again: bool = False) -> Accelerator: ...
    async def image_tool(self, *arguments: str) -> ToolResult: ...
    async def make_overlay(self, files: VmFiles, definition: Definition) -> None: ...
    def state_changed(self, name: str, state: VmState) -> None: ...


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
        self._process: QemuSession | None = None
        self._forwards: Mapping[int, int] = {}
        self._phase: VmState | None = None
        """What the VM counts as while an operation is under way."""
        self._ending = False
        """We end the process ourselves; its end is no news."""
        self._may_have_run = False
        """The guest's first instruction since this start may have happened."""
        self._shutdown_reason = ""
        self._told: VmState | None = None

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
            current_snapshot=None if current is None else qemu_snapshots.name_of(current),
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
                    if before is not VmState.ABORTED and not self._may_have_run:
                        self.files.ended_orderly()  # the VM is what it was
                    raise
            self._tell(VmState.RUNNING)

    async def _prepare_cold_boot(self, before: VmState) -> None:
        """A guest that boots finds a disk that fits: as it left it, or a new one. Never one from the middle."""
        if before is not VmState.ABORTED and not self.definition.unclean:
            return
        if self.files.found() is not None:
            log.warning("%s: boots from the disk as it is, which was in use: it is not ours to make anew", self.name)
            return
        if self._snapshots():
            log.warning("%s: boots from a disk that was in use, although there are snapshots", self.name)
            return
        log.info("%s: boots from a new overlay; the old one was in the middle of something", self.name)
        await self._host.make_overlay(self.files, self.definition)
        self._store(unclean=False, current_snapshot=None, snapshot_hardware=None)

    async def _boot(self, *, resume: bool) -> None:
        accelerator = await self._accelerator_for(resume)
        try:
            process = await self._spawn(accelerator, resume)
        except Fault as fault:
            if fault.key != "accelerator-taken" or resume:
                raise
            log.warning("%s: %s; trying the accelerators again", self.name, fault.reason)
            await self._end_process(kill=True)
            accelerator = await self._host.accelerator(again=True)
            process = await self._spawn(accelerator, resume)
        tag = self.definition.resume_snapshot
        if resume and tag is not None:
            await process.load_snapshot(tag, self._state_limit_s())
        elif resume:
            await process.load_state(self.files.saved, self._state_limit_s())
        if self.definition.network:  # also after a load, which brings back the state of the link
            await process.set_link(self.definition.network_connected)
        self._may_have_run = True
        # From here on what was resumed from is of the past; the file must say so before the guest moves.
        if tag is not None:
            self._store(resume_snapshot=None)
        elif resume:
            self.files.use_saved()
        await process.do("cont")
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

    async def _spawn(self, accelerator: Accelerator, resume: bool) -> QemuSession:
        """A QEMU that stands before its first instruction; vm.json and running.json know of it."""
        definition = self.definition
        incoming = resume and definition.resume_snapshot is None
        words = qemu_command.arguments(self._host.qemu, self._machine(), accelerator, incoming=incoming)
        self._ending, self._may_have_run, self._shutdown_reason = False, False, ""
        try:
            process = QemuSession.spawn(self._host.reactor, words, self.name, self._event)
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
            self._store(machine=await process.machine_type(), accelerator=accelerator.name, cpu=accelerator.cpu)
        self._forwards = await process.forwards()
        return process

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
            host_only=definition.host_only,
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

    async def _ask_to_shut_down(self, process: QemuSession, grace_s: float) -> None:
        try:
            await process.do("system_powerdown")
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

    def _process_ended(self, process: QemuSession) -> None:
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
                await process.do("stop")

    async def unpause(self) -> None:
        async with self._lock:
            process, state = await self._live("resumed", VmState.RUNNING, VmState.PAUSED, VmState.STUCK)
            if state is not VmState.RUNNING:
                await process.do("cont")

    async def save_state(self) -> None:
        async with self._lock:
            process, before = await self._live("saved", VmState.RUNNING, VmState.PAUSED)
            with self._in_phase(VmState.SAVING, before):
                try:
                    await process.do("stop")
                    async with process.without_image(self._machine()):
                        await process.write_state(self.files.partial, self._state_limit_s())
                        await self._in_thread(self.files.complete_saved)
                        await self._end_process(kill=False)
                except BaseException as error:
                    if self._ending or process.ended.is_set():
                        self.files.partial.unlink(missing_ok=True)
                    else:  # the guest can go on, so no state may stay that would not know
                        self.files.discard_saved()
                    await self._go_on(process, before)
                    if isinstance(error, OSError):
                        raise qemu_faults.explain(f"saving {self.name}", error.strerror or str(error)) from error
                    raise
                self.files.ended_orderly()
            self._tell(VmState.SAVED)

    async def _go_on(self, process: QemuSession, before: VmState) -> None:
        if before is VmState.RUNNING and not process.ended.is_set() and not self._ending:
            await process.do("cont")

    def _state_limit_s(self) -> float:
        return STATE_BASE_LIMIT_S + self.definition.memory_mb / STATE_MIB_PER_S

    # Snapshots ------------------------------------------------------------------------------------------------------

    async def save_snapshot(self, snapshot: str) -> None:
        async with self._lock:
            state = await self._state_now()
            older = self._snapshots()
            tag = qemu_snapshots.new_tag(older, snapshot)
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
                if qemu_snapshots.name_of(one.tag) == snapshot:
                    await self._delete(one.tag)

    async def _take(self, process: QemuSession, tag: str, state: VmState) -> None:
        await process.do("stop")
        try:
            async with process.without_image(self._machine()):
                await process.job("snapshot-save", self._state_limit_s(), tag=tag, vmstate=DISK, devices=[DISK])
        finally:
            await self._go_on(process, state)

    async def restore_snapshot(self, snapshot: str | None) -> None:
        async with self._lock:
            if self._process is not None:
                raise WrongState(f"{self.name}: a VM that is live cannot go back to a snapshot; power it off first")
            found = qemu_snapshots.find(self._snapshots(), snapshot, self.definition.current_snapshot)
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

    async def delete_snapshot(self, snapshot: str) -> None:
        async with self._lock:
            for one in self._snapshots():
                if qemu_snapshots.name_of(one.tag) == snapshot:
                    if one.tag == self.definition.resume_snapshot:
                        raise WrongState(f"{self.name} is to be resumed from the snapshot {snapshot!r}")
                    await self._delete(one.tag)

    async def _delete(self, tag: str) -> None:
        if self._process is not None:
            await self._process.job("snapshot-delete", self._state_limit_s(), tag=tag, devices=[DISK])
        else:
            await self._image_tool("deleting a snapshot", "snapshot", "-d", tag, str(self.files.overlay))
        hardware = {key: value for key, value in (self.definition.snapshot_hardware or {}).items() if key != tag}
        current = self.definition.current_snapshot
        if current == tag:
            rest = self._snapshots()
            current = rest[-1].tag if rest else None
        self._store(snapshot_hardware=hardware, current_snapshot=current)

    async def list_snapshots(self) -> list[str]:
        return list(dict.fromkeys(qemu_snapshots.name_of(one.tag) for one in self._snapshots()))

    def _snapshots(self) -> list[diskimage.InternalSnapshot]:
        return qemu_snapshots.of_overlay(self.files.overlay)

    # Network --------------------------------------------------------------------------------------------------------

    async def set_network(self, connected: bool) -> None:
        async with self._lock:
            if not self.definition.network:
                if connected:
                    raise WrongState(f"{self.name} was not granted the network")
                return
            self._store(network_connected=connected)
            if self._process is not None:
                await self._process.set_link(connected)

    # Helpers --------------------------------------------------------------------------------------------------------

    async def _live(self, what: str, *allowed: VmState) -> tuple[QemuSession, VmState]:
        state = await self._state_now()
        if self._process is None or state not in allowed:
            raise WrongState(f"{self.name} cannot be {what}: it is {state}")
        return self._process, state

    async def _image_tool(self, what: str, *arguments: str) -> None:
        result = await self._host.image_tool(*arguments)
        if result.status != 0:
            raise qemu_faults.explain(f"{self.name}, {what}", result.text)

    async def _in_thread(self, function: Callable[[], None]) -> None:
        """Run what blocks (syncing) in a thread. A cancellation waits for its end: it would go on behind our back."""
        reactor = self._host.reactor
        finished = Event()

        def ended(result: Failure | None) -> Failure | None:
            finished.set()
            return result

        outcome = threads.deferToThreadPool(reactor, reactor.getThreadPool(), function).addBoth(ended)
        cancelled: CancelledError | None = None
        while not finished.is_set():
            try:
                await finished.wait()
            except CancelledError as error:
                cancelled = error
        await outcome
        if cancelled is not None:
            raise cancelled

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
