"""The files of one QEMU VM, <slot>/vm/<name>/, and what follows from which of them are there. No QEMU is asked here.

| file | meaning |
| --- | --- |
| vm.json | the VM exists, and this is it; written last by create, replaced atomically |
| disk.qcow2 | overlay of the image, with the snapshots inside |
| running.json | pid and birth of its QEMU; still there without such a process: Aborted |
| saved.state.partial | a state being written; worthless |
| saved.state | RAM and devices of a saved VM, complete; fits the disk exactly as it is |
| saved.state.used | was resumed from: the disk has moved on, it must never be resumed from again |
| taken.json | it was there before the job that uses it now, in this state: its disk is never thrown away |

The order of operations makes every crash harmless; each method says its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from vmcontrol.common import birth, jsonfile
from vmcontrol.common.atomicfile import fsync_file, fsync_folder, put_in_place, write_atomically
from vmcontrol.common.birth import Birth
from vmcontrol.hypervisors.common.folder import VmDefinition, VmFolder
from vmcontrol.protocol.vm import PortForward, VmState

_STARTED = "started"
"""What running.json calls the time at which a process began."""


@dataclass(frozen=True, slots=True)
class DiskLayout:
    """How QEMU reads a further disk. format: qcow2 or raw; QEMU writes no machine's state beside its own VDI driver,
    so a VDI is raw from an offset on. offset, size: bytes of the file; size 0: all of it."""

    format: str
    offset: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition(VmDefinition):
    """What vm.json says."""

    image_format: str
    disk_layouts: tuple[DiskLayout, ...] = ()
    """Of `disks`, in their order."""
    cpus: int
    secret_file: str | None
    """Path, as that of the image."""
    port_forwards: tuple[PortForward, ...] = ()
    host_only: bool = False
    machine: str | None = None
    """QEMU's versioned machine type; None before the first start."""
    accelerator: str | None = None
    cpu: str | None = None
    """With these the VM ran last; a saved state or snapshot goes on with the same."""
    snapshot_hardware: Mapping[str, tuple[str, str]] | None = None
    """Tag of a snapshot with memory -> accelerator and cpu it was taken with."""
    current_snapshot: str | None = None
    """Tag in the overlay."""
    resume_snapshot: str | None = None
    """Tag of the snapshot that the next start loads: the VM is Saved."""
    unclean: bool = False
    """The disk is in the middle of something that nobody remembers."""


class VmFiles(VmFolder[Definition]):
    """The folder of one VM. It exists when it has a vm.json."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, Definition, "vm.json", "format")
        self.overlay = folder / "disk.qcow2"
        self.running = folder / "running.json"
        self.partial = folder / "saved.state.partial"
        self.saved = folder / "saved.state"
        self.used = folder / "saved.state.used"
        self.taken = folder / "taken.json"

    def exists(self) -> bool:
        return self.definition_file.is_file()

    def state(self, definition: Definition) -> VmState:
        """Of a VM without a process."""
        if definition.resume_snapshot is not None or self.saved.exists():
            return VmState.SAVED
        return VmState.ABORTED if self.running.exists() else VmState.POWERED_OFF

    # The process ----------------------------------------------------------------------------------------------------

    def write_running(self, pid: int, began: Birth) -> None:
        """`began`: so that a process that got the pid later is not taken for it."""
        value = {"pid": pid, **began.to_json(_STARTED)}
        write_atomically(self.running, json.dumps(value).encode(), mode=0o600)

    def stale_process(self) -> psutil.Process | None:
        """The QEMU that running.json names, if exactly that one still lives."""
        try:
            value = jsonfile.load(self.running)
            return birth.find(birth.pid_of(value["pid"]), Birth.from_json(value, _STARTED))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def ended_orderly(self) -> None:
        self._remove(self.running)

    # The saved state, used once -------------------------------------------------------------------------------------

    def complete_saved(self) -> None:
        """The partial state is whole: sync disk and state, then give it its name. Blocks for as long as syncing takes.

        A crash before the rename leaves a partial file, which is nothing; after it, a VM that is Saved.
        """
        fsync_file(self.overlay)
        put_in_place(self.partial, self.saved)

    def sync_overlay(self) -> None:
        """Make the overlay with the snapshots in it durable. Blocks."""
        fsync_file(self.overlay)

    def use_saved(self) -> None:
        """The state was loaded and the guest goes on after this: it is no state of the disk any more. Durable."""
        self.saved.replace(self.used)
        fsync_folder(self.folder)

    def discard_saved(self) -> None:
        self._remove(self.saved, self.partial, self.used)

    def remove_leftovers(self) -> None:
        """What a crash or a finished resume left: worth nothing."""
        self._remove(self.partial, self.used)
        for temporary in (*self.folder.glob(".vm.json.*"), *self.folder.glob(".running.json.*")):
            self._remove(temporary)

    def _remove(self, *paths: Path) -> None:
        for path in paths:
            path.unlink(missing_ok=True)
        if self.folder.is_dir():
            fsync_folder(self.folder)
