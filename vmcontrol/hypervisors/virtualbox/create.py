"""How a VM of ours is made: what a spec means in VirtualBox's terms, and the calls that do it, or mend it later.

Owns nothing: order and undoing of what was half done are the driver's (driver.py), option names dialect.py's.
"""

from __future__ import annotations

import secrets
import uuid as uuids

from vmcontrol.hypervisors.common import spec as specs
from vmcontrol.hypervisors.interface import VmSpec
from vmcontrol.hypervisors.virtualbox import forwards, output, problems
from vmcontrol.hypervisors.virtualbox.dialect import Dialect, Hardware, agent_nic
from vmcontrol.hypervisors.virtualbox.files import Definition, VmFiles
from vmcontrol.hypervisors.virtualbox.media import base_name, disk_name, further_name
from vmcontrol.hypervisors.virtualbox.output import Facts
from vmcontrol.hypervisors.virtualbox.state import Host
from vmcontrol.hypervisors.virtualbox.vboxmanage import VBoxManage

CONTROLLER = "disk"
TOKEN_PLACE = "VBoxInternal/Devices/pcbios/0/Config/DmiSystemSKU"  # noqa: S105 (a key; the guest reads it in SMBIOS type 1)
TOKEN_BYTES = 16

MAC_RANGE = b"\x08\x00\x27"
"""VirtualBox's."""


def define(spec: VmSpec, ids: specs.DiskIds) -> Definition:
    """What is remembered of a new VM; UUID, token, MAC and ports are chosen here."""
    host_only = spec.network_mode == "hostonly"
    return Definition(
        **specs.definition_fields(spec, ids, MAC_RANGE),
        uuid=str(uuids.uuid4()),
        forwards=forwards.of_spec(spec),
        network_nic=(1 if host_only else 2) if spec.network else 0,
        agent_nic=agent_nic(host_only=host_only, network=spec.network),
        token=secrets.token_hex(TOKEN_BYTES),
    )


async def make(
    vbox: VBoxManage, dialect: Dialect, spec: VmSpec, definition: Definition, files: VmFiles, *, adapter: str | None
) -> None:
    """The calls that make a VM: six, with all hardware in one of them; one for each further disk.

    adapter: the host-only one.
    """
    do, what, uuid = vbox.do, f"creating {spec.name}", definition.uuid
    await do(what, *dialect.create(spec.name, uuid, spec.os_type, files.folder.parent))
    hardware = Hardware(
        settings=spec,
        mac=definition.mac,
        rules=[one.rule for one in definition.forwards],
        serial_log=files.serial,
        description=f"Made by vmwrapper, a BOINC application, in {files.folder}; it goes when the task ends.",
        host_only_adapter=adapter,
        remote_desktop_port=forwards.free_port() if spec.remote_desktop else 0,
    )
    await do(what, *dialect.hardware(uuid, hardware))
    disk = str(files.folder / disk_name(uuid))
    add = ("storagectl", uuid, "--name", CONTROLLER, "--add", "sata", "--controller", "IntelAhci")
    await do(what, *add, "--portcount", str(1 + len(definition.disks)), "--bootable", "on")
    base = str(files.folder / base_name(uuid))
    await do(what, "createmedium", "disk", "--filename", disk, "--diffparent", base, "--format", "VDI")
    attach = ("storageattach", uuid, "--storagectl", CONTROLLER, "--device", "0", "--type", "hdd", "--port")
    await do(what, *attach, "0", "--medium", disk)
    for number in range(len(definition.disks)):
        further = str(files.folder / further_name(uuid, number))
        await do(what, *attach, str(1 + number), "--medium", further, "--mtype", "writethrough")
    token = f"string:token={definition.token};interface={definition.mac}"
    await do(what, "setextradata", uuid, TOKEN_PLACE, token)


async def host_only_adapter(vbox: VBoxManage) -> str:
    """The first one that there is; made if there is none."""
    adapters = output.host_only_adapters(await vbox.do("host-only networks", "list", "hostonlyifs"))
    if not adapters:
        await vbox.do("making a host-only network", "hostonlyif", "create")
        adapters = output.host_only_adapters(await vbox.do("host-only networks", "list", "hostonlyifs"))
    if not adapters:
        raise problems.explain("making a host-only network", "no host-only adapter")
    return adapters[0]


async def align(host: Host, definition: Definition, facts: Facts) -> bool:
    """Bring VirtualBox's settings of a VM that is off into line with the definition: forwards and cables.

    Whether anything was to be changed.
    """
    drop, add = forwards.difference(facts.forwards, definition.forwards)
    cables = []
    nic = definition.network_nic
    if nic and facts.cables.get(nic) is not definition.network_connected:
        cables.append((nic, definition.network_connected))
    if not (drop or add or cables):
        return False
    dialect = await host.dialect()
    words = dialect.change(definition.uuid, nic=definition.agent_nic, forwards=add, drop=drop, cables=cables)
    await host.vbox.do(f"setting up {definition.name}", *words)
    return True
