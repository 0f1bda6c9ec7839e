"""VMs of the QEMU driver that were there before the job: used, and left as they were found.

What is there before is a VM in the driver's folder that somebody made by hand: for the page's "CernVM" without
VirtualBox. Only this slot can see it, so there is nothing to lock. The note of it: taken.json (files.py).
"""

from __future__ import annotations

import logging

from vmcontrol.hypervisors.qemu.vm import QemuVm
from vmcontrol.protocol.vm import LIVE_STATES, VmState

log = logging.getLogger(__name__)

SNAPSHOT_PREFIX = "vmwrapper_"
SHUT_DOWN_S = 30.0
"""For a guest whose disk is somebody's own to end in order; then the plug is pulled."""


async def take(vm: QemuVm) -> None:
    """Note the state in which it is found, once."""
    if vm.files.found() is None:
        state = await vm.state()
        vm.files.write_taken(state)
        log.info("%s was there before and is %s: it will be left so", vm.name, state)


async def release(vm: QemuVm) -> None:
    """Our snapshots go; Saved or off, as it was; nothing for a VM that was not taken."""
    found = vm.files.found()
    if found is None:
        return
    for snapshot in await vm.list_snapshots():
        if snapshot.startswith(SNAPSHOT_PREFIX):
            await vm.delete_snapshot(snapshot)
    if found in (VmState.POWERED_OFF, VmState.ABORTED):
        await vm.power_off(SHUT_DOWN_S)
    elif await vm.state() in LIVE_STATES:  # one that is Stuck, too: what cannot be saved is not given back as saved
        await vm.save_state()
    vm.files.give_back()
    log.info("%s is left %s", vm.name, await vm.state())
