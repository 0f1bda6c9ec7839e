"""One QEMU VM: what is done to it, in the order that makes every crash harmless.

`power_off` without grace and `delete` end an operation that is under way. The file operations and their meaning:
files.py; the running QEMU and the VM's state: lifecycle.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from vmcontrol.common.threads import in_thread
from vmcontrol.hypervisors.common.existing import Existing
from vmcontrol.hypervisors.common.folder import Record
from vmcontrol.hypervisors.common.vm import BaseVm
from vmcontrol.hypervisors.interface import HostProblem, HypervisorError, WrongState
from vmcontrol.hypervisors.qemu import accelerator as accelerators
from vmcontrol.hypervisors.qemu import command, overlay, problems
from vmcontrol.hypervisors.qemu.command import Accelerator, Machine
from vmcontrol.hypervisors.qemu.files import Definition, VmFiles
from vmcontrol.hypervisors.qemu.lifecycle import Lifecycle
from vmcontrol.hypervisors.qemu.overlay import Overlay
from vmcontrol.hypervisors.qemu.process import end_stale
from vmcontrol.hypervisors.qemu.qmp import QmpError
from vmcontrol.hypervisors.qemu.session import QemuSession
from vmcontrol.protocol.vm import LIVE_STATES, VmInfo, VmState

log = logging.getLogger(__name__)


class Host(overlay.Host, Protocol):
    """What a VM needs of its driver."""

    qemu: str

    async def accelerator(self, *, again: bool = False) -> Accelerator: ...
    async def make_overlay(self, files: VmFiles, definition: Definition) -> None: ...
    def state_changed(self, name: str, state: VmState) -> None: ...


class QemuVm(BaseVm[Definition]):
    """A VM that exists: its folder holds a vm.json."""

    release_grace_s = 30.0
    """The disk is somebody's own; after this the plug is pulled."""

    def __init__(self, host: Host, files: VmFiles, definition: Definition) -> None:
        self.files = files
        self._record = Record(files, definition)
        self._host = host
        self._lifecycle = Lifecycle(host.reactor, files, self._record, host.state_changed)
        super().__init__(host.reactor, self._lifecycle, files, self._record, Existing(files.taken))
        self._overlay = Overlay(host, self.name, files)
        self._forwards: Mapping[int, int] = {}
        self._may_have_run = False
        """The guest's first instruction since this start may have happened."""

    @property
    def definition(self) -> Definition:
        return self._record.definition

    async def adopt(self) -> None:
        """First thing in a new HostMain: end a QEMU that an earlier one left (it should have died with it)."""
        stale = self.files.stale_process()
        if stale is not None:
            log.warning("%s: QEMU, pid %d, of an earlier HostMain still lives; killing it", self.name, stale.pid)
            await end_stale(self.reactor, stale)
        self.files.remove_leftovers()

    # State ----------------------------------------------------------------------------------------------------------

    async def info(self) -> VmInfo:
        state, process, definition = await self.state(), self._lifecycle.process, self.definition
        forwards = dict(self._forwards) if state in LIVE_STATES and process is not None else {}
        agent = forwards.pop(definition.agent_port, None)
        current = definition.current_snapshot
        return replace(
            await self._info(state),
            mac=definition.mac,
            image=self.image(),
            current_snapshot=None if current is None else overlay.name_of(current),
            pid=process.pid if process is not None else None,
            agent_address=("127.0.0.1", agent) if agent else None,
            forwards=forwards,
            made_here=self.existing.found() is None,
        )

    def disk_trouble(self) -> str:
        return self._overlay.why_not()

    async def performance(self) -> dict[str, float]:
        process = self._lifecycle.process
        return self.usage(process.pid if process is not None else None)

    # Start and end --------------------------------------------------------------------------------------------------

    async def _start(self, before: VmState) -> None:
        try:
            if before is not VmState.SAVED:
                await self._prepare_cold_boot(before)
            self.files.remove_leftovers()
            await self._boot(resume=before is VmState.SAVED)
        except BaseException:
            await self._lifecycle.end(kill=True)
            if before is not VmState.ABORTED and not self._may_have_run:
                self.files.ended_orderly()  # the VM is what it was
            raise

    async def _prepare_cold_boot(self, before: VmState) -> None:
        """A guest that boots finds a disk that fits: as it left it, or a new one. Never one from the middle."""
        if before is not VmState.ABORTED and not self.definition.unclean:
            return
        if self.existing.found() is not None:
            log.warning("%s: boots from the disk as it is, which was in use: it is not ours to make anew", self.name)
            return
        if self._overlay.snapshots():
            log.warning("%s: boots from a disk that was in use, although there are snapshots", self.name)
            return
        log.info("%s: boots from a new overlay; the old one was in the middle of something", self.name)
        await self._host.make_overlay(self.files, self.definition)
        self._record.change(unclean=False, current_snapshot=None, snapshot_hardware=None)

    async def _boot(self, *, resume: bool) -> None:
        accelerator = await self._accelerator_for(resume)
        try:
            process = await self._spawn(accelerator, resume)
        except HostProblem as problem:
            if problem.key != "accelerator-taken" or resume:
                raise
            log.warning("%s: %s; trying the accelerators again", self.name, problem.reason)
            await self._lifecycle.end(kill=True)
            accelerator = await self._host.accelerator(again=True)
            process = await self._spawn(accelerator, resume)
        tag = self.definition.resume_snapshot
        if resume and tag is not None:
            # left by a crash in `restore_snapshot`: the disk that it fits is gone with the load
            self.files.discard_saved()
            await process.load_snapshot(tag, self._state_limit_s())
        elif resume:
            await process.load_state(self.files.saved, self._state_limit_s())
        if self.definition.network:  # also after a load, which brings back the state of the link
            await process.set_link(self.definition.network_connected)
        self._may_have_run = True
        # From here on what was resumed from is of the past; the file must say so before the guest moves.
        if tag is not None:
            self._record.change(resume_snapshot=None)
        elif resume:
            self.files.use_saved()
        await process.do("cont")
        self.files.remove_leftovers()
        self._lifecycle.trouble = ""

    async def _accelerator_for(self, resume: bool) -> Accelerator:
        chosen = await self._host.accelerator()
        return accelerators.to_resume(self.definition, chosen) if resume else chosen

    async def _spawn(self, accelerator: Accelerator, resume: bool) -> QemuSession:
        """A QEMU that stands before its first instruction; vm.json and running.json know of it."""
        definition = self.definition
        incoming = resume and definition.resume_snapshot is None
        argv = command.arguments(self._host.qemu, self._machine(), accelerator, incoming=incoming)
        self._may_have_run = False
        try:
            process = self._lifecycle.spawn(argv)
        except OSError as error:
            raise problems.explain(f"starting {self.name}", str(error)) from error
        try:
            await process.connect()
        except QmpError as error:
            raise problems.explain(f"starting {self.name}", process.last_words() or str(error)) from error
        self.files.write_running(process.pid, process.began)
        if (definition.accelerator, definition.cpu) != (accelerator.name, accelerator.cpu) or not definition.machine:
            self._record.change(machine=await process.machine_type(), accelerator=accelerator.name, cpu=accelerator.cpu)
        self._forwards = await process.forwards()
        return process

    def _machine(self) -> Machine:
        return Machine.of(self.definition, self.files)

    async def power_off(self, acpi_grace_s: float) -> None:
        if self.lock.locked and acpi_grace_s <= 0:
            self._lifecycle.abandon()
        async with self.lock:
            state = await self._lifecycle.asked()
            if self._lifecycle.process is not None:
                if acpi_grace_s > 0 and state is VmState.RUNNING:
                    process = self._lifecycle.process
                    await self._shut_down(process.do("system_powerdown"), process.ended, acpi_grace_s)
                if self._lifecycle.process is not None:  # the guest did not end it
                    with self._lifecycle.in_phase(VmState.STOPPING):
                        await self._lifecycle.end(kill=False)
                self.files.ended_orderly()
            elif state in (VmState.SAVED, VmState.ABORTED):
                self._record.change(unclean=True, resume_snapshot=None)
                self.files.discard_saved()
                self.files.ended_orderly()
            self._lifecycle.report(self._lifecycle.of_files())

    async def delete(self) -> None:
        if self.lock.locked:
            self._lifecycle.abandon()
        async with self.lock:
            await self._lifecycle.end(kill=True)
            await in_thread(self.reactor, self.files.remove)
            self._lifecycle.report(VmState.POWERED_OFF)

    # Pause, save ----------------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        async with self.lock:
            process, state = await self._running("paused", VmState.RUNNING, VmState.PAUSED, *self._stuck())
            if state is VmState.RUNNING:
                await process.do("stop")
                await process.close_forwards(self._machine())

    async def unpause(self) -> None:
        async with self.lock:
            process, state = await self._running("resumed", VmState.RUNNING, VmState.PAUSED, VmState.STUCK)
            if state is not VmState.RUNNING:
                self._forwards = await process.open_forwards()
                await process.do("cont")

    async def save_state(self) -> None:
        async with self.lock:
            process, before = await self._running("saved", VmState.RUNNING, VmState.PAUSED, *self._stuck())
            with self._lifecycle.in_phase(VmState.SAVING, before):
                try:
                    await process.do("stop")
                    await process.close_forwards(self._machine())
                    async with process.without_image(self._machine()):
                        await process.write_state(self.files.partial, self._state_limit_s())
                        await in_thread(self.reactor, self.files.complete_saved)
                        await self._lifecycle.end(kill=False)
                except BaseException:
                    try:
                        if self._lifecycle.ending or process.ended.is_set():
                            self.files.partial.unlink(missing_ok=True)
                        else:  # the guest can go on, so no state may stay that would not know
                            self.files.discard_saved()
                    finally:
                        await self._go_on(process, before)
                    raise
                self.files.ended_orderly()
            self._lifecycle.report(VmState.SAVED)

    async def _go_on(self, process: QemuSession, before: VmState) -> None:
        if process.ended.is_set() or self._lifecycle.ending:
            return
        if before is VmState.RUNNING:
            self._forwards = await process.open_forwards()
            await process.do("cont")
        elif (await process.do("query-status"))["status"] == "postmigrate":
            # a guest that stood before a save which failed near its end: QEMU would never save that one again
            await process.do("cont")
            await process.do("stop")

    # Snapshots ------------------------------------------------------------------------------------------------------

    async def save_snapshot(self, snapshot: str, description: str) -> None:
        if description:
            log.info("%s: snapshot %s: %s", self.name, snapshot, description)  # qcow2 has no place for it
        async with self.lock:
            state = await self._lifecycle.asked()
            older = self._overlay.snapshots()
            tag = overlay.new_tag(older, snapshot)
            try:
                if self._lifecycle.process is None:
                    if state is VmState.SAVED:
                        raise WrongState(f"{self.name}: no snapshot of a saved VM; start it first")
                    await self._overlay.take(tag)
                    self._record.change(current_snapshot=tag)
                else:
                    process, state = await self._running("snapshotted", VmState.RUNNING, VmState.PAUSED)
                    with self._lifecycle.in_phase(state, state):
                        await self._take(process, tag, state)
                        await self._overlay.sync()
                        self._remember_hardware(tag)
                    self._lifecycle.report(state)
            except BaseException:
                await self._take_back(tag)
                raise
            for one in older:  # the same name taken again replaces the older one, which was kept until now
                if overlay.name_of(one.tag) == snapshot:
                    await self._delete(one.tag)

    def _remember_hardware(self, tag: str) -> None:
        """Of a snapshot with memory: what it needs to be resumed."""
        definition = self.definition
        hardware = (definition.accelerator or "", definition.cpu or "")
        known = definition.snapshot_hardware or {}
        self._record.change(current_snapshot=tag, snapshot_hardware={**known, tag: hardware})

    async def _take(self, process: QemuSession, tag: str, state: VmState) -> None:
        await process.do("stop")
        try:
            await process.save_snapshot(tag, self._machine(), self._state_limit_s())
        finally:
            await self._go_on(process, state)

    async def _take_back(self, tag: str) -> None:
        """After a snapshot that failed: one that nobody knows may not take disk space, nor be gone back to."""
        if self._lifecycle.process is not None and self._lifecycle.ending:
            return  # what ends the VM does not wait for this
        try:
            if any(one.tag == tag for one in self._overlay.snapshots()):
                await self._remove(tag)
        except (HypervisorError, OSError) as error:
            log.warning("%s: the snapshot %r, which failed, is still there: %s", self.name, tag, error)

    async def restore_snapshot(self, snapshot: str | None) -> None:
        async with self.lock:
            if self._lifecycle.process is not None:
                raise WrongState(f"{self.name}: a VM that is live cannot go back to a snapshot; power it off first")
            found = overlay.find(self._overlay.snapshots(), snapshot, self.definition.current_snapshot)
            if found.memory_bytes:
                # This order: a crash in between leaves a VM that is Saved, in the snapshot's state.
                self._record.change(resume_snapshot=found.tag, current_snapshot=found.tag, unclean=False)
                self.files.discard_saved()
            else:
                self._record.change(unclean=True, resume_snapshot=None)
                self.files.discard_saved()
                await self._overlay.go_back(found.tag)
                self._record.change(current_snapshot=found.tag, unclean=False)
            self.files.ended_orderly()
            self._lifecycle.trouble = ""
            self._lifecycle.report(self._lifecycle.of_files())

    async def delete_snapshot(self, snapshot: str) -> None:
        async with self.lock:
            for one in self._overlay.snapshots():
                if overlay.name_of(one.tag) == snapshot:
                    if one.tag == self.definition.resume_snapshot:
                        raise WrongState(f"{self.name} is to be resumed from the snapshot {snapshot!r}")
                    await self._delete(one.tag)

    async def _remove(self, tag: str) -> None:
        if self._lifecycle.process is not None:
            await self._lifecycle.process.delete_snapshot(tag, self._state_limit_s())
        else:
            await self._overlay.delete(tag)

    async def _delete(self, tag: str) -> None:
        await self._remove(tag)
        hardware = {key: value for key, value in (self.definition.snapshot_hardware or {}).items() if key != tag}
        current = self.definition.current_snapshot
        if current == tag:
            rest = self._overlay.snapshots()
            current = rest[-1].tag if rest else None
        self._record.change(snapshot_hardware=hardware, current_snapshot=current)

    async def list_snapshots(self) -> list[str]:
        return list(dict.fromkeys(overlay.name_of(one.tag) for one in self._overlay.snapshots()))

    # Network --------------------------------------------------------------------------------------------------------

    async def _set_link(self, connected: bool) -> None:
        if self._lifecycle.process is not None:
            await self._lifecycle.process.set_link(connected)

    async def set_cpu_cap(self, percent: int) -> None:
        raise WrongState(f"QEMU cannot limit {self.name} to {percent} % of a processor (capability cpu_cap)")

    async def _running(self, what: str, *allowed: VmState) -> tuple[QemuSession, VmState]:
        """The VM's QEMU and state, which is one of these. Raises WrongState."""
        state = await self._live(what, *allowed)
        if self._lifecycle.process is None:  # it ended just now
            raise WrongState(f"{self.name} cannot be {what}: it is {state}")
        return self._lifecycle.process, state
