"""The end of a job's VMs: deleted through HostMain, and their files in the slot in any case.

delete_vms         as long as HostMain answers
remove_vm_files    what is left in the slot
written            a write to the ledger that must not stop an end
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError

from vmcontrol.eventloop import LimitReached, with_limit
from vmwrapper import names
from vmwrapper.errors import TemporaryExit
from vmwrapper.ledger import Ledger
from vmwrapper.slot import Slot

if TYPE_CHECKING:
    from vmwrapper.vmmanage import Management

DELETE_LIMIT_S = 15.0
"""For deleting the VMs at a failure or an abort; what is left then is removed with its files."""

log = logging.getLogger(__name__)


async def delete_vms(reactor: Any, management: Management | None, ledger: Ledger) -> None:
    """Through HostMain, as long as it answers; the files in the slot go in any case."""
    if management is None or not management.running or not ledger.now.vms:
        return
    try:
        await with_limit(reactor, DELETE_LIMIT_S, "deleting the VMs", _delete(management, ledger))
    except CancelledError:
        raise
    except (LimitReached, Exception) as error:  # noqa: BLE001 (the end goes on)
        log.warning("not all VMs could be deleted: %s", error)


async def _delete(management: Management, ledger: Ledger) -> None:
    host = await management.host()
    for vm in ledger.now.vms:
        await (host.delete(vm.name) if vm.ours else host.release(vm.name))
        written(lambda name=vm.name: ledger.keep(ledger.now.without_vm(name)))  # type: ignore[misc]


def remove_vm_files(slot: Slot, ledger: Ledger) -> None:
    """The files of our VMs, and what the ledger has of them."""
    if slot.vm_folder.is_dir():
        for path in slot.vm_folder.iterdir():
            if path.name.startswith((names.VM_PREFIX, ".")):  # another name: a VM that was there before us
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            slot.vm_folder.rmdir()
    if ledger.now.vms:
        written(lambda: ledger.keep(replace(ledger.now, vms=())))


def written(write: Callable[[], None]) -> None:
    """A write to the ledger while everything is being ended: a full disk does not stop that."""
    try:
        write()
    except TemporaryExit as error:
        log.error("%s", error.reason)
