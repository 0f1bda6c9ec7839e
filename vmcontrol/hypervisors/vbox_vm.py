"""One VirtualBox VM: what is done to it, and what becomes of it by itself.

Operations wait for each other; `state` and `info` do not wait. VirtualBox is asked for the state (`showvminfo`), and an
answer counts until something happens to the VM: an operation of ours, a line in its log, a change of its settings, the
end of its process (vbox_watch), or until it is a few seconds old. VMs that we did not make are used, never changed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import psutil
from twisted.internet import threads
from twisted.internet.defer import DeferredLock

from vmcontrol.eventloop import Event, LimitReached, sleep, start_logged, with_limit
from vmcontrol.hypervisors import vbox_faults, vbox_forwards, vbox_output, vbox_snapshots
from vmcontrol.hypervisors.interface import (
    LIVE_STATES,
    Fault,
    HypervisorError,
    StateUnusable,
    VmInfo,
    VmState,
    WrongState,
)
from vmcontrol.hypervisors.vbox_console import Console
from vmcontrol.hypervisors.vbox_dialect import Dialect
from vmcontrol.hypervisors.vbox_files import Definition, Record, VmFiles
from vmcontrol.hypervisors.vbox_output import Facts, Snapshot
from vmcontrol.hypervisors.vbox_registration import Registration
from vmcontrol.hypervisors.vbox_snapshots import Snapshots
from vmcontrol.hypervisors.vbox_watch import FolderWatch, Follower, VmProcess, is_vm_process
from vmcontrol.hypervisors.vboxmanage import VBoxManage

log = logging.getLogger(__name__)

FACTS_KEPT_S = 5.0
"""How long an answer counts of a VM of ours, whose folder is watched."""
FACTS_KEPT_UNWATCHED_S = 0.5
START_LIMIT_S = 180.0
STATE_BASE_LIMIT_S, STATE_MIB_PER_S = 60.0, 10.0
"""Limit of writing or reading a machine's state: so long, and the time of a very slow disk."""
END_LIMIT_S = 10.0
"""A VM process that was switched off ends within 0.4 s; after this it is killed."""
DEATH_LIMIT_S = 10.0
"""Until VirtualBox knows that a VM's process is gone: 0.1 s."""
LOOK_EVERY_S = 0.05
LOG_HEAD, LOG_TAIL = 64 * 1024, 1024 * 1024
"""Bytes. The process is told in the first lines; a VM that is switched off writes its statistics at the end."""


class Host(Protocol):
    """What a VM needs of its driver."""

    reactor: Any
    vbox: VBoxManage
    watch: FolderWatch
    registration: Registration

    async def dialect(self) -> Dialect: ...
    def state_changed(self, name: str, state: VmState) -> None: ...


class VBoxVm:
    """A VM that is registered with VirtualBox. record: None for one that we did not make."""

    def __init__(self, host: Host, name: str, uuid: str, record: Record | None = None) -> None:
        self.name = name
        self.uuid = uuid
        self.trouble = ""
        self._host = host
        self._record = record
        self._console = Console(record)
        self._snapshots = Snapshots(host.vbox, name, uuid)
        self._lock = DeferredLock()
        self._look_lock = DeferredLock()
        self._facts: Facts | None = None
        self._facts_at = 0.0
        self._process: VmProcess | None = None
        self._log: Follower | None = Follower(record.files.log) if record is not None else None
        self._settings_seen: tuple[int, int] | None = None
        self._watched: list[Path] = []
        self._phase: VmState | None = None
        self._wanted: VmState | None = None
        self._reached = Event()
        """Set when the log tells of the state `_wanted`."""
        self._ending = False
        self._told: VmState | None = None
        self._closed = False

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
        if self._phase is not None:
            return self._phase
        return self._state_of(await self.look())

    def _state_of(self, facts: Facts) -> VmState:
        """VirtualBox forgets that a VM ran when its service dies with it, or the power fails: then it was aborted."""
        if facts.state is None:
            raise HypervisorError(f"VirtualBox says that {facts.name} is {facts.state_word!r}, which is not known here")
        ran = self.definition is not None and self.definition.running and self._phase is None
        return VmState.ABORTED if ran and facts.state is VmState.POWERED_OFF else facts.state

    async def look(self, *, fresh: bool = False) -> Facts:
        """What VirtualBox says of it. Raises HypervisorErrors."""
        async with self._look_lock:
            if self._facts is not None and not fresh and self._counts():
                return self._facts
            began = self._host.reactor.seconds()
            words = ("showvminfo", self.uuid, "--machinereadable")
            answer = await self._host.vbox.ask(*words)
            if answer.status != 0 and vbox_faults.is_limited(answer.text):
                await self._host.registration.register_anew(self.name, self.uuid, self.files)
                answer = await self._host.vbox.ask(*words)
            if answer.status != 0:
                self._facts = None
                raise vbox_faults.explain(f"asking for {self.name}", answer.text)
            facts = vbox_output.facts(answer.out)
            if facts is None:
                raise HypervisorError(
                    f"VirtualBox's answer about {self.name} cannot be understood: {answer.text[:300]}"
                )
            self._facts, self._facts_at = facts, began
            self._settings_seen = self._settings_now()
            self._follow(facts)
            return facts

    def _counts(self) -> bool:
        age: float = self._host.reactor.seconds() - self._facts_at
        if not self._watched:
            return age < FACTS_KEPT_UNWATCHED_S
        return age < FACTS_KEPT_S and self._settings_now() == self._settings_seen

    def _settings_now(self) -> tuple[int, int] | None:
        """VirtualBox writes its settings anew at each change that is to last: state, snapshots, hardware."""
        if self.files is None:
            return None
        try:
            status = self.files.settings.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def _now_is(self, state: VmState) -> None:
        """VirtualBox has just said so by the success of an operation."""
        if self._facts is not None:
            self._facts = replace(self._facts, state=state, state_word=state.value)
            self._facts_at = self._host.reactor.seconds()
            self._settings_seen = self._settings_now()

    def forget(self) -> None:
        """The next question goes to VirtualBox."""
        self._facts = None

    async def info(self) -> VmInfo:
        facts = await self.look()
        state = self._phase or self._state_of(facts)
        live = state in LIVE_STATES
        definition = self.definition
        agent: tuple[str, int] | None = None
        forwards: dict[int, int] = {}
        image = Path(facts.disks[0]) if facts.disks else None
        mac = facts.macs.get(2 if facts.nics.get(2, "").startswith("hostonly") else 1, "")
        if definition is not None:
            image, mac = Path(definition.image), definition.mac
            for forward in definition.forwards if live else ():
                if forward.name == vbox_forwards.AGENT_RULE:
                    agent = ("127.0.0.1", forward.used)
                else:
                    forwards[forward.guest_port] = forward.used
        port = facts.remote_desktop_port if live else 0
        return VmInfo(
            name=self.name,
            state=state,
            mac=mac,
            image=image,
            current_snapshot=facts.current_snapshot_name,
            pid=self._process.pid if live and self._process is not None else None,
            agent_address=agent,
            forwards=forwards,
            remote_desktop_address=f"127.0.0.1:{port}" if port else None,
            trouble=self.trouble if state in (VmState.ABORTED, VmState.STUCK) else "",
            link_token=definition.token if definition is not None and live else "",
        )

    def performance(self) -> dict[str, float]:
        cpu, memory = self._process.usage() if self._process is not None else (0.0, 0.0)
        disk = float(self.files.disk_bytes()) if self.files is not None else 0.0
        self._console.copy()
        self._console.bound()
        return {"cpu_time_s": cpu, "memory_bytes": memory, "disk_bytes": disk}

    # Start and end --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        async with self._lock:
            facts = await self.look()
            before = self._state_of(facts)
            if before not in (VmState.POWERED_OFF, VmState.ABORTED, VmState.SAVED):
                raise WrongState(f"{self.name} cannot be started: it is {before}")
            with self._in_phase(VmState.RESTORING if before is VmState.SAVED else VmState.STARTING):
                await self._prepare(facts)
                try:
                    await self._start(before)
                except HypervisorError as error:
                    if before is VmState.SAVED and type(error) is HypervisorError:
                        raise StateUnusable(str(error)) from error
                    raise
            self._tell(VmState.RUNNING)

    async def _start(self, before: VmState) -> None:
        self._ending = False
        limit = START_LIMIT_S + (self._state_limit_s() if before is VmState.SAVED else 0.0)
        try:
            words = ("startvm", self.uuid, "--type", "headless")
            await self._host.vbox.do(f"starting {self.name}", *words, limit_s=limit, done=self._effect(VmState.RUNNING))
        except HypervisorError:
            self.forget()
            await self._wait_not_live()
            if before is not VmState.ABORTED:
                self._remember(running=False)  # the guest never ran
            raise
        self.trouble = ""
        self._now_is(VmState.RUNNING)
        if self._facts is not None:
            self._follow(self._facts)
        await self._move_refused_forwards()

    async def _move_refused_forwards(self) -> None:
        if self.definition is None:
            return
        taken = vbox_forwards.refused(self.definition.forwards, self._log_text())
        if taken:
            log.warning("%s: the ports %s were taken while it started", self.name, taken)
            self._remember(forwards=await vbox_forwards.move(self._host.vbox, self.definition, taken))

    async def _prepare(self, facts: Facts) -> None:
        """Bring VirtualBox into line with the definition: ports that are free now, cables as they have to be."""
        definition, files = self.definition, self.files
        if definition is None or files is None:
            return
        self._check_image(definition)
        await self._end_orphan()
        self._console.finish()
        forwards = tuple(vbox_forwards.with_free_port(forward) for forward in definition.forwards)
        self._remember(forwards=forwards, console_start=self._console.size(), running=True)
        drop, add = vbox_forwards.difference(facts.forwards, forwards)
        cables = []
        nic = definition.network_nic
        if nic and facts.cables.get(nic) is not definition.network_connected:
            cables.append((nic, definition.network_connected))
        if drop or add or cables:
            words = (await self._host.dialect()).change(
                self.uuid, nic=definition.agent_nic, forwards=add, drop=drop, cables=cables
            )
            await self._host.vbox.do(f"setting up {self.name}", *words)
            self._facts_at = self._host.reactor.seconds()
        self._console.begin()

    async def _end_orphan(self) -> None:
        """A VM process that VirtualBox does not know any more (its service died) still has the disk open: end it."""
        if self._process is not None or (self.files is not None and self._find_process(self.files.log)):
            log.warning("%s: a process of its last run is still there", self.name)
            await self._process_gone()

    def _check_image(self, definition: Definition) -> None:
        image = Path(definition.image)
        try:
            status = image.stat()
        except OSError as error:
            raise vbox_faults.bad_image(image, error.strerror or str(error), missing=True) from error
        if (status.st_size, status.st_mtime_ns) != (definition.image_size, definition.image_time_ns):
            raise vbox_faults.bad_image(image, f"it was changed after {self.name} was made from it")

    async def power_off(self, acpi_grace_s: float) -> None:
        async with self._lock:
            state = self._state_of(await self.look())
            if state is VmState.SAVED:
                await self._host.vbox.do(f"discarding the state of {self.name}", "discardstate", self.uuid)
                self.forget()
            elif state in LIVE_STATES:
                if acpi_grace_s > 0 and state is VmState.RUNNING:
                    await self._ask_to_shut_down(acpi_grace_s)
                with self._in_phase(VmState.STOPPING):
                    await self._switch_off()
                self._remember(running=False)
            self._tell(self._state_of(await self.look()))

    async def _ask_to_shut_down(self, grace_s: float) -> None:
        process = self._process
        try:
            await self._host.vbox.do(f"shutting down {self.name}", "controlvm", self.uuid, "acpipowerbutton")
            if process is not None:
                await with_limit(self._host.reactor, grace_s, "the guest's shutdown", process.ended.wait())
        except (HypervisorError, LimitReached) as error:
            log.info("%s: %s; powering off", self.name, error)

    async def _switch_off(self) -> None:
        """End the VM process, if VirtualBox cannot then without it."""
        self._ending = True
        try:
            answer = await self._host.vbox.ask("controlvm", self.uuid, "poweroff", done=self._end())
            if answer.status != 0 and "is not currently running" not in answer.text:
                log.warning("%s: %s", self.name, vbox_faults.explain("switching it off", answer.text))
                self._kill()
        except Fault as fault:
            log.warning("%s: %s; killing its process", self.name, fault)
            self._kill()
        await self._process_gone()
        self._console.copy()
        self.forget()
        await self._wait_not_live()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    async def _process_gone(self) -> None:
        """Wait for the end of the VM's process; kill it when that takes too long."""
        process = self._process
        if process is None:
            return
        try:
            await with_limit(self._host.reactor, END_LIMIT_S, "the VM process", process.ended.wait())
        except LimitReached:
            log.warning("%s: process %d does not end; killing it", self.name, process.pid)
            process.kill()
            with contextlib.suppress(LimitReached):
                await with_limit(self._host.reactor, END_LIMIT_S, "the VM process", process.ended.wait())
        self._release_process()

    async def _wait_not_live(self) -> Facts | None:
        """Until VirtualBox knows that the process is gone. None: it does not say so within the limit."""
        deadline = self._host.reactor.seconds() + DEATH_LIMIT_S
        while True:
            facts = await self.look(fresh=True)
            if self._state_of(facts) not in LIVE_STATES:
                return facts
            if self._host.reactor.seconds() > deadline:
                return None
            await sleep(self._host.reactor, LOOK_EVERY_S)

    async def delete(self) -> None:
        """Unregister it with its media and remove its folder. The project's image is not known to VirtualBox."""
        if self.files is None:
            raise WrongState(f"{self.name} was there before us and is not ours to delete")
        async with self._lock:
            self._ending = True
            if self._process is None and self._state_of(await self._look_or_off()) in LIVE_STATES:
                await self._host.vbox.ask("controlvm", self.uuid, "poweroff")
            self._kill()  # nothing of it is wanted; switching it off in order takes 0.3 s longer
            await self._process_gone()
            await self._host.registration.unregister(self.uuid, self.files)
            self.close()
            await self._in_thread(self.files.remove)
            self._tell(VmState.POWERED_OFF)

    async def _look_or_off(self) -> Facts:
        try:
            return await self.look()
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
            state = await self._live(what, wanted, from_)
            if state is from_:
                words = ("controlvm", self.uuid, word)
                await self._host.vbox.do(f"{self.name} to be {what}", *words, done=self._effect(wanted))
                self._now_is(wanted)
                self._log_grew(told=wanted)
                self._console.copy()
            self._tell(wanted)

    async def save_state(self) -> None:
        async with self._lock:
            before = await self._live("saved", VmState.RUNNING, VmState.PAUSED)
            with self._in_phase(VmState.SAVING):
                self._ending = True
                try:
                    words = ("controlvm", self.uuid, "savestate")
                    await self._host.vbox.do(
                        f"saving {self.name}", *words, limit_s=self._state_limit_s(), done=self._end()
                    )
                    await self._process_gone()
                except BaseException as error:
                    if not await self._saved_all_the_same(error):
                        self._ending = False
                        await self._go_on(before)
                        raise
                self._console.copy()
                if self.files is not None:
                    await self._in_thread(self.files.sync)
                self._remember(running=False)
            self.forget()
            state = self._state_of(await self.look())
            self._tell(state)
            if state is not VmState.SAVED:
                raise HypervisorError(f"{self.name} is {state} after its state was saved")

    async def _saved_all_the_same(self, error: BaseException) -> bool:
        """VirtualBox complains now and then when the process of a VM that was just saved ends too early for it."""
        self.forget()
        if not isinstance(error, HypervisorError):
            return False
        try:
            saved = self._state_of(await self.look(fresh=True)) is VmState.SAVED
            if saved:
                log.warning("%s was saved, although VirtualBox says: %s", self.name, error)
                await self._process_gone()
        except HypervisorError:
            return False
        return saved

    async def _go_on(self, before: VmState) -> None:
        """After a failed save: VirtualBox leaves the guest paused."""
        with contextlib.suppress(HypervisorError):
            if before is VmState.RUNNING and self._state_of(await self.look()) is VmState.PAUSED:
                await self._host.vbox.ask("controlvm", self.uuid, "resume")
                self.forget()

    # Snapshots ------------------------------------------------------------------------------------------------------

    async def save_snapshot(self, snapshot: str, description: str) -> None:
        vbox_snapshots.check_name(snapshot)
        async with self._lock:
            facts = await self.look()
            state = self._state_of(facts)
            with self._in_phase(state):
                try:
                    live, limit_s = state is VmState.RUNNING, self._state_limit_s()
                    await self._snapshots.take(snapshot, description, live=live, limit_s=limit_s)
                except BaseException:
                    self.forget()
                    await self._go_on(state)
                    raise
                self.forget()
                if self.files is not None:
                    await self._in_thread(self.files.sync)
                for older in facts.snapshots:  # the same name taken again replaces the older one, kept until now
                    if older.name == snapshot:
                        await self._delete_snapshot(older)

    async def restore_snapshot(self, snapshot: str | None) -> None:
        async with self._lock:
            facts = await self.look()
            if self._state_of(facts) in LIVE_STATES:
                raise WrongState(f"{self.name}: a VM that is live cannot go back to a snapshot; power it off first")
            found = vbox_snapshots.find(facts, self.name, snapshot)
            self._console.copy()
            await self._snapshots.restore(found, limit_s=self._state_limit_s())
            if self.files is not None:
                await self._in_thread(self.files.sync)
            self._remember(running=False)
            self.trouble = ""
            self.forget()
            self._tell(self._state_of(await self.look()))

    async def delete_snapshot(self, snapshot: str) -> None:
        async with self._lock:
            for one in (await self.look()).snapshots:
                if one.name == snapshot:
                    await self._delete_snapshot(one)

    async def _delete_snapshot(self, snapshot: Snapshot) -> None:
        self.forget()
        try:
            await self._snapshots.delete(snapshot)
        finally:
            self.forget()

    async def list_snapshots(self) -> list[str]:
        return list(dict.fromkeys(one.name for one in (await self.look()).snapshots))

    # Network, processor ---------------------------------------------------------------------------------------------

    async def set_network(self, connected: bool) -> None:
        async with self._lock:
            definition = self.definition
            if definition is None or not definition.network:
                if connected:
                    raise WrongState(f"{self.name} was not granted the network")
                return
            self._remember(network_connected=connected)
            if definition.network_nic and self._state_of(await self.look()) in (VmState.RUNNING, VmState.PAUSED):
                words = ("controlvm", self.uuid, f"setlinkstate{definition.network_nic}", "on" if connected else "off")
                await self._host.vbox.do(f"network of {self.name}", *words)

    async def set_cpu_cap(self, percent: int) -> None:
        if not 1 <= percent <= 100:
            raise WrongState(f"{self.name}: a processor cannot be limited to {percent} %")
        async with self._lock:
            if self._state_of(await self.look()) in (VmState.RUNNING, VmState.PAUSED):
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

    # What happens by itself -----------------------------------------------------------------------------------------

    def _follow(self, facts: Facts) -> None:
        """Watch what there is to watch: the folder of a VM of ours, log and process of a live one."""
        if self._closed:
            return
        folder = Path(facts.log_folder) if facts.log_folder else None
        live = self._state_of(facts) in LIVE_STATES
        if folder is not None and (self.ours or live):
            self._watch_folder(folder)
        if folder is None or not live or self._process is not None:
            return
        log_file = folder / "VBox.log"
        if self._find_process(log_file):
            self._log = Follower(log_file)
            self._log.begin_at_end()
            self._console.follow()

    def _find_process(self, log_file: Path) -> bool:
        """Whether the process that writes this log is there and runs this VM; it is watched then."""
        try:
            pid = vbox_output.log_process(_head(log_file))
            if pid is not None and is_vm_process(pid, self.uuid):
                self._process = VmProcess(self._host.reactor, pid, self._process_ended)
        except (OSError, psutil.NoSuchProcess):
            return False
        return self._process is not None

    def _watch_folder(self, folder: Path) -> None:
        if folder not in self._watched and folder.is_dir():
            self._watched.append(folder)
            self._host.watch.add(folder, self._folder_changed)

    def _folder_changed(self) -> None:
        self._console.copy()
        self._log_grew()

    def _effect(self, wanted: VmState) -> Event:
        """Set when the log tells of this state, from now on."""
        self._log_grew(told=wanted)
        self._wanted, self._reached = wanted, Event()
        return self._reached

    def _end(self) -> Event | None:
        """Set when the VM's process has ended."""
        return self._process.ended if self._process is not None else None

    def _log_grew(self, told: VmState | None = None) -> None:
        """Look at what VirtualBox wrote; a state that is not known yet is asked for. told: an operation's result."""
        if self._log is None:
            return
        text = self._log.read().decode("utf-8", "replace")
        state = vbox_output.log_state(text)
        if state is not None and state is self._wanted:
            self._wanted = None
            self._reached.set()
        if state is None or told is not None or self._phase is not None or self._lock.locked:
            return
        if self._facts is None or state is not self._facts.state:
            self.forget()
            start_logged(self._ask_and_tell(), f"the state of {self.name}")

    async def _ask_and_tell(self) -> None:
        state = self._state_of(await self.look())
        if self._phase is None and not self._lock.locked:
            if state is VmState.STUCK or (state is VmState.PAUSED and self._told is VmState.RUNNING):
                self.trouble = vbox_output.log_trouble(self._log_text())
            self._tell(state)

    def _process_ended(self) -> None:
        self._release_process()
        self.forget()
        self._console.copy()
        if not self._ending and self._phase is None:
            start_logged(self._died(), f"the end of {self.name}")

    async def _died(self) -> None:
        """Its process ended, and not by us: the guest shut down, or it was killed or crashed."""
        try:
            if self._shut_down():
                self._remember(running=False)
            facts = await self._wait_not_live()
            state = VmState.ABORTED if facts is None else self._state_of(facts)
        except HypervisorError as error:
            log.warning("%s: its process ended, and VirtualBox does not tell more: %s", self.name, error)
            state = VmState.ABORTED
        if state is VmState.ABORTED:
            words = vbox_output.log_trouble(self._log_text())
            self.trouble = f"its process ended without saving anything{': ' if words else ''}{words}"
            log.warning("%s: %s", self.name, self.trouble)
        else:
            log.info("%s: its process ended; it is %s", self.name, state)
        if self._phase is None:
            self._tell(state)

    def _shut_down(self) -> bool:
        """Whether the log tells of an end in order: by the guest, or by somebody at VirtualBox's window."""
        return vbox_output.log_ends_in_order(self._log_text())

    def _log_text(self) -> str:
        path = self._log.path if self._log is not None else self.files.log if self.files is not None else None
        if path is None:
            return ""
        try:
            with path.open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - LOG_TAIL))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def _release_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.close()

    # Helpers --------------------------------------------------------------------------------------------------------

    async def _live(self, what: str, *allowed: VmState) -> VmState:
        state = self._state_of(await self.look())
        if state not in allowed:
            raise WrongState(f"{self.name} cannot be {what}: it is {state}")
        return state

    def _state_limit_s(self) -> float:
        return STATE_BASE_LIMIT_S + (self.definition.memory_mb if self.definition else 8192) / STATE_MIB_PER_S

    def _remember(self, **changes: Any) -> None:
        if self._record is not None:
            self._record.change(**changes)

    async def _in_thread(self, function: Callable[[], None]) -> None:
        reactor = self._host.reactor
        await threads.deferToThreadPool(reactor, reactor.getThreadPool(), function)

    @contextlib.contextmanager
    def _in_phase(self, phase: VmState) -> Iterator[None]:
        """What the VM counts as until the end of the block; after an error VirtualBox is asked."""
        self._phase = phase
        self._tell(phase)
        try:
            yield
        except BaseException:
            self._phase = None
            self.forget()
            start_logged(self._tell_state(), f"the state of {self.name}")
            raise
        self._phase = None

    async def _tell_state(self) -> None:
        self._tell(self._state_of(await self.look()))

    def _tell(self, state: VmState) -> None:
        if state is not self._told:
            self._told = state
            self._host.state_changed(self.name, state)

    def close(self) -> None:
        """Watch nothing any more."""
        self._closed = True
        self._console.close()
        for folder in self._watched:
            self._host.watch.remove(folder)
        self._watched.clear()
        self._release_process()


def _head(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(LOG_HEAD).decode("utf-8", "replace")
