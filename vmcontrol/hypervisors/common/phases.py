"""The state of one VM, and what the driver's listeners hear of it.

While an operation of ours runs the VM counts as what the operation makes of it (`in_phase`), and the operation reports.
Else what the hypervisor says counts (`asked`), and changes are reported as they are noticed.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from vmcontrol.protocol.vm import VmState


class Phases(ABC):
    """Of one VM. A driver says how the hypervisor is asked."""

    def __init__(self, name: str, state_changed: Callable[[str, VmState], None]) -> None:
        """state_changed: called with the VM's name and its new state."""
        self.name = name
        self.phase: VmState | None = None
        """What the VM counts as while an operation is under way."""
        self.trouble = ""
        """Why the VM is Aborted or Stuck, as far as known."""
        self.held = False
        """The hypervisor has stopped the guest for want of something on this computer; resuming it tries again."""
        self.ending = False
        """We end the VM's process ourselves; its end is no news."""
        self.reported: VmState | None = None
        self._state_changed = state_changed

    @abstractmethod
    async def asked(self) -> VmState:
        """The state as the hypervisor has it, an operation under way or not. Raises HypervisorErrors."""

    @abstractmethod
    def operation_failed(self, before: VmState) -> None:
        """Report the state after an operation failed. before: the state of a live VM before the operation."""

    async def state(self) -> VmState:
        """What the VM counts as. Raises HypervisorErrors."""
        return self.phase if self.phase is not None else await self.asked()

    @contextlib.contextmanager
    def in_phase(self, phase: VmState, before: VmState = VmState.RUNNING) -> Iterator[None]:
        """What the VM counts as until the end of the block."""
        self.phase = phase
        self.report(phase)
        try:
            yield
        except BaseException:
            self.phase = None
            self.operation_failed(before)
            raise
        self.phase = None

    def report(self, state: VmState) -> None:
        """To the driver, if it is news."""
        if state is not self.reported:
            self.reported = state
            self._state_changed(self.name, state)
