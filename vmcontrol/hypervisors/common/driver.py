"""What both drivers have: which VMs there are, and each operation on one by its name.

An OSError of the driver's own files leaves it as what the hypervisor itself complains of: a full disk meets QEMU or
VirtualBox as often as it meets what is remembered of a VM, and the caller is to see one problem.
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from twisted.internet.defer import DeferredLock

from vmcontrol.common.logthrottle import LogThrottle
from vmcontrol.hypervisors.common import diskimage
from vmcontrol.hypervisors.common.diskimage import BadImage, DiskImage
from vmcontrol.hypervisors.common.folder import VM_NAME, sweep
from vmcontrol.hypervisors.common.problems import bad_image
from vmcontrol.hypervisors.common.vm import BaseVm
from vmcontrol.hypervisors.interface import HypervisorError, StateListener, VmExists, VmNotFound, VmSpec
from vmcontrol.protocol.vm import VmInfo, VmState

log = logging.getLogger(__name__)
V = TypeVar("V", bound=BaseVm[Any])
R = TypeVar("R")


class BaseDriver(ABC, Generic[V]):
    """See interface.Hypervisor. V: the driver's VMs."""

    def __init__(self, reactor: Any, folder: Path) -> None:
        """folder: holds one folder a VM (<slot>/vm)."""
        self.reactor = reactor
        self.folder = folder.absolute()
        self.vms: dict[str, V] = {}
        """Those that have been used, by name."""
        self._registry_lock = DeferredLock()
        self._listeners: list[StateListener] = []
        self._pauses: dict[str, LogThrottle] = {}

    # What a driver adds ---------------------------------------------------------------------------------------------

    @abstractmethod
    def explain(self, what: str, text: str) -> HypervisorError:
        """The error for what the hypervisor or the system said when `what` was tried."""

    @abstractmethod
    async def check(self, spec: VmSpec) -> None:
        """Raises SpecRefused for a spec that cannot be."""

    @abstractmethod
    async def make(self, spec: VmSpec) -> V:
        """Make a VM in its folder, removing what a `make` that was cut off left there. After an error nothing is left.

        Raises HypervisorErrors, VmExists among them; BadImage; OSError.
        """

    @abstractmethod
    async def find(self, name: str) -> V | None:
        """A VM that was not used yet by this driver. Raises HypervisorError when what is known of it is unreadable."""

    @abstractmethod
    async def delete_rest(self, name: str, why: HypervisorError) -> None:
        """Remove what is left of a VM that cannot be used as one: VmNotFound, or its definition is unreadable."""

    @abstractmethod
    async def list_vms(self) -> list[str]: ...

    @abstractmethod
    async def list_running(self) -> list[str]: ...

    # Create, delete -------------------------------------------------------------------------------------------------

    async def create(self, spec: VmSpec) -> None:
        await self.check(spec)
        async with self._registry_lock:
            if spec.name in self.vms:
                raise already_there(spec.name)
            try:
                with self._explained(f"creating {spec.name}"):
                    self.vms[spec.name] = await self.make(spec)
            except BadImage as error:
                raise bad_image(spec.image, str(error)) from error

    async def delete(self, name: str) -> None:
        with self._explained(f"deleting {name}"):
            try:
                vm = await self._vm(name)
            except HypervisorError as error:
                await self.delete_rest(name, error)
                return
            try:
                await vm.delete()
            finally:
                if vm.is_gone():
                    self.vms.pop(name, None)  # what is left of it is for `sweep`

    # Which VMs there are --------------------------------------------------------------------------------------------

    async def _vm(self, name: str) -> V:
        """Raises VmNotFound, or HypervisorError when what is known of it cannot be read."""
        if name in self.vms:
            return self.vms[name]  # not waiting for the VM that is just being made
        async with self._registry_lock:
            vm = self.vms.get(name)
            if vm is None:
                with self._explained(f"finding {name}"):
                    vm = await self.find(name)
                if vm is None:
                    raise VmNotFound(f"No VM by the name/id {name} found")
                self.vms[name] = vm
            return vm

    async def in_folders(self, is_vm: Callable[[Path], bool]) -> list[str]:
        """Names of the VMs in our folders. One that cannot be used hides no other."""
        sweep(self.folder)
        names = []
        for folder in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            try:
                if VM_NAME.fullmatch(folder.name) and folder.is_dir() and is_vm(folder):
                    await self._vm(folder.name)
                    names.append(folder.name)
            except HypervisorError as error:
                log.warning("%s is left out: %s", folder.name, error)
        return names

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise self.explain(what, f"{where}{error.strerror or error}") from error

    # What is done to one --------------------------------------------------------------------------------------------

    async def _do(self, what: str, name: str, operation: Callable[[V], Awaitable[R]]) -> R:
        vm = await self._vm(name)
        with self._explained(f"{what} {name}"):
            try:
                return await operation(vm)
            except VmNotFound:
                vm.close()
                self.vms.pop(name, None)  # somebody else deleted it
                raise

    async def start(self, name: str) -> None:
        await self._do("starting", name, lambda vm: vm.start())

    async def pause(self, name: str) -> None:
        await self._do("pausing", name, lambda vm: vm.pause())

    async def unpause(self, name: str) -> None:
        await self._do("resuming", name, lambda vm: vm.unpause())

    async def save_state(self, name: str) -> None:
        await self._do("saving", name, lambda vm: vm.save_state())

    async def power_off(self, name: str, *, acpi_grace_s: float = 0.0) -> None:
        await self._do("switching off", name, lambda vm: vm.power_off(acpi_grace_s))

    async def state(self, name: str) -> VmState:
        return await self._do("the state of", name, lambda vm: vm.state())

    async def info(self, name: str) -> VmInfo:
        return await self._do("looking at", name, lambda vm: vm.info())

    async def save_snapshot(self, name: str, snapshot: str, description: str = "") -> None:
        await self._do("a snapshot of", name, lambda vm: vm.save_snapshot(snapshot, description))

    async def restore_snapshot(self, name: str, snapshot: str | None = None) -> None:
        await self._do("going back to a snapshot of", name, lambda vm: vm.restore_snapshot(snapshot))

    async def delete_snapshot(self, name: str, snapshot: str) -> None:
        await self._do("deleting a snapshot of", name, lambda vm: vm.delete_snapshot(snapshot))

    async def list_snapshots(self, name: str) -> list[str]:
        return await self._do("the snapshots of", name, lambda vm: vm.list_snapshots())

    async def performance(self, name: str) -> dict[str, float]:
        return await self._do("the load of", name, lambda vm: vm.performance())

    async def set_network(self, name: str, connected: bool) -> None:
        await self._do("the network of", name, lambda vm: vm.set_network(connected))

    async def set_cpu_cap(self, name: str, percent: int) -> None:
        await self._do("the processor share of", name, lambda vm: vm.set_cpu_cap(percent))

    async def take(self, name: str) -> None:
        await self._do("taking", name, lambda vm: vm.take())

    async def release(self, name: str) -> None:
        await self._do("releasing", name, lambda vm: vm.release())

    # Listeners ------------------------------------------------------------------------------------------------------

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


def already_there(name: str) -> VmExists:
    return VmExists(f"a virtual machine {name} is there already")


def inspect(image: Path) -> DiskImage:
    """What an image's header says. Raises HostProblem when it cannot be used."""
    try:
        return diskimage.inspect(image)
    except FileNotFoundError as error:
        raise bad_image(image, "it is not there", missing=True) from error
    except (BadImage, OSError) as error:
        said = error.strerror or error if isinstance(error, OSError) else error
        raise bad_image(image, str(said)) from error
