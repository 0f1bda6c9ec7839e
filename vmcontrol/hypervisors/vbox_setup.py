"""A VM of ours before its start: whether its image is the one it was made from, and VirtualBox's settings in line.

Reads what is remembered of the VM and never changes it. The VM must be off: these are `modifyvm`'s words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from vmcontrol.hypervisors import vbox_faults, vbox_forwards
from vmcontrol.hypervisors.vbox_dialect import Dialect
from vmcontrol.hypervisors.vbox_files import Definition
from vmcontrol.hypervisors.vbox_output import Facts
from vmcontrol.hypervisors.vboxmanage import VBoxManage


class Host(Protocol):
    """What is needed of the driver."""

    vbox: VBoxManage

    async def dialect(self) -> Dialect: ...


def check_image(definition: Definition) -> None:
    """Raises Fault when the image is missing or was changed: the VM's disk would not fit any more."""
    image = Path(definition.image)
    try:
        status = image.stat()
    except OSError as error:
        raise vbox_faults.bad_image(image, error.strerror or str(error), missing=True) from error
    if (status.st_size, status.st_mtime_ns) != (definition.image_size, definition.image_time_ns):
        raise vbox_faults.bad_image(image, f"it was changed after {definition.name} was made from it")


async def align(host: Host, definition: Definition, facts: Facts) -> bool:
    """Bring VirtualBox into line with the definition: forwards and cables. Whether anything was to be changed."""
    drop, add = vbox_forwards.difference(facts.forwards, definition.forwards)
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
