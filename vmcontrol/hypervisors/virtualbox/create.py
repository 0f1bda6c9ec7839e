"""How a VM of ours is made: whether a spec can be, what it means in VirtualBox's terms, and the calls that do it.

Owns nothing: order and undoing of what was half done are the driver's (virtualbox.py), option names dialect.py's.
"""

from __future__ import annotations

import re
import secrets
import uuid as uuids
from pathlib import Path

from vmcontrol.hypervisors.common import places
from vmcontrol.hypervisors.interface import SpecRefused, VmSpec
from vmcontrol.hypervisors.virtualbox import forwards, output, problems
from vmcontrol.hypervisors.virtualbox.dialect import Dialect, Hardware, agent_nic
from vmcontrol.hypervisors.virtualbox.files import VM_NAME, Definition, VmFiles
from vmcontrol.hypervisors.virtualbox.media import base_name, disk_name
from vmcontrol.hypervisors.virtualbox.vboxmanage import VBoxManage
from vmcontrol.protocol import vmlimits

CONTROLLER = "disk"
TOKEN_PLACE = "VBoxInternal/Devices/pcbios/0/Config/DmiSystemSKU"  # noqa: S105 (a key; the guest reads it in SMBIOS type 1)
TOKEN_BYTES = 16

_MAC = re.compile(r"[0-9A-F]{2}(:[0-9A-F]{2}){5}")
_OS_TYPE = re.compile(r"[A-Za-z0-9_.-]{1,50}")


def check(spec: VmSpec, folder: Path, most_cpus: int) -> None:
    """Raises SpecRefused for a spec that cannot be. folder: of the VMs (<slot>/vm). most_cpus: of this VirtualBox."""
    if not VM_NAME.fullmatch(spec.name):
        raise SpecRefused(f"{spec.name!r} cannot be a VM's name: letters, digits, '.', '_' and '-', at most 100")
    if spec.folder.absolute() != folder / spec.name:
        raise SpecRefused(f"the folder of {spec.name} has to be {folder / spec.name}, not {spec.folder}")
    if fault := vmlimits.fault_of(spec.memory_mb, spec.cpus, most_cpus, "VirtualBox"):
        raise SpecRefused(f"{spec.name}: {fault}")
    if spec.mac is not None and not _MAC.fullmatch(spec.mac):
        raise SpecRefused(f"{spec.name}: {spec.mac!r} is no MAC in upper case with colons")
    if not _OS_TYPE.fullmatch(spec.os_type):
        raise SpecRefused(f"{spec.name}: {spec.os_type!r} is no OS type")
    if spec.network_mode not in ("nat", "hostonly"):
        raise SpecRefused(f"{spec.name}: there is no network mode {spec.network_mode!r}")


def define(spec: VmSpec, image_id: str) -> Definition:
    """What is remembered of a new VM; UUID, token, MAC and ports are chosen here. image_id: of imageid."""
    slot = spec.folder.absolute().parent.parent.resolve()
    console_log = (spec.console_log or spec.folder / "console.log").absolute()
    host_only = spec.network_mode == "hostonly"
    return Definition(
        name=spec.name,
        uuid=str(uuids.uuid4()),
        image=places.remember(spec.image.resolve(), slot),
        image_id=image_id,
        mac=spec.mac or new_mac(),
        agent_port=spec.agent_port,
        forwards=forwards.of_spec(spec),
        network=spec.network,
        network_nic=(1 if host_only else 2) if spec.network else 0,
        agent_nic=agent_nic(host_only=host_only, network=spec.network),
        console_log=places.remember(places.resolved(console_log), slot),
        memory_mb=spec.memory_mb,
        token=secrets.token_hex(TOKEN_BYTES),
    )


async def make(
    vbox: VBoxManage, dialect: Dialect, spec: VmSpec, definition: Definition, files: VmFiles, *, adapter: str | None
) -> None:
    """The calls that make a VM: six, with all hardware in one of them. adapter: the host-only one."""
    do, what, uuid = vbox.do, f"creating {spec.name}", definition.uuid
    await do(what, *dialect.create(spec.name, uuid, spec.os_type, files.folder.parent))
    await do(what, *dialect.hardware(uuid, _hardware(spec, definition, files, adapter)))
    disk = str(files.folder / disk_name(uuid))
    add = ("storagectl", uuid, "--name", CONTROLLER, "--add", "sata", "--controller", "IntelAhci")
    await do(what, *add, "--portcount", "1", "--bootable", "on")
    base = str(files.folder / base_name(uuid))
    await do(what, "createmedium", "disk", "--filename", disk, "--diffparent", base, "--format", "VDI")
    attach = ("storageattach", uuid, "--storagectl", CONTROLLER, "--port", "0", "--device", "0", "--type", "hdd")
    await do(what, *attach, "--medium", disk)
    token = f"string:token={definition.token};interface={definition.mac}"
    await do(what, "setextradata", uuid, TOKEN_PLACE, token)


def _hardware(spec: VmSpec, definition: Definition, files: VmFiles, adapter: str | None) -> Hardware:
    return Hardware(
        memory_mb=spec.memory_mb,
        cpus=spec.cpus,
        linux=not spec.os_type.startswith("Windows"),
        description=f"Made by vmwrapper, a BOINC application, in {files.folder}; it goes when the task ends.",
        mac=definition.mac,
        second_mac=_neighbour(definition.mac, 3),
        third_mac=_neighbour(definition.mac, 4),
        rules=[forwards.rule(one) for one in definition.forwards],
        serial_log=files.serial,
        network=spec.network,
        host_only_adapter=adapter,
        remote_desktop_port=forwards.free_port() if spec.remote_desktop else 0,
    )


async def host_only_adapter(vbox: VBoxManage) -> str:
    """The first one that there is; made if there is none."""
    adapters = output.host_only_adapters(await vbox.do("host-only networks", "list", "hostonlyifs"))
    if not adapters:
        await vbox.do("making a host-only network", "hostonlyif", "create")
        adapters = output.host_only_adapters(await vbox.do("host-only networks", "list", "hostonlyifs"))
    if not adapters:
        raise problems.explain("making a host-only network", "no host-only adapter")
    return adapters[0]


def new_mac() -> str:
    """08:00:27 is VirtualBox's range. The fourth byte is even: its odd neighbour is the other NIC's."""
    tail = bytearray(secrets.token_bytes(3))
    tail[0] &= 0xFE
    return ":".join(f"{byte:02X}" for byte in (0x08, 0x00, 0x27, *tail))


def _neighbour(mac: str, byte: int) -> str:
    parts = mac.split(":")
    parts[byte] = f"{int(parts[byte], 16) ^ 1:02X}"
    return ":".join(parts)
