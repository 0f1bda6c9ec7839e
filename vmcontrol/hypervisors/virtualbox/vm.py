"""One VirtualBox VM: what is done to it. What becomes of it by itself, and how its state is known: state.py.

Operations wait for each other; `state` and `info` do not wait. Success is what VirtualBox says, or what is seen of it:
the state in the VM's log, the end of its process. VMs that we did not make are used, never changed.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

import psutil
from twisted.internet.defer import DeferredLock

from vmcontrol.common.eventloop import LimitReached, with_limit
from vmcontrol.common.threads import in_thread
from vmcontrol.hypervisors.common import imageid, places
from vmcontrol.hypervisors.common.imageid import ImageCheck
from vmcontrol.hypervisors.interface import HostProblem, HypervisorError, StateUnusable, WrongState
from vmcontrol.hypervisors.virtualbox import (
    forwards as vbox_forwards,
)
from vmcontrol.hypervisors.virtualbox import (
    media,
    problems,
    setup,
    snapshots,
)
from vmcontrol.hypervisors.virtualbox import (
    state as vbox_state,
)
from vmcontrol.hypervisors.virtualbox.console import Console
from vmcontrol.hypervisors.virtualbox.dialect import Dialect
from vmcontrol.hypervisors.virtualbox.files import Definition, Record, VmFiles
from vmcontrol.hypervisors.virtualbox.output import Facts, Snapshot
from vmcontrol.hypervisors.virtualbox.snapshots import Snapshots
from vmcontrol.hypervisors.virtualbox.state import StateTracker
from vmcontrol.protocol.vm import LIVE_STATES, VmInfo, VmState

log = logging.getLogger(__name__)

START_LIMIT_S = 180.0
STATE_BASE_LIMIT_S, STATE_MIB_PER_S = 60.0, 10.0
"""Limit of writing or reading a machine's state: so long, and the time of a very slow disk."""


_MOVING = (VmState.RUNNING, VmState.PAUSED, VmState.STUCK)
"""States in which its process is changed, and not its settings."""


class Host(vbox_state.Host, Protocol):
    """What a VM needs of its driver."""

    async def dialect(self) -> Dialect: ...


class VBoxVm:
    """A VM that is registered with VirtualBox. record: None for one that we did not make."""

    def __init__(self, host: Host, name: str, uuid: str, record: Record | None = None) -> None:
        self.name = name
        self.uuid = uuid
        self._host = host
        self._record = record
        self._lock = DeferredLock()
        self._console = Console(record)
        self._tracker = StateTracker(host, name, uuid, record, console=self._console, operations=self._lock)
        self._monitor = self._tracker.monitor
        self._facts = self._tracker.facts
        self._image_check = ImageCheck()
        self._snapshots = Snapshots(host.vbox, name, uuid)

    @property
    def ours(self) -> bool:
        return self._record is not None

    @property
    def files(self) -> VmFiles | None:
        return self._record.files if self._record is not None else None

    @property
    def definition(self) -> Definition | None:
        return self._record.definition if self._record is not None else None

    # State ----------------------------------------------------------------------------------------------------------

    async def state(self) -> VmState:
        return await self._tracker.state()

    async def info(self) -> VmInfo:
        facts = await self._facts.look()
        state = self._tracker.counts_as(facts)
        live = state in LIVE_STATES
        definition, process = self.definition, self._monitor.process
        image = Path(facts.disks[0]) if facts.disks else None
        mac = facts.macs.get(2 if facts.nics.get(2, "").startswith("hostonly") else 1, "")
        if definition is not None:
            image, mac = self._image, definition.mac
        agent, forwards = vbox_forwards.addresses(definition.forwards if definition is not None and live else ())
        port = facts.remote_desktop_port if live else 0
        return VmInfo(
            name=self.name,
            state=state,
            mac=mac,
            image=image,
            current_snapshot=facts.current_snapshot_name,
            pid=process.pid if live and process is not None else None,
            agent_address=agent,
            forwards=forwards,
            remote_desktop_address=f"127.0.0.1:{port}" if port else None,
            trouble=self._tracker.trouble if state in (VmState.ABORTED, VmState.STUCK) else "",
            resumable=state is VmState.STUCK and self._tracker.held,
            made_here=self.ours,
            link_token=definition.token if definition is not None and live else "",
            unusable="" if live else await self._unusable(),
        )

    @property
    def _image(self) -> Path:
        """Of a VM of ours."""
        assert self._record is not None  # noqa: S101 (the caller looked)
        return places.recall(self._record.definition.image, self._record.files.slot)

    async def _unusable(self) -> str:
        """Why the disk of a VM of ours is worth nothing."""
        if self._record is None:
            return ""
        image, made_from = self._image, self._record.definition.image_id
        return await in_thread(self._host.reactor, self._image_check.why_not, image, made_from)

    async def performance(self) -> dict[str, float]:
        await self._facts.look()  # which finds its process
        process = self._monitor.process
        cpu, memory = process.usage() if process is not None else (0.0, 0.0)
        disk = float(self.files.disk_bytes()) if self.files is not None else 0.0
        self._console.copy()
        return {"cpu_time_s": cpu, "memory_bytes": memory, "disk_bytes": disk}

    # Start and end --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        async with self._lock:
            facts = await self._facts.look()
            before = self._tracker.of(facts)
            if before not in (VmState.POWERED_OFF, VmState.ABORTED, VmState.SAVED):
                raise WrongState(f"{self.name} cannot be started: it is {before}")
            with self._tracker.in_phase(VmState.RESTORING if before is VmState.SAVED else VmState.STARTING):
                await self._prepare(facts)
                try:
                    await self._start(before)
                except HypervisorError as error:
                    if before is VmState.SAVED and type(error) is HypervisorError:
                        raise StateUnusable(str(error)) from error
                    raise
            self._tracker.tell(VmState.RUNNING)

    async def _prepare(self, facts: Facts) -> None:
        """For a VM of ours: nothing of its last run is left, ports that are free now, VirtualBox in line with it."""
        if self._record is None:
            return
        if why := await self._unusable():
            raise imageid.unusable(self.name, self._image, why)
        media.lay_link(self._image, self._record.files.folder)
        await self._end_orphan(self._record.files.log)
        self._console.finish()
        forwards = tuple(vbox_forwards.with_free_port(forward) for forward in self._record.definition.forwards)
        self._record.change(forwards=forwards, console_start=self._console.size(), running=True)
        if await setup.align(self._host, self._record.definition, facts):
            self._facts.renew()
        self._console.begin()

    async def _end_orphan(self, log_file: Path) -> None:
        """A VM process that VirtualBox does not know any more (its service died) still has the disk open: end it."""
        if self._monitor.process is not None or self._monitor.find_process(log_file):
            log.warning("%s: a process of its last run is still there", self.name)
            await self._monitor.gone()

    async def _start(self, before: VmState) -> None:
        self._tracker.ending = False
        limit = START_LIMIT_S + (self._state_limit_s() if before is VmState.SAVED else 0.0)
        try:
            words = ("startvm", self.uuid, "--type", "headless")
            await self._host.vbox.do(
                f"starting {self.name}", *words, limit_s=limit, done=self._monitor.reached(VmState.RUNNING)
            )
        except HypervisorError:
            self._facts.forget()
            await self._tracker.not_live()
            if before is not VmState.ABORTED:
                self._remember(running=False)  # the guest never ran
            raise
        self._tracker.trouble = ""
        self._facts.state_is(VmState.RUNNING)
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
        async with self._lock:
            state = await self._tracker.asked()
            if state is VmState.SAVED:
                await self._host.vbox.do(f"discarding the state of {self.name}", "discardstate", self.uuid)
                self._facts.forget()
            elif state in LIVE_STATES:
                if acpi_grace_s > 0 and state is VmState.RUNNING:
                    await self._ask_to_shut_down(acpi_grace_s)
                with self._tracker.in_phase(VmState.STOPPING):
                    await self._switch_off()
                self._remember(running=False)
            await self._tracker.tell_asked()

    async def _ask_to_shut_down(self, grace_s: float) -> None:
        ended = self._monitor.end()
        try:
            await self._host.vbox.do(f"shutting down {self.name}", "controlvm", self.uuid, "acpipowerbutton")
            if ended is not None:
                await with_limit(self._host.reactor, grace_s, "the guest's shutdown", ended.wait())
        except (HypervisorError, LimitReached) as error:
            log.info("%s: %s; powering off", self.name, error)

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
        self._facts.forget()
        if await self._tracker.not_live() is None:
            raise HypervisorError(f"{self.name} still runs after it was switched off, says VirtualBox")

    async def delete(self) -> None:
        """Unregister it with its media and remove its folder. The project's image is not known to VirtualBox."""
        if self.files is None:
            raise WrongState(f"{self.name} was there before us and is not ours to delete")
        async with self._lock:
            self._tracker.ending = True
            if self._monitor.process is None and self._tracker.of(await self._look_or_off()) in LIVE_STATES:
                await self._host.vbox.ask("controlvm", self.uuid, "poweroff")
            self._monitor.kill()  # nothing of it is wanted; switching it off in order takes 0.3 s longer
            await self._monitor.gone()
            await self._host.registration.unregister(self.uuid, self.files)
            self.close()
            await in_thread(self._host.reactor, self.files.remove)
            self._tracker.tell(VmState.POWERED_OFF)

    async def _look_or_off(self) -> Facts:
        try:
            return await self._facts.look()
        except HypervisorError as error:
            log.info("%s: %s; deleting it all the same", self.name, error)
            return Facts(self.uuid, self.name, VmState.POWERED_OFF, "", "", "", {}, {}, {}, (), (), None, (), 0)

    # Pause, save ----------------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        await self._pause_or_resume("paused", "pause", VmState.PAUSED, VmState.RUNNING)

    async def unpause(self) -> None:
        await self._pause_or_resume("resumed", "resume", VmState.RUNNING, VmState.PAUSED)

    async def _pause_or_resume(self, what: str, word: str, wanted: VmState, from_: VmState) -> None:
        async with self._lock:
            state = await self._live(what, wanted, from_, *self._stuck())
            if state is VmState.STUCK and wanted is VmState.PAUSED:
                return  # it stands already, and is what it was until it is resumed
            if state is not wanted:
                words = ("controlvm", self.uuid, word)
                await self._host.vbox.do(f"{self.name} to be {what}", *words, done=self._monitor.reached(wanted))
                self._facts.state_is(wanted)
                self._monitor.read_log()  # what it says of this is no news
                self._console.copy()
            self._tracker.tell(wanted)
            if state is VmState.STUCK:
                self._tracker.look_again_soon()

    async def save_state(self) -> None:
        async with self._lock:
            before = await self._live("saved", VmState.RUNNING, VmState.PAUSED, *self._stuck())
            with self._tracker.in_phase(VmState.SAVING):
                self._tracker.ending = True
                try:
                    words = ("controlvm", self.uuid, "savestate")
                    await self._host.vbox.do(
                        f"saving {self.name}", *words, limit_s=self._state_limit_s(), done=self._monitor.end()
                    )
                    await self._monitor.gone()
                except BaseException as error:
                    if not await self._saved_all_the_same(error):
                        self._tracker.ending = False
                        await self._go_on(before)
                        self._raise_if_full(error)
                        raise
                self._console.copy()
                if self.files is not None:
                    await in_thread(self._host.reactor, self.files.sync)
                self._remember(running=False)
            self._facts.forget()
            state = await self._tracker.tell_asked()
            if state is not VmState.SAVED:
                raise HypervisorError(f"{self.name} is {state} after its state was saved")

    async def _saved_all_the_same(self, error: BaseException) -> bool:
        """VirtualBox complains now and then when the process of a VM that was just saved ends too early for it."""
        self._facts.forget()
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
                await self._host.vbox.do(f"{self.name} to be resumed", "controlvm", self.uuid, "resume")
        except HypervisorError as error:  # what failed before is told; that it stands is seen by its state
            log.error("%s stays paused: %s", self.name, error)
        self._facts.forget()

    # Snapshots ------------------------------------------------------------------------------------------------------

    async def save_snapshot(self, snapshot: str, description: str) -> None:
        snapshots.check_name(snapshot)
        async with self._lock:
            facts = await self._facts.look()
            state = self._tracker.of(facts)
            with self._tracker.in_phase(state):
                try:
                    live, limit_s = state is VmState.RUNNING, self._state_limit_s()
                    await self._snapshots.take(snapshot, description, live=live, limit_s=limit_s)
                except BaseException:
                    self._facts.forget()
                    await self._go_on(state)
                    raise
                self._facts.forget()
                try:
                    if self.files is not None:
                        await in_thread(self._host.reactor, self.files.sync)
                except BaseException:
                    await self._take_back(facts)
                    raise
                for older in facts.snapshots:  # the same name taken again replaces the older one, kept until now
                    if older.name == snapshot:
                        await self._delete_snapshot(older)

    async def _take_back(self, before: Facts) -> None:
        """After a snapshot that failed: one that was told to nobody may not take the disk, nor be gone back to."""
        known = {one.uuid for one in before.snapshots}
        try:
            for one in (await self._facts.look()).snapshots:
                if one.uuid not in known:
                    await self._delete_snapshot(one)
        except HypervisorError as error:
            log.warning("%s: a snapshot that failed is still there: %s", self.name, error)

    async def restore_snapshot(self, snapshot: str | None) -> None:
        async with self._lock:
            facts = await self._facts.look()
            if self._tracker.of(facts) in LIVE_STATES:
                raise WrongState(f"{self.name}: a VM that is live cannot go back to a snapshot; power it off first")
            found = snapshots.find(facts, self.name, snapshot)
            self._console.copy()
            await self._snapshots.restore(found, limit_s=self._state_limit_s())
            if self.files is not None:
                await in_thread(self._host.reactor, self.files.sync)
            self._remember(running=False)
            self._tracker.trouble = ""
            self._facts.forget()
            await self._tracker.tell_asked()

    async def delete_snapshot(self, snapshot: str) -> None:
        async with self._lock:
            for one in (await self._facts.look()).snapshots:
                if one.name == snapshot:
                    await self._delete_snapshot(one)

    async def _delete_snapshot(self, snapshot: Snapshot) -> None:
        self._facts.forget()
        try:
            await self._snapshots.delete(snapshot)
        finally:
            self._facts.forget()

    async def list_snapshots(self) -> list[str]:
        return list(dict.fromkeys(one.name for one in (await self._facts.look()).snapshots))

    # Network, processor ---------------------------------------------------------------------------------------------

    async def set_network(self, connected: bool) -> None:
        async with self._lock:
            definition = self.definition
            if definition is None or not definition.network:
                if connected:
                    raise WrongState(f"{self.name} was not granted the network")
                return
            self._remember(network_connected=connected)
            if definition.network_nic and await self._tracker.asked() in _MOVING:
                words = ("controlvm", self.uuid, f"setlinkstate{definition.network_nic}", "on" if connected else "off")
                await self._host.vbox.do(f"network of {self.name}", *words)

    async def set_cpu_cap(self, percent: int) -> None:
        if not 1 <= percent <= 100:
            raise WrongState(f"{self.name}: a processor cannot be limited to {percent} %")
        async with self._lock:
            if await self._tracker.asked() in _MOVING:
                words = ["controlvm", self.uuid, "cpuexecutioncap", str(percent)]
            elif not self.ours:
                raise WrongState(f"{self.name} was there before us and is not ours to change")
            else:
                words = ["modifyvm", self.uuid, (await self._host.dialect()).option("cpu-cap"), str(percent)]
            await self._host.vbox.do(f"processor share of {self.name}", *words)

    async def screenshot(self, path: Path) -> None:
        async with self._lock:
            await self._live("looked at", VmState.RUNNING, VmState.PAUSED)
            await self._host.vbox.do(f"picture of {self.name}", "controlvm", self.uuid, "screenshotpng", str(path))

    # Helpers --------------------------------------------------------------------------------------------------------

    def _stuck(self) -> tuple[VmState, ...]:
        """Stuck, for what may also be done to a guest that only a run-time error holds up: it lacks nothing."""
        return (VmState.STUCK,) if self._tracker.held else ()

    async def _live(self, what: str, *allowed: VmState) -> VmState:
        state = await self._tracker.asked()
        if state not in allowed:
            raise WrongState(f"{self.name} cannot be {what}: it is {state}")
        return state

    def _state_limit_s(self) -> float:
        return STATE_BASE_LIMIT_S + (self.definition.memory_mb if self.definition else 8192) / STATE_MIB_PER_S

    def _remember(self, **changes: Any) -> None:
        if self._record is not None:
            self._record.change(**changes)

    def close(self) -> None:
        """Watch nothing any more."""
        self._console.close()
        self._monitor.close()
