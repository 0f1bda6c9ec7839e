"""The QEMU driver: which VMs there are, and whether QEMU works here. What is done to one VM: vm.py.

Owns the folder that holds the VMs' folders. VMs are children of this process and die with it.
docs/internals/drivers/qemu.md.
"""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, DeferredLock

from vmcontrol.common.atomicfile import fsync_folder, put_in_place
from vmcontrol.common.eventloop import LimitReached, start_logged
from vmcontrol.common.threads import defer_to_thread, in_thread
from vmcontrol.hypervisors.common import diskruns, tool
from vmcontrol.hypervisors.common import spec as specs
from vmcontrol.hypervisors.common.cache import cache_file
from vmcontrol.hypervisors.common.diskimage import BadImage
from vmcontrol.hypervisors.common.driver import BaseDriver, already_there, inspect
from vmcontrol.hypervisors.common.folder import VM_NAME, make_private
from vmcontrol.hypervisors.common.problems import MINUTES_5, bad_image
from vmcontrol.hypervisors.interface import Capabilities, HostProblem, HypervisorError, Probe, VmNotFound, VmSpec
from vmcontrol.hypervisors.qemu import accelerator as accelerators
from vmcontrol.hypervisors.qemu import problems
from vmcontrol.hypervisors.qemu.command import Accelerator
from vmcontrol.hypervisors.qemu.files import Definition, DiskLayout, VmFiles
from vmcontrol.hypervisors.qemu.vm import QemuVm
from vmcontrol.protocol import vmlimits
from vmcontrol.protocol.vm import LIVE_STATES

log = logging.getLogger(__name__)

IMAGE_TOOL_LIMIT_S = 120.0
"""qemu-img create takes 0.05 s, check of a large image some seconds."""
OLDEST = (6, 1)
"""Snapshot jobs came with QEMU 6.0, blockdev-reopen with 6.1. Run by us: 7.2."""
MAC_RANGE = b"\x52\x54\x00"
"""That of QEMU and libvirt."""


class QemuHypervisor(BaseDriver[QemuVm]):
    """See interface.Hypervisor."""

    name = "QEMU"
    capabilities = Capabilities(host_only_network=True, vm_is_descendant=True)

    def __init__(
        self,
        reactor: Any,
        folder: Path,
        *,
        qemu: str = "qemu-system-x86_64",
        qemu_img: str = "qemu-img",
        accelerator: Accelerator | None = None,
        cache: Path | None = None,
    ) -> None:
        """folder: holds one folder a VM (<slot>/vm). accelerator: use this one and try none (tests).

        cache: where the outcome of the trial is kept; None: the user's cache folder.
        """
        super().__init__(reactor, folder)
        self.qemu = qemu
        self._qemu_img = qemu_img
        self._accelerator = accelerator
        self._accelerator_detail = "" if accelerator is None else f"{accelerator.name}, as told"
        self._accelerator_lock = DeferredLock()
        self._probe: Probe | None = None
        self._probe_lock = DeferredLock()
        self._cache = cache
        self._early: Deferred[object] | None = None

    def explain(self, what: str, text: str) -> HypervisorError:
        return problems.explain(what, text)

    def warm_up(self) -> None:
        """Begin to try the accelerators now, beside whatever else starts; the first `start` then need not wait."""
        if self.missing():
            return  # `probe` and `start` say so; it is no error that another hypervisor is used
        self._early = start_logged(self.accelerator(), "trying QEMU's accelerators")

    # The computer ---------------------------------------------------------------------------------------------------

    def missing(self) -> str:
        for program in (self.qemu, self._qemu_img):
            if shutil.which(program) is None:
                return problems.qemu_missing(program).reason
        return ""

    async def probe(self) -> Probe:
        """Tried once a HostMain, however many ask: under emulation that boots a QEMU each time."""
        async with self._probe_lock:
            if self._probe is None or not self._probe.usable:
                self._probe = await self._tried()
            found = self._probe
        if found.usable and self._accelerator is not None:  # which may be another since then
            return replace(found, detail=self._accelerator_detail, hardware=self._accelerator.hardware)
        return found

    async def _tried(self) -> Probe:
        if missing := self.missing():
            return Probe(False, "", missing)
        try:
            said = await tool.run(self.reactor, [self.qemu, "--version"], limit_s=30.0)
            match = re.search(r"version ((\d+)\.(\d+)\S*)", said.stdout)
            version = match[1] if match else "unknown"
            if match and (int(match[2]), int(match[3])) < OLDEST:
                oldest = ".".join(map(str, OLDEST))
                return Probe(False, version, f"QEMU {version} is too old; {oldest} or newer is needed")
            accelerator = await self.accelerator()
            if not accelerator.hardware:
                limit = accelerators.EMULATION_LIMIT_S
                trial = await accelerators.attempt(self.reactor, self.qemu, accelerator, limit)
                if not trial.works:
                    return Probe(False, version, f"QEMU is installed, but emulation does not work: {trial.detail}")
        except (LimitReached, tool.ToolMissing, HypervisorError) as error:
            return Probe(False, "", f"QEMU does not work: {error}")
        return Probe(True, version, self._accelerator_detail, hardware=accelerator.hardware)

    async def accelerator(self, *, again: bool = False) -> Accelerator:
        """The accelerator to start VMs with; found out once. Many may ask at the same time."""
        async with self._accelerator_lock:
            if self._accelerator is None or again:
                cache = self._cache or cache_file("trial-qemu.json")
                try:
                    found = await accelerators.choose(self.reactor, self.qemu, cache, again=again)
                except tool.ToolMissing as error:
                    raise problems.qemu_missing(self.qemu) from error
                self._accelerator, self._accelerator_detail = found
                log.info("QEMU accelerator: %s", self._accelerator_detail)
            return self._accelerator

    async def image_tool(self, *arguments: str) -> tool.ToolResult:
        """Run qemu-img. Raises HostProblem when it is missing or hangs."""
        try:
            return await tool.run(self.reactor, [self._qemu_img, *arguments], limit_s=IMAGE_TOOL_LIMIT_S)
        except tool.ToolMissing as error:
            raise problems.qemu_missing(self._qemu_img) from error
        except LimitReached as error:
            raise HostProblem(
                f"{error}; the disk of this computer does not answer", key="disk-slow", delay_s=MINUTES_5
            ) from error

    async def max_cpus(self) -> int:
        return vmlimits.QEMU_CPUS

    # VMs ------------------------------------------------------------------------------------------------------------

    async def check(self, spec: VmSpec) -> None:
        specs.check(spec, self.folder, vmlimits.QEMU_CPUS, self.name)
        if spec.remote_desktop:
            log.warning("%s: QEMU has no remote desktop here; going on without", spec.name)

    async def make(self, spec: VmSpec) -> QemuVm:
        files = VmFiles(self.folder / spec.name)
        if files.load() is not None:  # one that cannot be read is no VM that a caller could go on with
            raise already_there(spec.name)
        image = inspect(spec.image)
        layouts = tuple(_layout(Path(disk)) for disk in spec.disks)
        try:
            if image.format == "qcow2":  # its tables say whether it was cut off; VDI's header did
                check = await self.image_tool("check", "-q", "-f", "qcow2", str(spec.image))
                if check.status not in (0, 3):  # 3: leaked clusters, harmless
                    raise bad_image(spec.image, "it is damaged: " + " ".join(check.text.split())[:300])
            files.remove()
            make_private(files.folder)
            ids = await in_thread(self.reactor, specs.DiskIds.of, spec)
            definition = Definition(
                **specs.definition_fields(spec, ids, MAC_RANGE),
                disk_layouts=layouts,
                image_format=image.format,
                cpus=spec.cpus,
                secret_file=None if spec.secret_file is None else specs.remembered(spec.secret_file, spec.folder),
                port_forwards=tuple(spec.port_forwards),
                host_only=spec.network_mode == "hostonly",
            )
            await self.make_overlay(files, definition)
            files.store(definition)
            fsync_folder(self.folder)
            return QemuVm(self, files, definition)
        except BaseException:
            files.remove()
            raise

    async def make_overlay(self, files: VmFiles, definition: Definition) -> None:
        """A new, empty overlay in the place of the old one, if there is one."""
        fresh = files.overlay.with_suffix(".new")
        # It names no other file: QEMU gets what lies below it as an argument at each start (command.py), so that
        # neither a moved folder nor what stands in the overlay leads anywhere else.
        size = inspect(files.path(definition.image)).size
        result = await self.image_tool("create", "-q", "-f", "qcow2", str(fresh), str(size))
        if result.status != 0:
            fresh.unlink(missing_ok=True)
            raise problems.explain(f"making the disk of {definition.name}", result.text)
        put_in_place(fresh, files.overlay, mode=0o600)  # snapshots in it will hold the guest's memory

    async def find(self, name: str) -> QemuVm | None:
        files = VmFiles(self.folder / name)
        definition = files.load() if VM_NAME.fullmatch(name) else None
        if definition is None:
            return None
        vm = QemuVm(self, files, definition)
        await vm.adopt()
        return vm

    async def delete_rest(self, name: str, why: HypervisorError) -> None:
        if not isinstance(why, VmNotFound):  # an unreadable definition must not keep the files for ever
            log.warning("%s; deleting the folder all the same", why)
            await defer_to_thread(self.reactor, VmFiles(self.folder / name).remove)

    async def list_vms(self) -> list[str]:
        return await self.in_folders(lambda folder: VmFiles(folder).exists())

    async def list_running(self) -> list[str]:
        return [name for name in await self.list_vms() if await self.state(name) in LIVE_STATES]

    async def close(self) -> None:
        if self._early is not None:
            self._early.cancel()
        live = await self.list_running()
        if live:
            log.warning("these VMs end with this process: %s", ", ".join(live))


def _layout(disk: Path) -> DiskLayout:
    """Raises HostProblem when it cannot be a further disk."""
    format = inspect(disk).format
    if format != "vdi":
        return DiskLayout(format)
    try:
        found = diskruns.runs(disk)
    except (BadImage, OSError) as error:
        raise bad_image(disk, str(error)) from error
    first = found[0] if found else None
    if first is None or first.offset is None or len(found) > 1:
        raise bad_image(disk, "its blocks do not lie one after the other; qemu-img convert -O raw puts them in order")
    return DiskLayout("raw", first.offset, first.length)
