"""A VM of ours before its start: VirtualBox's settings brought into line with it.

Reads what is remembered of the VM and never changes it. The VM must be off: these are `modifyvm`'s words.
"""

from __future__ import annotations

from typing import Protocol

from vmcontrol.hypervisors.virtualbox import forwards
from vmcontrol.hypervisors.virtualbox.dialect import Dialect
from vmcontrol.hypervisors.virtualbox.files import Definition
from vmcontrol.hypervisors.virtualbox.output import Facts
from vmcontrol.hypervisors.virtualbox.vboxmanage import VBoxManage


class Host(Protocol):
    """What is needed of the driver."""

    vbox: VBoxManage

    async def dialect(self) -> Dialect: ...


async def align(host: Host, definition: Definition, facts: Facts) -> bool:
    """Bring VirtualBox into line with the definition: forwards and cables. Whether anything was to be changed."""
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
