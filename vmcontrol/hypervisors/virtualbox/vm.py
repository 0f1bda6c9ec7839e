"""One VirtualBox VM: what is done to it. What becomes of it by itself, and how its state is known: state.py.

Success is what VirtualBox says, or what is seen of it: the state in the VM's log, the end of its process. VMs that we
did not make are used, never changed.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from twisted.internet.defer import DeferredLock

from vmcontrol.common.eventloop import Event
from vmcontrol.common.threads import in_thread
from vmcontrol.hypervisors.common.vm import BaseVm, check_snapshot_name
from vmcontrol.hypervisors.interface import (
    HostProblem,
    HypervisorError,
    SnapshotNotFound,
    StateUnusable,
    WrongState,
)
from vmcontrol.hypervisors.virtualbox import create, media, problems
from vmcontrol.hypervisors.virtualbox import forwards as vbox_forwards
from vmcontrol.hypervisors.virtualbox.existing import LockedExisting
from vmcontrol.hypervisors.virtualbox.files import Definition, Record, VmFiles
from vmcontrol.hypervisors.virtualbox.output import Facts, Snapshot
from vmcontrol.hypervisors.virtualbox.state import Host, StateTracker
from vmcontrol.hypervisors.virtualbox.vboxmanage import CALL_LIMIT_S
from vmcontrol.protocol.vm import LIVE_STATES, VmInfo, VmState

log = logging.getLogger(__name__)

START_LIMIT_S = 180.0
MERGE_LIMIT_S = 1800.0
"""Deleting a snapshot copies what was written since it; the guest runs meanwhile."""

_MOVING = (VmState.RUNNING, VmState.PAUSED, VmState.STUCK)
"""States in which its process is changed, and not its settings."""


class VBoxVm(BaseVm[Definition]):
    """A VM that is registered with VirtualBox. record: None for one that we did not make."""

    def __init__(self, host: Host, name: str, uuid: str, record: Record | None = None) -> None:
        self.uuid = uuid
        self._host = host
        self._record = record
        operations = DeferredLock()
        self._tracker = StateTracker(host, name, uuid, record, operations)
        files = record.files if record is not None else None
        super().__init__(host.reactor, self._tracker, files, record, LockedExisting(host.folder, uuid))
        self._monitor = self._tracker.monitor
        self._console = self._tracker.console

    @property
    def files(self) -> VmFiles | None:
        return self._record.files if self._record is not None else None

    @property
    def definition(self) -> Definition | None:
        return self._record.definition if self._record is not None else None

    # State ----------------------------------------------------------------------------------------------------------

    async def info(self) -> VmInfo:
        facts = await self._tracker.look()
        state = self._tracker.counts_as(facts)
        live = state in LIVE_STATES
        definition, process = self.definition, self._monitor.process
        image = Path(facts.disks[0]) if facts.disks else None
        mac = facts.macs.get(2 if facts.nics.get(2, "").startswith("hostonly") else 1, "")
        agent, forwards = vbox_forwards.addresses(definition.forwards if definition is not None and live else ())
        port = facts.remote_desktop_port if live else 0
        return replace(
            await self._info(state),
            mac=mac if definition is None else definition.mac,
            image=image if definition is None else self.image(),
            current_snapshot=facts.current_snapshot_name,
            pid=process.pid if live and process is not None else None,
            agent_address=agent,
            forwards=forwards,
            remote_desktop_address=f"127.0.0.1:{port}" if port else None,
            made_here=definition is not None,
            link_token=definition.token if definition is not None and live else "",
        )

    async def performance(self) -> dict[str, float]:
        await self._tracker.look()  # which finds its process
        self._console.copy()
        return self.usage(self._monitor.process.pid if self._monitor.process is not None else None)

    # Start and end --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        await self.take()
        await super().start()

    async def _start(self, before: VmState) -> None:
        await self._prepare()
        try:
            await self._boot(before)
        except HypervisorError as error:
            if before is VmState.SAVED and type(error) is HypervisorError:
                raise StateUnusable(str(error)) from error
            raise

    async def _prepare(self) -> None:
        """For a VM of ours: nothing of its last run is left, ports that are free now, VirtualBox in line with it."""
        if self._record is None:
            return
        media.lay_links(self.image(), self.further_disks(), self._record.files.folder)
        await self._end_orphan(self._record.files.log)
        self._console.finish()
        forwards = tuple(vbox_forwards.with_free_port(forward) for forward in self._record.definition.forwards)
        self._record.change(forwards=forwards, console_start=self._console.size(), running=True)
        facts = await self._tracker.look()
        if await create.align(self._host, self._record.definition, facts):
            self._tracker.renew()
        self._console.begin()

    async def _end_orphan(self, log_file: Path) -> None:
        """A VM process that VirtualBox does not know any more (its service died) still has the disk open: end it."""
        if self._monitor.process is not None or self._monitor.find_process(log_file):
            log.warning("%s: a process of its last run is still there", self.name)
            await self._monitor.gone()

    async def _boot(self, before: VmState) -> None:
        self._tracker.ending = False
        limit = START_LIMIT_S + (self._state_limit_s() if before is VmState.SAVED else 0.0)
        try:
            argv = ("startvm", self.uuid, "--type", "headless")
            await self._host.vbox.do(
                f"starting {self.name}", *argv, limit_s=limit, done=self._monitor.reached(VmState.RUNNING)
            )
        except HypervisorError:
            self._tracker.forget()
            await self._tracker.not_live()
            if before is not VmState.ABORTED:
                self._remember(running=False)  # the guest never ran
            raise
        self._tracker.trouble = ""
        self._tracker.state_is(VmState.RUNNING)
        self._tracker.follow()
        await self._move_refused_forwards()

    async def _move_refused_forwards(self) -> None:
        if self.definition is None:
            return
        taken = vbox_forwards.refused(self.definition.forwards, self._monitor.log_text())
        if taken:
            log.warning("%s: the ports %s were taken while it started", self.name, taken)
            self._remember(forwards=await vbox_forwards.move(self._host.vbox, self.definition, taken))

    async def power_off(self, acpi_grace_s: float) -> None:
        async with self.lock:
            state = await self._tracker.asked()
            if state is VmState.SAVED:
                await self._host.vbox.do(f"discarding the state of {self.name}", "discardstate", self.uuid)
                self._tracker.forget()
            elif state in LIVE_STATES:
                if acpi_grace_s > 0 and state is VmState.RUNNING:
                    press = self._control(f"shutting down {self.name}", "acpipowerbutton")
                    await self._shut_down(press, self._monitor.end(), acpi_grace_s)
                with self._tracker.in_phase(VmState.STOPPING):
                    await self._switch_off()
                self._remember(running=False)
            await self._tracker.report_asked()

    async def _switch_off(self) -> None:
        """End the VM process, if VirtualBox cannot then without it."""
        self._tracker.ending = True
        try:
            answer = await self._host.vbox.ask("controlvm", self.uuid, "poweroff", done=self._monitor.end())
            if answer.status != 0 and "is not currently running" not in answer.text:
                log.warning("%s: %s", self.name, problems.explain("switching it off", answer.text))
                self._monitor.kill()
        except HostProblem as problem:
            log.warning("%s: %s; killing its process", self.name, problem)
            self._monitor.kill()
        await self._monitor.gone()
        self._console.copy()
        self._tracker.forget()
        if await self._tracker.not_live() is None:
            raise HypervisorError(f"{self.name} still runs after it was switched off, says VirtualBox")

    async def delete(self) -> None:
        """Unregister it with its media and remove its folder. The project's image is not known to VirtualBox."""
        if self.files is None:
            raise WrongState(f"{self.name} was there before us and is not ours to delete")
        async with self.lock:
            self._tracker.ending = True
            if self._monitor.process is None and await self._seems_live():
                await self._host.vbox.ask("controlvm", self.uuid, "poweroff")
            self._monitor.kill()  # nothing of it is wanted; switching it off in order takes 0.3 s longer
            await self._monitor.gone()
            await self._host.registration.unregister(self.uuid, self.files)
            self.close()
            await in_thread(self.reactor, self.files.remove)
            self._tracker.report(VmState.POWERED_OFF)

    async def _seems_live(self) -> bool:
        try:
            return await self._tracker.asked() in LIVE_STATES
        except HypervisorError as error:
            log.info("%s: %s; deleting it all the same", self.name, error)
            return False

    # Pause, save ----------------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        await self._pause_or_resume("paused", "pause", VmState.PAUSED, VmState.RUNNING)

    async def unpause(self) -> None:
        await self._pause_or_resume("resumed", "resume", VmState.RUNNING, VmState.PAUSED)

    async def _pause_or_resume(self, what: str, order: str, wanted: VmState, from_: VmState) -> None:
        async with self.lock:
            state = await self._live(what, wanted, from_, *self._stuck())
            if state is VmState.STUCK and wanted is VmState.PAUSED:
                return  # it stands already, and is what it was until it is resumed
            if state is not wanted:
                await self._control(f"{self.name} to be {what}", order, done=self._monitor.reached(wanted))
                self._tracker.state_is(wanted)
                self._monitor.read_log()  # what it says of this is no news
                self._console.copy()
            self._tracker.report(wanted)
            if state is VmState.STUCK:
                self._tracker.look_again_soon()

    async def save_state(self) -> None:
        async with self.lock:
            before = await self._live("saved", VmState.RUNNING, VmState.PAUSED, *self._stuck())
            with self._tracker.in_phase(VmState.SAVING):
                self._tracker.ending = True
                try:
                    what, limit_s = f"saving {self.name}", self._state_limit_s()
                    await self._control(what, "savestate", limit_s=limit_s, done=self._monitor.end())
                    await self._monitor.gone()
                except BaseException as error:
                    if not await self._saved_all_the_same(error):
                        self._tracker.ending = False
                        await self._go_on(before)
                        self._raise_if_full(error)
                        raise
                self._console.copy()
                await self._sync()
                self._remember(running=False)
            self._tracker.forget()
            state = await self._tracker.report_asked()
            if state is not VmState.SAVED:
                raise HypervisorError(f"{self.name} is {state} after its state was saved")

    async def _saved_all_the_same(self, error: BaseException) -> bool:
        """VirtualBox complains now and then when the process of a VM that was just saved ends too early for it."""
        self._tracker.forget()
        if not isinstance(error, HypervisorError):
            return False
        try:
            saved = await self._tracker.asked(fresh=True) is VmState.SAVED
            if saved:
                log.warning("%s was saved, although VirtualBox says: %s", self.name, error)
                await self._monitor.gone()
        except HypervisorError:
            return False
        return saved

    def _raise_if_full(self, error: BaseException) -> None:
        """VirtualBox often has no words for a state that did not fit on the disk; the file system does."""
        definition, files = self.definition, self.files
        if not isinstance(error, HostProblem) or error.key != "save-failed" or definition is None or files is None:
            return
        free = psutil.disk_usage(str(files.folder)).free
        if free < definition.memory_mb * 1024 * 1024:
            words = f"{error.reason}; no space left on device: {free // 1024 // 1024} MiB"
            raise problems.explain(f"saving {self.name}", words) from error

    async def _go_on(self, before: VmState) -> None:
        """After a failed save: VirtualBox leaves the guest paused."""
        try:
            if before is VmState.RUNNING and await self._tracker.asked() is VmState.PAUSED:
                await self._control(f"{self.name} to be resumed", "resume")
        except HypervisorError as error:  # the first error is raised; the state shows that the guest is paused
            log.error("%s stays paused: %s", self.name, error)
        self._tracker.forget()

    # Snapshots ------------------------------------------------------------------------------------------------------

    async def save_snapshot(self, snapshot: str, description: str) -> None:
        check_snapshot_name(snapshot, refused=("-", "{"))
        async with self.lock:
            facts = await self._tracker.look()
            state = self._tracker.of(facts)
            with self._tracker.in_phase(state):
                try:
                    more = [f"--description={description}"] if description else []
                    if state is VmState.RUNNING:
                        more.append("--live")  # the guest goes on, with a pause of some hundredths of a second
                    await self._snapshot(f"snapshot {snapshot} of {self.name}", "take", snapshot, *more)
                except BaseException:
                    self._tracker.forget()
                    await self._go_on(state)
                    raise
                self._tracker.forget()
                try:
                    await self._sync()
                except BaseException:
                    await self._take_back(facts)
                    raise
                self._console.copy()  # the caller finds all that the guest had printed when it was taken
                for older in facts.snapshots:  # the same name taken again replaces the older one, kept until now
                    if older.name == snapshot:
                        await self._delete_snapshot(older)

    async def _take_back(self, before: Facts) -> None:
        """After a snapshot that failed: one that nobody knows may not take disk space, nor be gone back to."""
        known = {one.uuid for one in before.snapshots}
        try:
            for one in (await self._tracker.look()).snapshots:
                if one.uuid not in known:
                    await self._delete_snapshot(one)
        except HypervisorError as error:
            log.warning("%s: a snapshot that failed is still there: %s", self.name, error)

    async def restore_snapshot(self, snapshot: str | None) -> None:
        async with self.lock:
            facts = await self._tracker.look()
            if self._tracker.of(facts) in LIVE_STATES:
                raise WrongState(f"{self.name}: a VM that is live cannot go back to a snapshot; power it off first")
            found = find_snapshot(facts, snapshot)
            self._console.copy()
            await self._snapshot(f"{self.name} back to {found.name}", "restore", found.uuid)
            await self._sync()
            self._remember(running=False)
            self._tracker.trouble = ""
            self._tracker.forget()
            await self._tracker.report_asked()

    async def delete_snapshot(self, snapshot: str) -> None:
        async with self.lock:
            for one in (await self._tracker.look()).snapshots:
                if one.name == snapshot:
                    await self._delete_snapshot(one)

    async def _delete_snapshot(self, snapshot: Snapshot) -> None:
        what = f"deleting snapshot {snapshot.name} of {self.name}"
        try:
            await self._snapshot(what, "delete", snapshot.uuid, limit_s=MERGE_LIMIT_S)
        except SnapshotNotFound:
            log.info("%s: the snapshot %s is gone already", self.name, snapshot.name)
        finally:
            self._tracker.forget()

    async def _snapshot(self, what: str, *argv: str, limit_s: float | None = None) -> None:
        limit_s = limit_s or self._state_limit_s()
        await self._host.vbox.do(what, "snapshot", self.uuid, *argv, limit_s=limit_s)

    async def list_snapshots(self) -> list[str]:
        return list(dict.fromkeys(one.name for one in (await self._tracker.look()).snapshots))

    # Network, processor ---------------------------------------------------------------------------------------------

    async def _set_link(self, connected: bool) -> None:
        nic = self._record.definition.network_nic if self._record is not None else 0
        if nic and await self._tracker.asked() in _MOVING:
            await self._control(f"network of {self.name}", f"setlinkstate{nic}", "on" if connected else "off")

    async def set_cpu_cap(self, percent: int) -> None:
        if not 1 <= percent <= 100:
            raise WrongState(f"{self.name}: a processor cannot be limited to {percent} %")
        async with self.lock:
            what = f"processor share of {self.name}"
            if await self._tracker.asked() in _MOVING:
                await self._control(what, "cpuexecutioncap", str(percent))
            elif self._record is None:
                raise WrongState(f"{self.name} was there before us and is not ours to change")
            else:
                option = (await self._host.dialect()).option("cpu-execution-cap")
                await self._host.vbox.do(what, "modifyvm", self.uuid, option, str(percent))

    async def _control(self, what: str, *argv: str, limit_s: float = CALL_LIMIT_S, done: Event | None = None) -> None:
        """Change the VM's process. Raises what VBoxManage.do raises."""
        await self._host.vbox.do(what, "controlvm", self.uuid, *argv, limit_s=limit_s, done=done)

    async def _sync(self) -> None:
        """Make what VirtualBox wrote of a VM of ours durable."""
        if self.files is not None:
            await in_thread(self.reactor, self.files.sync)

    async def take(self) -> None:
        if self._record is None:  # a VM of ours needs no note
            await super().take()

    def _remember(self, **changes: Any) -> None:
        if self._record is not None:
            self._record.change(**changes)

    def close(self) -> None:
        super().close()
        self._console.close()
        self._monitor.close()


def find_snapshot(facts: Facts, snapshot: str | None) -> Snapshot:
    """The newest that is called `snapshot`; for None the current one. Raises SnapshotNotFound."""
    for one in reversed(facts.snapshots):
        if one.uuid == facts.current_snapshot if snapshot is None else one.name == snapshot:
            return one
    raise SnapshotNotFound(f"{facts.name} has no snapshot" + ("" if snapshot is None else f" {snapshot!r}"))
