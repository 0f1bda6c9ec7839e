"""What a VM is to be: whether a driver can make it, and what is remembered of it.

Pure, but for random MACs and for `DiskIds.of`, which reads the disks.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmcontrol.hypervisors.common import imageid, places
from vmcontrol.hypervisors.common.folder import VM_NAME, FurtherDisk
from vmcontrol.hypervisors.interface import SpecRefused, VmSpec
from vmcontrol.protocol import vmlimits

_MAC = re.compile(r"[0-9A-F]{2}(:[0-9A-F]{2}){5}")


def check(spec: VmSpec, folder: Path, most_cpus: int, hypervisor: str) -> None:
    """Raises SpecRefused for a spec that cannot be. folder: of the VMs (<slot>/vm). most_cpus: of this hypervisor."""
    if not VM_NAME.fullmatch(spec.name):
        raise SpecRefused(f"{spec.name!r} cannot be a VM's name: letters, digits, '.', '_' and '-', at most 100")
    if spec.folder.absolute() != folder / spec.name:
        raise SpecRefused(f"the folder of {spec.name} has to be {folder / spec.name}, not {spec.folder}")
    if wrong := vmlimits.fault_of(spec.memory_mb, spec.cpus, most_cpus, hypervisor):
        raise SpecRefused(f"{spec.name}: {wrong}")
    if spec.mac is not None and not _MAC.fullmatch(spec.mac):
        raise SpecRefused(f"{spec.name}: {spec.mac!r} is no MAC in upper case with colons")
    if len(spec.disks) > vmlimits.MOST_DISKS:
        raise SpecRefused(f"{spec.name}: {len(spec.disks)} further disks are more than {vmlimits.MOST_DISKS}")
    if spec.network_mode not in ("nat", "hostonly"):
        raise SpecRefused(f"{spec.name}: there is no network mode {spec.network_mode!r}")


def remembered(path: Path, folder: Path) -> str:
    """How a path is remembered of a VM with this folder. The file may not be there yet."""
    return places.remember(places.resolved(path.absolute()), folder.absolute().parent.parent.resolve())


@dataclass(frozen=True, slots=True)
class DiskIds:
    """What imageid says of a new VM's image, and of its further disks."""

    image: str
    disks: tuple[str, ...]

    @classmethod
    def of(cls, spec: VmSpec) -> DiskIds:
        """Reads them. Raises OSError."""
        return cls(imageid.identify(spec.image), tuple(imageid.identify(Path(disk)) for disk in spec.disks))


def definition_fields(spec: VmSpec, ids: DiskIds, mac_range: bytes) -> dict[str, Any]:
    """The fields of VmDefinition for a new VM. mac_range: of a MAC that is chosen here."""
    disks = zip(spec.disks, ids.disks, strict=True)
    return {
        "name": spec.name,
        "image": remembered(spec.image.resolve(), spec.folder),
        "image_id": ids.image,
        "disks": tuple(FurtherDisk(remembered(Path(disk).resolve(), spec.folder), id) for disk, id in disks),
        "mac": spec.mac or new_mac(mac_range),
        "agent_port": spec.agent_port,
        "console_log": remembered(spec.console_log or spec.folder / "console.log", spec.folder),
        "memory_mb": spec.memory_mb,
        "network": spec.network,
    }


def new_mac(range_: bytes) -> str:
    """A random MAC that begins with these three bytes. The fourth is even: its odd neighbour is the other NIC's."""
    fourth, *rest = secrets.token_bytes(3)
    return ":".join(f"{byte:02X}" for byte in (*range_, fourth & 0xFE, *rest))


def neighbour(mac: str, byte: int) -> str:
    """MAC of another NIC of the same VM: the last bit of this byte differs."""
    parts = mac.split(":")
    parts[byte] = f"{int(parts[byte], 16) ^ 1:02X}"
    return ":".join(parts)
