"""The VirtualBox driver: which VMs there are, and whether VirtualBox works here. What is done to one VM: vm.py.

Owns the folder that holds the VMs' folders. VM processes are children of VirtualBox's service, not ours: they outlive
this process, the next one finds them again, and BOINC's client gets their pids.
docs/internals/drivers/virtualbox.md.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from twisted.internet.defer import DeferredLock

from vmcontrol.common.atomicfile import fsync_folder
from vmcontrol.common.slotfiles import VBOXMANAGE_TRACE
from vmcontrol.common.threads import in_thread
from vmcontrol.hypervisors.common import spec as specs
from vmcontrol.hypervisors.common.diskimage import BadImage
from vmcontrol.hypervisors.common.driver import BaseDriver, already_there, inspect
from vmcontrol.hypervisors.common.folder import VM_NAME, make_private
from vmcontrol.hypervisors.common.problems import bad_image
from vmcontrol.hypervisors.interface import (
    Capabilities,
    HostProblem,
    HypervisorError,
    Probe,
    SpecRefused,
    VmNotFound,
    VmSpec,
)
from vmcontrol.hypervisors.virtualbox import create as vbox_create
from vmcontrol.hypervisors.virtualbox import output, problems
from vmcontrol.hypervisors.virtualbox.dialect import OLDEST, Dialect
from vmcontrol.hypervisors.virtualbox.files import Definition, Record, VmFiles
from vmcontrol.hypervisors.virtualbox.media import write_base, write_further
from vmcontrol.hypervisors.virtualbox.output import Listed
from vmcontrol.hypervisors.virtualbox.probe import probe
from vmcontrol.hypervisors.virtualbox.registration import Registration
from vmcontrol.hypervisors.virtualbox.vboxmanage import VBoxManage
from vmcontrol.hypervisors.virtualbox.vm import VBoxVm
from vmcontrol.hypervisors.virtualbox.watch import FolderWatch
from vmcontrol.protocol import vmlimits
from vmcontrol.protocol.vm import LIVE_STATES

log = logging.getLogger(__name__)
_OS_TYPE = re.compile(r"[A-Za-z0-9_.-]{1,50}")


class VirtualBoxHypervisor(BaseDriver[VBoxVm]):
    """See interface.Hypervisor."""

    name = "VirtualBox"
    capabilities = Capabilities(cpu_cap=True, host_only_network=True)

    def __init__(self, reactor: Any, folder: Path, *, program: str | None = None) -> None:
        """folder: holds one folder a VM (<slot>/vm). program: the VBoxManage to call; None looks for it."""
        super().__init__(reactor, folder)
        slot = self.folder.parent
        self.vbox = VBoxManage(reactor, slot / VBOXMANAGE_TRACE if slot.is_dir() else None, program=program)
        self.watch = FolderWatch(reactor)
        self.registration = Registration(self.vbox, self.folder)
        self._dialect: Dialect | None = None
        self._max_cpus: int | None = None
        self._probe: Probe | None = None
        self._probe_lock = DeferredLock()

    def explain(self, what: str, text: str) -> HypervisorError:
        return problems.explain(what, text)

    # The computer ---------------------------------------------------------------------------------------------------

    def missing(self) -> str:
        return problems.not_installed().reason if self.vbox.program is None else ""

    async def probe(self) -> Probe:
        """Boots a test VM, once a HostMain, and once a boot of the computer where that can be kept."""
        async with self._probe_lock:
            if self._probe is None:
                self._probe = await self._tried()
            return self._probe

    async def _tried(self) -> Probe:
        program = self.vbox.program
        if program is None:
            return Probe(False, "", self.missing(), hardware=False)
        try:
            version = str((await self.dialect()).version)
        except HypervisorError as error:
            return Probe(False, "", str(error), hardware=False)
        return await probe(
            self.reactor, program, version, lambda folder: VirtualBoxHypervisor(self.reactor, folder, program=program)
        )

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
            self._max_cpus = output.max_cpus(answer.stdout) or dialect.max_cpus
        return self._max_cpus

    # VMs ------------------------------------------------------------------------------------------------------------

    async def check(self, spec: VmSpec) -> None:
        most_cpus = vmlimits.SAFE_CPUS if spec.cpus <= vmlimits.SAFE_CPUS else await self.max_cpus()
        specs.check(spec, self.folder, most_cpus, self.name)
        if not _OS_TYPE.fullmatch(spec.os_type):
            raise SpecRefused(f"{spec.name}: {spec.os_type!r} is no OS type")

    async def make(self, spec: VmSpec) -> VBoxVm:
        dialect, listed = await self.dialect(), await self.registration.listed()
        files = VmFiles(self.folder / spec.name)
        if await self._exists(spec.name, files.load(), listed):
            raise already_there(spec.name)
        inspect(spec.image)
        for disk in spec.disks:
            inspect(Path(disk))
        await self.registration.forget_vanished(listed)
        adapter = await vbox_create.host_only_adapter(self.vbox) if spec.network_mode == "hostonly" else None
        await self.registration.clear(files, listed)
        try:
            make_private(files.folder)
            files.logs.mkdir(mode=0o700)
            definition = vbox_create.define(spec, await in_thread(self.reactor, specs.DiskIds.of, spec))
            write_base(spec.image, files.folder, definition.uuid)
            for number, disk in enumerate(spec.disks):
                try:
                    write_further(Path(disk), files.folder, definition.uuid, number)
                except BadImage as error:
                    raise bad_image(disk, str(error)) from error
            files.store(definition)
            await vbox_create.make(self.vbox, dialect, spec, definition, files, adapter=adapter)
            definition = replace(definition, complete=True)
            files.store(definition)
            fsync_folder(self.folder)
        except BaseException:
            await self.registration.undo(files)
            raise
        return VBoxVm(self, spec.name, definition.uuid, Record(files, definition))

    async def _exists(self, name: str, definition: Definition | None, listed: Sequence[Listed]) -> bool:
        if definition is not None:
            return definition.complete and any(one.uuid == definition.uuid for one in listed)
        return any([not await self.registration.forget_left_over(one) for one in listed if one.name == name])

    async def find(self, name: str) -> VBoxVm | None:
        if not name or not name.isprintable():
            return None
        listed = await self.registration.listed()
        if VM_NAME.fullmatch(name):
            files = VmFiles(self.folder / name)
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
                known = (vm for vm in self.vms.values() if vm.uuid == one.uuid)  # by its other name
                return next(known, None) or VBoxVm(self, one.name, one.uuid)
        return None

    async def delete_rest(self, name: str, why: HypervisorError) -> None:
        files = VmFiles(self.folder / name)
        if not isinstance(why, VmNotFound):
            if not VM_NAME.fullmatch(name) or files.is_readable():
                raise why
            log.warning("%s; deleting the folder all the same", why)  # what is unreadable must not stay for ever
        if VM_NAME.fullmatch(name) and files.folder.is_dir():
            await self.registration.clear(files, await self.registration.listed())

    async def list_vms(self) -> list[str]:
        listed = [one for one in await self.registration.listed() if one.accessible]
        names, known = [one.name for one in listed], {one.uuid for one in listed}

        def is_unknown(folder: Path) -> bool:
            definition = VmFiles(folder).load() if folder.name not in names else None
            return definition is not None and definition.complete and definition.uuid not in known

        return [*names, *await self.in_folders(is_unknown)]

    async def list_running(self) -> list[str]:
        said = await self.vbox.do("asking for the virtual machines", "list", "runningvms")
        names = [one.name for one in output.vm_list(said)]
        # asked for the state, so that what happens to them is reported from now on
        return [name for name in names if await self.state(name) in LIVE_STATES]

    async def close(self) -> None:
        for vm in self.vms.values():
            vm.close()
        self.watch.close()
