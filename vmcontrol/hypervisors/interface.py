"""The contract between HostMain and a hypervisor's driver. Read this file first: it is the architecture.

Call order: `missing` and `probe` once, then for each VM

    create -> start -> (pause, unpause, save_snapshot, set_network, ...)* -> save_state | power_off -> start | delete
    take   -> start -> ...                                                                          -> release

`take` and `release` are for VMs that were there before the job, in place of `create` and `delete`. `close` is the last.

Concurrency: calls for one VM wait for each other, but `state` and `info`, which never wait; `power_off` without grace
and `delete` may end a call that is under way. Calls for different VMs run at the same time. All methods run on the
reactor, have time limits of their own, and raise HypervisorErrors only. The state of a VM is asked of the hypervisor
and the file system, never remembered: a new HostMain finds what the last one left.

Idempotent: `power_off` of a VM that is off, `pause` of a paused, `unpause` of a running, `take` of a taken, `release`
of one that was not taken, `delete_snapshot` of an unknown snapshot and `delete` of an unknown VM do nothing. `create`
of a name that exists raises VmExists and changes nothing.

A call that fails loses nothing: saved states and snapshots that were there still are. After a crash `start` goes on
from what is durable.

What drivers differ in is said by `Capabilities`, and never by a driver's name or class.

    HypervisorError             str: what failed, for which VM, with the hypervisor's own words
    +-- VmExists
    +-- VmNotFound
    +-- SpecRefused             a VM like this can never be made with this hypervisor
    +-- WrongState              the VM is in a state in which this cannot be done
    +-- SnapshotNotFound        the VM has no snapshot of this name
    +-- StateUnusable           a saved state or snapshot cannot be loaded: discard it (power_off) or take an older one
    +-- HostProblem             a condition of this computer that the volunteer can mend, or that passes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vmcontrol.protocol.vm import VmInfo, VmSettings, VmState


class HypervisorError(Exception):
    """Something the hypervisor could not do."""


class VmExists(HypervisorError):  # noqa: N818
    """A VM of this name is there already."""


class SpecRefused(HypervisorError):  # noqa: N818
    """A VM like this can never be made here: a name, a size, a number that the hypervisor does not take."""


class VmNotFound(HypervisorError):  # noqa: N818
    """There is no VM of this name or id."""


class WrongState(HypervisorError):  # noqa: N818
    """The VM is in a state in which this cannot be done."""


class SnapshotNotFound(HypervisorError):  # noqa: N818
    """The VM has no snapshot of this name, or none at all."""


class StateUnusable(HypervisorError):  # noqa: N818
    """A saved state or snapshot cannot be loaded, now and later. The VM is still Saved; it did not run.

    What helps: `restore_snapshot` of another one, or `power_off`, which discards it.
    """


class HostProblem(HypervisorError):  # noqa: N818
    """A condition of this computer, recognized by a driver's table of problems.

    key: constant word, the same for the same problem. reason: for the volunteer, with what to do.
    delay_s: seconds until a new try makes sense; None if it never will by itself (permanent).
    """

    def __init__(self, reason: str, *, key: str, delay_s: int | None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.key = key
        self.delay_s = delay_s


NO_VIRTUALIZATION = "ERR_CPU_VM_EXTENSIONS_DISABLED"
"""BOINC's client looks for this word in stderr and asks for no more such work until it is restarted."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a driver can do."""

    cpu_cap: bool = False
    """`set_cpu_cap` works."""
    host_only_network: bool = False
    """`network_mode` may be hostonly, or what stands in for it."""
    vm_is_descendant: bool = False
    """The VM process is a child of HostMain (QEMU), so no other_pid is reported to the client."""


@dataclass(frozen=True)
class VmSpec(VmSettings):
    """A VM to create. The image is only ever read; the VM writes to a linked overlay or clone of it."""

    name: str
    image: Path
    folder: Path
    """Where everything of this VM goes; made by create, removed by delete. Inside the slot."""
    mac: str | None = None
    """Upper case with colons; None: the driver chooses one in its own range."""
    agent_port: int = 0
    """The guest's port that the agent listens on; a forward on 127.0.0.1 leads to it. 0: none."""
    secret_file: Path | None = None
    """File (0600) whose text the agent finds in SMBIOS."""
    console_log: Path | None = None
    """The guest's first serial port is appended to it."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether this computer can run VMs with this hypervisor."""

    usable: bool
    version: str
    detail: str
    """One sentence: the accelerator and how it was found, or why it does not work and what to do."""
    hardware: bool = True
    """Guests run at about the processor's speed. `auto` prefers such a hypervisor."""


StateListener = Callable[[str, VmState], None]
"""Called on the reactor with the VM's name and its new state, within 2 s of a change, whoever made it."""


class Hypervisor(Protocol):
    """A driver."""

    name: str
    """As in HostConfig.cfg: VirtualBox, QEMU."""
    capabilities: Capabilities

    def missing(self) -> str:
        """Why this hypervisor is not on this computer, at a glance; empty when its programs are there."""

    async def probe(self) -> Probe: ...
    async def max_cpus(self) -> int:
        """How many processors a VM can have."""

    async def create(self, spec: VmSpec) -> None: ...
    async def start(self, name: str) -> None:
        """From PoweredOff, Aborted or Saved to Running. Returns when the hypervisor says Running.

        A VM goes on when BOINC's data folder was moved, or was copied and the original is still there. Raises
        HostProblem `image-missing` or `image-damaged` when its image is not the one that it was made from.
        """

    async def pause(self, name: str) -> None: ...
    async def unpause(self, name: str) -> None: ...
    async def save_state(self, name: str) -> None:
        """From Running, Paused or Stuck (if resumable) to Saved; durable (fsynced) when it returns. After an error the
        VM is what it was, and older snapshots are there."""

    async def power_off(self, name: str, *, acpi_grace_s: float = 0.0) -> None:
        """To PoweredOff; a saved state is discarded. With a grace, the guest's power button is pressed first (ACPI)."""

    async def state(self, name: str) -> VmState: ...
    async def info(self, name: str) -> VmInfo: ...
    async def list_vms(self) -> list[str]: ...
    async def list_running(self) -> list[str]: ...
    async def save_snapshot(self, name: str, snapshot: str, description: str = "") -> None:
        """Memory and disk of a live VM, or the disk of one that is off. Durable on return; the VM goes on as it was."""

    async def restore_snapshot(self, name: str, snapshot: str | None = None) -> None:
        """Go back to a snapshot (None: the current one) of a VM that is not live; then it is Saved or PoweredOff."""

    async def delete_snapshot(self, name: str, snapshot: str) -> None: ...
    async def list_snapshots(self, name: str) -> list[str]: ...
    async def performance(self, name: str) -> dict[str, float]:
        """cpu_time_s (VM process tree since its start), memory_bytes (resident), disk_bytes (of the VM's files)."""

    async def set_network(self, name: str, connected: bool) -> None:
        """Plug in or pull the network that the spec granted. The way to the agent stays."""

    async def set_cpu_cap(self, name: str, percent: int) -> None: ...
    async def delete(self, name: str) -> None:
        """The VM, its snapshots and all its media that create made; powered off first. The image stays."""

    async def take(self, name: str) -> None:
        """Use a VM that was there before us: its state now is noted, and no other task of this computer can use it
        until `release`. HostProblem `vm-in-use`: another task has it."""

    async def release(self, name: str) -> None:
        """A VM that was taken is not needed any more: our snapshots go, and it is left Saved if it was Running or Saved
        when it was taken, else PoweredOff. Nothing for a VM that was not taken."""

    def on_state_change(self, listener: StateListener) -> None: ...
    async def close(self) -> None:
        """HostMain ends. VMs are not touched here (save or power them off before); nothing of ours stays running."""
