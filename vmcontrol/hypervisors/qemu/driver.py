"""The QEMU driver: which VMs there are, and whether QEMU works here. What is done to one VM: vm.py.

Owns the folder that holds the VMs' folders. VMs are children of this process and die with it.
More: docs/internals/drivers/qemu.md.
"""

from __future__ import annotations

import logging
import re
import secrets
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, DeferredLock

from vmcontrol.common.atomicfile import fsync_folder
from vmcontrol.common.eventloop import LimitReached, start_logged
from vmcontrol.common.logthrottle import LogThrottle
from vmcontrol.common.threads import defer_to_thread, in_thread
from vmcontrol.hypervisors.common import diskimage, imageid, places, tool
from vmcontrol.hypervisors.common.cache import cache_file
from vmcontrol.hypervisors.common.own_files import told_by
from vmcontrol.hypervisors.interface import (
    Capabilities,
    HostProblem,
    HypervisorError,
    Probe,
    SpecRefused,
    StateListener,
    VmExists,
    VmNotFound,
    VmSpec,
    WrongState,
)
from vmcontrol.hypervisors.qemu import accelerator as qemu_accel
from vmcontrol.hypervisors.qemu import existing, problems
from vmcontrol.hypervisors.qemu.command import Accelerator
from vmcontrol.hypervisors.qemu.files import Definition, VmFiles, fsync_file, make_private, sweep
from vmcontrol.hypervisors.qemu.vm import QemuVm
from vmcontrol.protocol import vmlimits
from vmcontrol.protocol.vm import LIVE_STATES, VmInfo, VmState

log = logging.getLogger(__name__)
_operation = told_by(problems.explain)

IMAGE_TOOL_LIMIT_S = 120.0
"""qemu-img create takes 0.05 s, check of a large image some seconds."""
OLDEST = (6, 1)
"""Snapshot jobs came with QEMU 6.0, blockdev-reopen with 6.1. Run by us: 7.2."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_MAC = re.compile(r"[0-9A-F]{2}(:[0-9A-F]{2}){5}")


class QemuHypervisor:
    """See interface.Hypervisor."""

    name = "QEMU"
    capabilities = Capabilities(host_only_network=True, vm_is_descendant=True, existing_vms=True)

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
        self.reactor = reactor
        self.qemu = qemu
        self._qemu_img = qemu_img
        self._folder = folder.absolute()
        self._accelerator = accelerator
        self._accelerator_detail = "" if accelerator is None else f"{accelerator.name}, as told"
        self._accelerator_lock = DeferredLock()
        self._probe: Probe | None = None
        self._probe_lock = DeferredLock()
        self._cache = cache
        self._vms: dict[str, QemuVm] = {}
        self._registry_lock = DeferredLock()
        self._early: Deferred[object] | None = None
        self._listeners: list[StateListener] = []
        self._pauses: dict[str, LogThrottle] = {}

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
                limit = qemu_accel.EMULATION_LIMIT_S
                trial = await qemu_accel.attempt(self.reactor, self.qemu, accelerator, limit)
                if not trial.works:
                    return Probe(False, version, f"QEMU is installed, but emulation does not work: {trial.detail}")
        except (LimitReached, tool.ToolMissing, HypervisorError) as error:
            return Probe(False, "", f"QEMU does not work: {error}")
        return Probe(True, version, self._accelerator_detail, hardware=accelerator.hardware)

    async def accelerator(self, *, again: bool = False) -> Accelerator:
        """The accelerator to start VMs with; found out once. Many may ask at the same time."""
        async with self._accelerator_lock:
            if self._accelerator is None or again:
                cache = self._cache or cache_file("accelerator.json")
                try:
                    found = await qemu_accel.choose(self.reactor, self.qemu, cache, again=again)
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
                f"{error}; the disk of this computer does not answer", key="disk-slow", delay_s=problems.MINUTES_5
            ) from error

    # VMs ------------------------------------------------------------------------------------------------------------

    async def max_cpus(self) -> int:
        return vmlimits.QEMU_CPUS

    async def create(self, spec: VmSpec) -> None:
        self._check(spec)
        async with self._registry_lock:
            files = VmFiles(self._folder / spec.name)
            if spec.name in self._vms or files.exists():
                if spec.name not in self._vms:
                    files.load()  # one that cannot be read is no VM that a caller could go on with
                raise VmExists(f"a virtual machine {spec.name} is there already")
            try:
                image = await self._inspect(spec.image)
                files.remove()  # what a create that was cut off left
                make_private(files.folder)
                image_id = await in_thread(self.reactor, imageid.identify, spec.image)
                definition = _definition(spec, image, files, image_id)
                await self.make_overlay(files, definition)
                files.store(definition)
                fsync_folder(self._folder)
                self._vms[spec.name] = QemuVm(self, files)
            except BaseException as error:
                if files.folder.is_dir():
                    files.remove()
                if isinstance(error, OSError):
                    raise problems.explain(f"creating {spec.name}", f"{error.filename}: {error.strerror}") from error
                raise

    def _check(self, spec: VmSpec) -> None:
        """Raises SpecRefused for a spec that cannot be."""
        if not _NAME.fullmatch(spec.name):
            raise SpecRefused(f"{spec.name!r} cannot be a VM's name: letters, digits, '.', '_' and '-', at most 100")
        if spec.folder.absolute() != self._folder / spec.name:
            raise SpecRefused(f"the folder of {spec.name} has to be {self._folder / spec.name}, not {spec.folder}")
        if fault := vmlimits.fault_of(spec.memory_mb, spec.cpus, vmlimits.QEMU_CPUS, self.name):
            raise SpecRefused(f"{spec.name}: {fault}")
        if spec.mac is not None and not _MAC.fullmatch(spec.mac):
            raise SpecRefused(f"{spec.name}: {spec.mac!r} is no MAC in upper case with colons")
        if spec.network_mode not in ("nat", "hostonly"):
            raise SpecRefused(f"{spec.name}: there is no network mode {spec.network_mode!r}")
        if spec.remote_desktop:
            log.warning("%s: QEMU has no remote desktop here; going on without", spec.name)

    async def _inspect(self, path: Path) -> diskimage.DiskImage:
        """Raises HostProblem when the image cannot be used."""
        image = _looked_at(path)
        if image.format == "qcow2":  # its tables say whether it was cut off; VDI's header did
            check = await self.image_tool("check", "-q", "-f", "qcow2", str(path))
            if check.status not in (0, 3):  # 3: leaked clusters, harmless
                raise problems.bad_image(path, "it is damaged: " + " ".join(check.text.split())[:300])
        return image

    async def make_overlay(self, files: VmFiles, definition: Definition) -> None:
        """A new, empty overlay in the place of the old one, if there is one."""
        fresh = files.overlay.with_suffix(".new")
        # It names no other file: what lies below it is told to QEMU at each start (command.py), so that neither a
        # moved folder nor what stands in the overlay leads anywhere else.
        size = _looked_at(places.recall(definition.image, files.slot)).size
        result = await self.image_tool("create", "-q", "-f", "qcow2", str(fresh), str(size))
        if result.status != 0:
            fresh.unlink(missing_ok=True)
            raise problems.explain(f"making the disk of {definition.name}", result.text)
        fresh.chmod(0o600)  # snapshots in it will hold the guest's memory
        fsync_file(fresh)
        fresh.replace(files.overlay)
        fsync_folder(files.folder)

    @_operation("finding")
    async def _vm(self, name: str) -> QemuVm:
        """Raises VmNotFound, or HypervisorError when its definition cannot be read."""
        async with self._registry_lock:
            vm = self._vms.get(name)
            if vm is None:
                files = VmFiles(self._folder / name)
                if not _NAME.fullmatch(name) or not files.exists():
                    raise VmNotFound(f"No VM by the name/id {name} found")
                vm = QemuVm(self, files)
                await vm.adopt()
                self._vms[name] = vm
            return vm

    @_operation("deleting")
    async def delete(self, name: str) -> None:
        try:
            vm = await self._vm(name)
        except VmNotFound:
            return
        except HypervisorError as error:  # an unreadable definition must not keep the files for ever
            log.warning("%s; deleting the folder all the same", error)
            await defer_to_thread(self.reactor, VmFiles(self._folder / name).remove)
            return
        try:
            await vm.delete()
        finally:
            if not vm.files.exists():
                self._vms.pop(name, None)  # what is left of it is for `sweep`

    async def list_vms(self) -> list[str]:
        sweep(self._folder)
        names = []
        for folder in sorted(self._folder.iterdir()) if self._folder.is_dir() else []:
            if _NAME.fullmatch(folder.name) and VmFiles(folder).exists():
                try:
                    await self._vm(folder.name)
                    names.append(folder.name)
                except HypervisorError as error:
                    log.warning("%s is left out: %s", folder.name, error)
        return names

    async def list_running(self) -> list[str]:
        return [name for name in await self.list_vms() if await self.state(name) in LIVE_STATES]

    @_operation("starting")
    async def start(self, name: str) -> None:
        await (await self._vm(name)).start()

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
        return await (await self._vm(name)).state()

    @_operation("looking at")
    async def info(self, name: str) -> VmInfo:
        return await (await self._vm(name)).info()

    @_operation("a snapshot of")
    async def save_snapshot(self, name: str, snapshot: str, description: str = "") -> None:
        if description:
            log.info("%s: snapshot %s: %s", name, snapshot, description)  # qcow2 has no place for it
        await (await self._vm(name)).save_snapshot(snapshot)

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
        return (await self._vm(name)).performance()

    @_operation("the network of")
    async def set_network(self, name: str, connected: bool) -> None:
        await (await self._vm(name)).set_network(connected)

    async def set_cpu_cap(self, name: str, percent: int) -> None:
        await self._vm(name)
        raise WrongState(f"QEMU cannot limit {name} to {percent} % of a processor (capability cpu_cap)")

    @_operation("taking")
    async def take(self, name: str) -> None:
        await existing.take(await self._vm(name))

    @_operation("releasing")
    async def release(self, name: str) -> None:
        await existing.release(await self._vm(name))

    def on_state_change(self, listener: StateListener) -> None:
        self._listeners.append(listener)

    def state_changed(self, name: str, state: VmState) -> None:
        """Called by a VM. A listener's error is its own."""
        if state in (VmState.PAUSED, VmState.RUNNING):
            if name not in self._pauses:
                again = "paused and resumed again and again: the next times are not noted"
                self._pauses[name] = LogThrottle(log, self.reactor.seconds, again)
            self._pauses[name].write(logging.INFO, "%s: %s", name, state)
        else:
            log.info("%s: %s", name, state)
        for listener in self._listeners:
            try:
                listener(name, state)
            except Exception:
                log.exception("a listener for the states of VMs failed")

    async def close(self) -> None:
        if self._early is not None:
            self._early.cancel()
        live = await self.list_running()
        if live:
            log.warning("these VMs end with this process: %s", ", ".join(live))


def _looked_at(image: Path) -> diskimage.DiskImage:
    """What its header says. Raises HostProblem when it cannot be used."""
    try:
        return diskimage.inspect(image)
    except FileNotFoundError as error:
        raise problems.bad_image(image, "it is not there", missing=True) from error
    except diskimage.BadImage as error:
        raise problems.bad_image(image, str(error)) from error
    except OSError as error:
        raise problems.bad_image(image, error.strerror or str(error)) from error


def _definition(spec: VmSpec, image: diskimage.DiskImage, files: VmFiles, image_id: str) -> Definition:
    slot = files.slot.resolve()

    def remembered(path: Path) -> str:
        return places.remember(places.resolved(path.absolute()), slot)

    return Definition(
        name=spec.name,
        image=places.remember(spec.image.resolve(), slot),
        image_id=image_id,
        image_format=image.format,
        memory_mb=spec.memory_mb,
        cpus=spec.cpus,
        mac=spec.mac or new_mac(),
        agent_port=spec.agent_port,
        secret_file=None if spec.secret_file is None else remembered(spec.secret_file),
        console_log=remembered(spec.console_log or files.folder / "console.log"),
        network=spec.network,
        port_forwards=tuple(spec.port_forwards),
        host_only=spec.network_mode == "hostonly",
    )


def new_mac() -> str:
    """52:54:00 is the range that QEMU and libvirt use. The fourth byte is even: its odd neighbour is NIC 2's."""
    tail = bytearray(secrets.token_bytes(3))
    tail[0] &= 0xFE
    return ":".join(f"{byte:02X}" for byte in (0x52, 0x54, 0x00, *tail))
