"""What the slot keeps of a job's VMs at an end.

after_the_end      the checkpoint from which the next start goes on, and the lines that say so
remove_vm_files    of VMs that are not kept, what HostMain has left
written            a write to the ledger that must not stop an end
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vmcontrol.protocol.vmends import Outcome, VmEnd
from vmwrapper import names
from vmwrapper.errors import TemporaryExit
from vmwrapper.slot import Slot
from vmwrapper.state.checkpoint import Checkpoint, VmRecord
from vmwrapper.state.ledger import Ledger

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kept:
    """What became of the VMs at an end that keeps them."""

    checkpoint: Checkpoint
    saved: tuple[str, ...] = ()
    """A line for each VM that was saved."""
    lost: tuple[str, ...] = ()
    """A line for each that was not: why, and what the next start goes back to."""


def was_saved(ends: Mapping[str, VmEnd], vm: VmRecord) -> bool:
    """Whether HostMain has said that it saved this VM, and the next start goes on from that."""
    end = ends.get(vm.name)
    return end is not None and end.outcome is Outcome.SAVED and not vm.discard


def after_the_end(now: Checkpoint, ends: Mapping[str, VmEnd], live: str, *, lost_s: float) -> Kept:
    """The checkpoint that tells of the saved states, and the lines for stderr.txt. Pure.

    live: name of the VM that the task in hand uses and that ran until the end; "" when none did. lost_s: CPU time since
    the state to which that VM goes back when it was not saved.
    """
    checkpoint = now
    saved: list[str] = []
    lost: list[str] = []
    for vm in now.vms:
        if was_saved(ends, vm):
            if not vm.saved_state_expected:
                checkpoint = checkpoint.with_vm(replace(vm, saved_state_expected=True))
                saved.append(f"VM {vm.name} is saved")
            continue
        end = ends.get(vm.name)
        if vm.name == live or (end is not None and end.outcome is Outcome.FAILED):
            why = _why_not_saved(end)
            price = f", and {lost_s:.0f} s of CPU time are lost" if vm.name == live and lost_s >= 1 else ""
            lost.append(f"VM {vm.name} was not saved ({why}): {_next_start(vm)}{price}")
    return Kept(checkpoint, tuple(saved), tuple(lost))


def _why_not_saved(end: VmEnd | None) -> str:
    if end is None:
        return "HostMain did not say what became of it"
    if end.outcome is Outcome.SAVED:
        return "what it was doing is given up"
    return "it was switched off" if end.outcome is Outcome.OFF else end.reason or "HostMain does not say why"


def _next_start(vm: VmRecord) -> str:
    if not vm.ours:
        return "the next start switches it on as it is, and the task begins again"
    if vm.snapshot:
        return f"the next start goes back to its snapshot {vm.snapshot}"
    return "it has no snapshot, so the next start makes it anew and its task begins again"


def remove_vm_files(slot: Slot, ledger: Ledger) -> None:
    """The files of our VMs, and what the ledger has of them."""
    if slot.vm_folder.is_dir():
        for path in slot.vm_folder.iterdir():
            if path.name.startswith((names.VM_PREFIX, ".")):  # another name: a VM that was there before us
                _remove(path)
        with contextlib.suppress(OSError):
            slot.vm_folder.rmdir()
    if ledger.now.vms:
        written(lambda: ledger.keep(replace(ledger.now, vms=())))


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:  # the client empties the slot
        log.warning("%s of a VM could not be removed: %s", error.filename or path, error.strerror or error)


def written(write: Callable[[], None]) -> None:
    """A write to the ledger while everything is being ended: a full disk does not stop that."""
    try:
        write()
    except TemporaryExit as error:
        log.error("%s", error.reason)
