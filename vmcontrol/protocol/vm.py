"""A virtual machine as job file, wrapper, HostMain and drivers see it: settings, state, what is known of it. Pure.

`to_struct` and `from_struct` are the forms in which XML-RPC carries them (docs/reference/xml-rpc.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any


class VmState(StrEnum):
    """VirtualBox's names, which are those of the original's getState."""

    POWERED_OFF = "PoweredOff"
    SAVED = "Saved"
    ABORTED = "Aborted"
    STARTING = "Starting"
    RUNNING = "Running"
    PAUSED = "Paused"
    SAVING = "Saving"
    RESTORING = "Restoring"
    STOPPING = "Stopping"
    STUCK = "Stuck"


LIVE_STATES = frozenset(VmState) - {VmState.POWERED_OFF, VmState.SAVED, VmState.ABORTED}
"""States in which a hypervisor process exists. Stuck: the guest cannot go on; `VmInfo.trouble` says why."""


@dataclass(frozen=True, slots=True)
class PortForward:
    """A TCP port of the host that leads into the guest. host_port 0: a free one. remote: not on loopback only."""

    guest_port: int
    host_port: int = 0
    remote: bool = False


@dataclass(frozen=True, kw_only=True)
class VmSettings:
    """What a VM is given, from the job file to the driver. Limits: vmcontrol.protocol.vmlimits."""

    memory_mb: int = 512
    """MiB."""
    cpus: int = 1
    os_type: str = "Linux26_64"
    """VirtualBox OS type; other hypervisors take from it what they can."""
    network: bool = False
    """The guest may reach the network. False: it reaches nothing at all, the host included."""
    network_mode: str = "nat"
    """One of NETWORK_MODES."""
    port_forwards: Sequence[PortForward] = ()
    remote_desktop: bool = False
    disks: Sequence[str] = field(default=(), repr=False)
    """Paths of further disks on the host, as that of the image: attached after the system's disk in this order,
    read-only, never written or deleted. Many VMs may have the same one. At most vmlimits.MOST_DISKS."""

    def to_struct(self) -> dict[str, object]:
        """defineVM's settings."""
        forwards = [_forward_struct(forward) for forward in self.port_forwards]
        return {**vars(self), "port_forwards": forwards, "disks": list(self.disks)}


NETWORK_MODES = ("nat", "hostonly")
"""hostonly: NIC 1 NAT, NIC 2 host-only, id = MAC of NIC 2, as in the original."""


def _forward_struct(forward: PortForward) -> dict[str, object]:
    return {"guest_port": forward.guest_port, "host_port": forward.host_port, "remote": forward.remote}


@dataclass(frozen=True, slots=True)
class VmInfo:
    """What is known of a VM now."""

    name: str
    state: VmState
    mac: str
    """The guest's id: MAC, upper case with colons."""
    image: Path | None = None
    """HostMain's own, like all fields that are not in `to_struct`."""
    current_snapshot: str | None = None
    snapshots: tuple[str, ...] = ()
    """Names of all snapshots. Not filled in by drivers (Hypervisor.list_snapshots)."""
    pid: int | None = None
    """Of the process that runs the guest; None when there is none."""
    agent_address: tuple[str, int] | None = None
    """Where on this host the agent answers; None when the VM is not live. Changes with each start."""
    forwards: Mapping[int, int] = field(default_factory=dict)
    """guest port -> host port, of VmSettings.port_forwards."""
    remote_desktop_address: str | None = None
    vm_is_descendant: bool = False
    """The VM's process descends from HostMain's. Not filled in by drivers (Capabilities.vm_is_descendant)."""
    trouble: str = ""
    """Why the VM is Aborted or Stuck, in the hypervisor's words, as far as known; else empty."""
    unusable: str = ""
    """Why disk, saved state and snapshots of a VM that is not live are worth nothing (its image was replaced, say):
    `delete` and `create` help, and `start` raises a HostProblem. Else empty."""
    resumable: bool = False
    """Stuck, and nothing of the guest is lost: it stands still for want of something on this computer (space on its
    disk). `unpause` tries to go on, `save_state` works, `pause` has nothing to do."""
    made_here: bool = True
    """`create` made it, in this slot; False: it was there before us."""
    link_token: str = ""
    """What the agent found in SMBIOS in place of the secret (VirtualBox); replaced on the first connection."""

    def to_struct(self) -> dict[str, object]:
        """getVMInfo's answer."""
        return {
            "name": self.name,
            "state": self.state.value,
            "id": self.mac.upper(),
            "pid": self.pid or 0,
            "forwards": {str(guest): host for guest, host in self.forwards.items()},
            "snapshots": self.snapshots,
            "current_snapshot": self.current_snapshot or "",
            "remote_desktop_address": self.remote_desktop_address or "",
            "vm_is_descendant": self.vm_is_descendant,
            "unusable": self.unusable,
            "trouble": self.trouble,
            "resumable": self.resumable,
        }

    @classmethod
    def from_struct(cls, value: Mapping[str, Any]) -> VmInfo:
        """Read getVMInfo's answer. Raises KeyError, ValueError."""
        return cls(
            name=value["name"],
            state=VmState(value["state"]),
            mac=value["id"],
            pid=value["pid"] or None,
            forwards={int(guest): host for guest, host in value["forwards"].items()},
            snapshots=tuple(value["snapshots"]),
            current_snapshot=value["current_snapshot"] or None,
            remote_desktop_address=value["remote_desktop_address"] or None,
            **{name: value[name] for name in ("vm_is_descendant", "unusable", "trouble", "resumable")},
        )
