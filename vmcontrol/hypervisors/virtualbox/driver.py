"""The VirtualBox driver: which VMs there are, and whether VirtualBox works here. What is done to one VM: vm.py.

Owns the folder that holds the VMs' folders. VM processes are children of VirtualBox's service, not ours: they outlive
this process, the next one finds them again, and BOINC's client is told their pids.
More: docs/internals/drivers/virtualbox.md.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from twisted.internet.defer import DeferredLock

from vmcontrol.common.atomicfile import fsync_folder
from vmcontrol.common.slotfiles import VBOXMANAGE_TRACE
from vmcontrol.common.threads import in_thread
from vmcontrol.hypervisors.common import imageid
from vmcontrol.hypervisors.common.diskimage import BadImage
from vmcontrol.hypervisors.common.own_files import told_by
from vmcontrol.hypervisors.interface import (
    Capabilities,
    HostProblem,
    HypervisorError,
    Probe,
    StateListener,
    VmExists,
    VmNotFound,
    VmSpec,
)
from vmcontrol.hypervisors.qemu.files import make_private, sweep
from vmcontrol.hypervisors.virtualbox import create as vbox_create
from vmcontrol.hypervisors.virtualbox import output, problems
from vmcontrol.hypervisors.virtualbox import probe as vbox_probe
from vmcontrol.hypervisors.virtualbox.dialect import OLDEST, Dialect
from vmcontrol.hypervisors.virtualbox.existing import Existing
from vmcontrol.hypervisors.virtualbox.files import VM_NAME, Record, VmFiles
from vmcontrol.hypervisors.virtualbox.media import write_base
from vmcontrol.hypervisors.virtualbox.output import Listed
from vmcontrol.hypervisors.virtualbox.registration import Registration
from vmcontrol.hypervisors.virtualbox.vboxmanage import VBoxManage
from vmcontrol.hypervisors.virtualbox.vm import VBoxVm
from vmcontrol.hypervisors.virtualbox.watch import FolderWatch
from vmcontrol.protocol import vmlimits
from vmcontrol.protocol.vm import LIVE_STATES, VmInfo, VmState

log = logging.getLogger(__name__)
_operation = told_by(problems.explain)
T = TypeVar("T")


class VirtualBoxHypervisor:
    """See interface.Hypervisor."""

    name = "VirtualBox"
    capabilities = Capabilities(
        live_snapshot=True, cpu_cap=True, host_only_network=True, remote_desktop=True, existing_vms=True
    )

    def __init__(self, reactor: Any, folder: Path, *, program: str | None = None) -> None:
        """folder: holds one folder a VM (<slot>/vm). program: the VBoxManage to call; None looks for it."""
        self.reactor = reactor
        self._folder = folder.absolute()
        slot = self._folder.parent
        self.vbox = VBoxManage(reactor, slot / VBOXMANAGE_TRACE if slot.is_dir() else None, program=program)
        self.watch = FolderWatch(reactor)
        self.registration = Registration(self.vbox, self._folder)
        self._dialect: Dialect | None = None
        self._max_cpus: int | None = None
        self._vms: dict[str, VBoxVm] = {}
        self._registry_lock = DeferredLock()
        self._listeners: list[StateListener] = []
        self._probe: Probe | None = None
        self._probe_lock = DeferredLock()
        self._existing = Existing(self._folder)

    # The computer ---------------------------------------------------------------------------------------------------

    def missing(self) -> str:
        return problems.not_installed().reason if self.vbox.program is None else ""

    async def probe(self) -> Probe:
        """Boots a test VM, once a HostMain, and once a boot of the computer where that can be kept."""
        async with self._probe_lock:
            if self._probe is None:
                self._probe = await vbox_probe.probe(self)
            return self._probe

    async def dialect(self) -> Dialect:
        """How this VirtualBox is spoken to. Raises HostProblem: not installed, too old, service broken."""
        if self._dialect is None:
            said = await self.vbox.do("asking VirtualBox for its version", "--version")
            version = output.version(said)
            if version is None:
                raise problems.explain("asking VirtualBox for its version", said)
            dialect = Dialect(version)
            if not dialect.supported:
                raise problems.too_old(version, OLDEST)
            self._dialect = dialect
            log.info("VirtualBox %s (%s)", version, self.vbox.program)
        return self._dialect

    async def max_cpus(self) -> int:
        if self._max_cpus is None:
            dialect = await self.dialect()
            answer = await self.vbox.ask("list", "systemproperties")
            self._max_cpus = output.max_cpus(answer.out) or dialect.max_cpus
        return self._max_cpus

    # Create, delete -------------------------------------------------------------------------------------------------

    async def create(self, spec: VmSpec) -> None:
        most_cpus = vmlimits.SAFE_CPUS if spec.cpus <= vmlimits.SAFE_CPUS else await self.max_cpus()
        vbox_create.check(spec, self._folder, most_cpus)
        dialect = await self.dialect()
        async with self._registry_lock:
            listed = await self.registration.listed()
            files = VmFiles(self._folder / spec.name)
            if spec.name in self._vms or await self._is_there(spec.name, listed):
                raise VmExists(f"a virtual machine {spec.name} is there already")
            await self.registration.forget_vanished(listed)
            adapter = await vbox_create.host_only_adapter(self.vbox) if spec.network_mode == "hostonly" else None
            await self.registration.clear(files, listed)
            try:
                make_private(files.folder)
                files.logs.mkdir(mode=0o700)
                image_id = await in_thread(self.reactor, imageid.identify, spec.image)
                definition = vbox_create.define(spec, image_id)
                write_base(spec.image, files.folder, definition.uuid)
                files.store(definition)
                await vbox_create.make(self.vbox, dialect, spec, definition, files, adapter=adapter)
                definition = replace(definition, complete=True)
                files.store(definition)
                fsync_folder(self._folder)
            except BaseException as error:
                await self.registration.undo(files)
                if isinstance(error, FileNotFoundError) and not spec.image.exists():
                    raise problems.bad_image(spec.image, "it is not there", missing=True) from error
                if isinstance(error, BadImage):
                    raise problems.bad_image(spec.image, str(error)) from error
                if isinstance(error, IsADirectoryError):
                    raise problems.bad_image(spec.image, error.strerror or str(error)) from error
                if isinstance(error, OSError):
                    raise problems.explain(f"creating {spec.name}", f"{error.filename}: {error.strerror}") from error
                raise
            self._vms[spec.name] = VBoxVm(self, spec.name, definition.uuid, Record(files, definition))

    async def _is_there(self, name: str, listed: list[Listed]) -> bool:
        definition = VmFiles(self._folder / name).load()
        if definition is not None:
            return definition.complete and any(one.uuid == definition.uuid for one in listed)
        return any([not await self.registration.forget_left_over(one) for one in listed if one.name == name])

    @_operation("deleting")
    async def delete(self, name: str) -> None:
        try:
            vm = await self._vm(name)
        except VmNotFound:
            if VM_NAME.fullmatch(name):
                files = VmFiles(self._folder / name)
                if files.folder.is_dir():
                    await self.registration.clear(files, await self.registration.listed())
            return
        except HypervisorError as error:
            if not VM_NAME.fullmatch(name) or VmFiles(self._folder / name).is_readable():
                raise
            log.warning("%s; deleting the folder all the same", error)  # what is unreadable must not stay for ever
            await self.registration.clear(VmFiles(self._folder / name), await self.registration.listed())
            return
        try:
            await vm.delete()
        finally:
            if vm.files is not None and not vm.files.definition.exists():
                self._vms.pop(name, None)  # what is left of it is for `sweep`

    # Which VMs there are --------------------------------------------------------------------------------------------

    @_operation("finding")
    async def _vm(self, name: str) -> VBoxVm:
        """A VM by name, or an existing one by its UUID. Raises VmNotFound."""
        known = self._vms.get(name)
        if known is not None:
            return known
        async with self._registry_lock:
            known = self._vms.get(name)
            if known is not None:
                return known
            vm = await self._find(name)
            if vm is None:
                raise VmNotFound(f"No VM by the name/id {name} found")
            self._vms[name] = vm
            return vm

    async def _find(self, name: str) -> VBoxVm | None:
        if not name or not name.isprintable():
            return None
        listed = await self.registration.listed()
        if VM_NAME.fullmatch(name):
            files = VmFiles(self._folder / name)
            definition = files.load()
            if definition is not None and definition.complete:
                vm = VBoxVm(self, name, definition.uuid, Record(files, definition))
                registered = next((one for one in listed if one.uuid == definition.uuid), None)
                here = self.registration.is_here(definition.uuid, files)
                if registered is None or not registered.accessible or not here:
                    try:
                        await self.registration.register_anew(vm.name, vm.uuid, files)
                    except HostProblem as problem:
                        if problem.key != problems.IN_USE:
                            raise
                        # VirtualBox knows one VM of a UUID: this one could not run beside the one that it was copied of
                        log.warning("%s: the one that it is a copy of runs: the copy is given up", name)
                        files.remove()
                        return None
                return vm
        for one in listed:
            if one.accessible and name in (one.name, one.uuid) and not await self.registration.forget_left_over(one):
                return VBoxVm(self, one.name, one.uuid)
        return None

    async def list_vms(self) -> list[str]:
        sweep(self._folder)
        listed = await self.registration.listed()
        names = [one.name for one in listed if one.accessible]
        known = {one.uuid for one in listed if one.accessible}
        for folder in sorted(self._folder.iterdir()) if self._folder.is_dir() else []:
            if folder.name in names or not VM_NAME.fullmatch(folder.name) or not folder.is_dir():
                continue
            try:
                definition = VmFiles(folder).load()
                if definition is not None and definition.complete and definition.uuid not in known:
                    await self._vm(folder.name)
                    names.append(folder.name)
            except HypervisorError as error:
                log.warning("%s is left out: %s", folder.name, error)
        return names

    async def list_running(self) -> list[str]:
        said = await self.vbox.do("asking for the virtual machines", "list", "runningvms")
        names = [one.name for one in output.vm_list(said)]
        for name in names:  # so that what happens to them is told
            if await self.state(name) not in LIVE_STATES:
                names.remove(name)
        return names

    # What is done to one --------------------------------------------------------------------------------------------

    @_operation("starting")
    async def start(self, name: str) -> None:
        await self.take(name)
        await (await self._vm(name)).start()

    @_operation("taking")
    async def take(self, name: str) -> None:
        """An existing VM is used from now on. A VM of ours needs no such note."""
        vm = await self._vm(name)
        if not vm.ours:
            self._existing.take(vm.name, vm.uuid, await vm.state())

    @_operation("releasing")
    async def release(self, name: str) -> None:
        """An existing VM is not needed any more: left as it was found, our snapshots gone, free for others."""
        vm = await self._vm(name)
        if vm.ours:
            return
        found = self._existing.found(vm.uuid)
        if found is None:
            return
        for snapshot in await vm.list_snapshots():
            if self._existing.is_our_snapshot(snapshot):
                await vm.delete_snapshot(snapshot)
        state = await vm.state()
        if found in (VmState.POWERED_OFF, VmState.ABORTED):
            await vm.power_off(0.0)
        elif state in LIVE_STATES:  # one that is Stuck, too: what cannot be saved is not given back as saved
            await vm.save_state()
        self._existing.release(vm.uuid)

    @_operation("pausing")
    async def pause(self, name: str) -> None:
        await (await self._vm(name)).pause()

    @_operation("resuming")
    async def unpause(self, name: str) -> None:
        await (await self._vm(name)).unpause()

    @_operation("saving")
    async def save_state(self, name: str) -> None:
        await (await self._vm(name)).save_state()

    @_operation("switching off")
    async def power_off(self, name: str, *, acpi_grace_s: float = 0.0) -> None:
        await (await self._vm(name)).power_off(acpi_grace_s)

    @_operation("the state of")
    async def state(self, name: str) -> VmState:
        return await self._asked(name, VBoxVm.state)

    @_operation("looking at")
    async def info(self, name: str) -> VmInfo:
        return await self._asked(name, VBoxVm.info)

    async def _asked(self, name: str, question: Callable[[VBoxVm], Awaitable[T]]) -> T:
        vm = await self._vm(name)
        try:
            return await question(vm)
        except VmNotFound:
            vm.close()
            self._vms.pop(name, None)  # somebody else deleted it
            raise

    @_operation("a snapshot of")
    async def save_snapshot(self, name: str, snapshot: str, description: str = "") -> None:
        await (await self._vm(name)).save_snapshot(snapshot, description)

    @_operation("going back to a snapshot of")
    async def restore_snapshot(self, name: str, snapshot: str | None = None) -> None:
        await (await self._vm(name)).restore_snapshot(snapshot)

    @_operation("deleting a snapshot of")
    async def delete_snapshot(self, name: str, snapshot: str) -> None:
        await (await self._vm(name)).delete_snapshot(snapshot)

    @_operation("the snapshots of")
    async def list_snapshots(self, name: str) -> list[str]:
        return await (await self._vm(name)).list_snapshots()

    @_operation("the load of")
    async def performance(self, name: str) -> dict[str, float]:
        return await (await self._vm(name)).performance()

    @_operation("the network of")
    async def set_network(self, name: str, connected: bool) -> None:
        await (await self._vm(name)).set_network(connected)

    async def set_cpu_cap(self, name: str, percent: int) -> None:
        await (await self._vm(name)).set_cpu_cap(percent)

    async def screenshot(self, name: str, path: Path) -> None:
        """What the guest's screen shows, as PNG; for a guest that does not answer."""
        await (await self._vm(name)).screenshot(path)

    def on_state_change(self, listener: StateListener) -> None:
        self._listeners.append(listener)

    def state_changed(self, name: str, state: VmState) -> None:
        """Called by a VM. A listener's error is its own."""
        log.info("%s: %s", name, state)
        for listener in self._listeners:
            try:
                listener(name, state)
            except Exception:
                log.exception("a listener for the states of VMs failed")

    async def close(self) -> None:
        for vm in self._vms.values():
            vm.close()
        self.watch.close()
        self._existing.close()
