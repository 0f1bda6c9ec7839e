"""A VM's QEMU from its start to its end, and what state the VM is in, with and without one.

Owns the running QEMU, and what was told last. While an operation is under way the VM counts as what the operation makes
of it (`in_phase`), and the operation tells; else QEMU's events and its end are told as they come. Which operation comes
when, and what it does to the files, is vm.py's business; here only the mark of a run that ended in order is taken
away (running.json).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vmcontrol.common.eventloop import LimitReached, with_limit
from vmcontrol.common.logthrottle import LogThrottle
from vmcontrol.hypervisors.common import places
from vmcontrol.hypervisors.interface import HostProblem
from vmcontrol.hypervisors.qemu import problems
from vmcontrol.hypervisors.qemu.console import ConsoleLog
from vmcontrol.hypervisors.qemu.files import Record
from vmcontrol.hypervisors.qemu.qmp import ConnectionGone, QmpError
from vmcontrol.hypervisors.qemu.session import QemuSession
from vmcontrol.protocol.vm import VmState

log = logging.getLogger(__name__)

_STATES = {
    "running": VmState.RUNNING,
    "suspended": VmState.RUNNING,  # the guest sleeps by itself
    "paused": VmState.PAUSED,
    "debug": VmState.PAUSED,
    "prelaunch": VmState.STARTING,
    "inmigrate": VmState.RESTORING,
    "restore-vm": VmState.RESTORING,
    "save-vm": VmState.SAVING,
    "finish-migrate": VmState.SAVING,
    "postmigrate": VmState.SAVING,
    "shutdown": VmState.STOPPING,
}
"""QMP's RunState; what is not here (io-error, internal-error, guest-panicked) is Stuck."""


class Lifecycle:
    """Of one VM. At most one QEMU at a time: `spawn`, then `end`, unless it ends by itself."""

    def __init__(self, reactor: Any, record: Record, state_changed: Callable[[str, VmState], None]) -> None:
        """state_changed: called with the VM's name and its new state."""
        self.process: QemuSession | None = None
        """The QEMU that is there now."""
        self.ending = False
        """We end the process ourselves; its end is no news."""
        self.trouble = ""
        """Why the VM is Aborted or Stuck, as far as known."""
        self.held = False
        """QEMU has stopped the guest at a write that this computer's disk did not take; `cont` tries it again."""
        self._reactor = reactor
        self._record = record
        self._name = record.definition.name
        self._state_changed = state_changed
        self._phase: VmState | None = None
        """What the VM counts as while an operation is under way."""
        self._shutdown_reason = ""
        self._told: VmState | None = None
        self._holds = LogThrottle(log, reactor.seconds, "again and again: the next times are not noted")

    # State ----------------------------------------------------------------------------------------------------------

    async def state(self) -> VmState:
        """What the VM counts as."""
        return self._phase if self._phase is not None else await self.asked()

    async def asked(self) -> VmState:
        """What QEMU says, or the files when there is none, an operation under way or not."""
        process = self.process
        if process is None:
            return self._record.state()
        try:
            status = (await process.qmp.execute("query-status"))["status"]
        except ConnectionGone:
            with contextlib.suppress(LimitReached):
                await with_limit(self._reactor, 2.0, "the end of QEMU", process.ended.wait())
            return VmState.STUCK if self.process is process else self._record.state()
        except QmpError as error:
            self.trouble = str(error)
            return VmState.STUCK
        return _STATES.get(status, VmState.STUCK)

    @contextlib.contextmanager
    def in_phase(self, phase: VmState, before: VmState = VmState.RUNNING) -> Iterator[None]:
        """What the VM counts as until the end of the block; after an error it is what it was `before`, if it lives."""
        self._phase = phase
        self.tell(phase)
        try:
            yield
        except BaseException:
            self._phase = None
            live = self.process is not None
            self.tell(before if live else self._record.state())
            raise
        self._phase = None

    def tell(self, state: VmState) -> None:
        """To the driver, if it is news."""
        if self.process is not None:
            self.process.console.drain()  # who hears of a guest that stands finds all that it has printed
        if state is not self._told:
            self._told = state
            self._state_changed(self._name, state)

    # QEMU -----------------------------------------------------------------------------------------------------------

    def spawn(self, words: Sequence[str]) -> QemuSession:
        """Start QEMU; the caller connects. Raises OSError."""
        self.ending, self.held, self._shutdown_reason = False, False, ""
        console = ConsoleLog(places.recall(self._record.definition.console_log, self._record.files.slot))
        process = QemuSession.spawn(self._reactor, words, self._name, self._event, console)
        self.process = process
        process.ended.wait().addCallback(lambda _: self._process_ended(process))
        return process

    async def end(self, *, kill: bool) -> None:
        """End QEMU, if there is one: through QMP, flushing the disk, or at once. Raises HostProblem `process-stuck`."""
        process = self.process
        if process is None:
            return
        self.ending = True
        try:
            await (process.kill() if kill else process.quit())
        except QmpError as error:
            raise HostProblem(
                f"{error}; only a restart of this computer may help", key="process-stuck", delay_s=problems.HOUR
            ) from error
        self.process = None

    def abandon(self) -> None:
        """Make the operation that is under way fail now."""
        if self.process is not None:
            self.ending = True
            self.process.kill_now()

    def _process_ended(self, process: QemuSession) -> None:
        if self.process is not process:
            return
        self.process = None
        if self.ending or self._phase is not None:
            return  # the operation under way tells
        if process.status == 0 and self._shutdown_reason == "guest-shutdown":
            log.info("%s: the guest shut down", self._name)
            self._record.files.ended_orderly()
        else:
            self.trouble = process.last_words()
            log.warning("%s: QEMU ended by itself (%s)", self._name, self.trouble)
        self.tell(self._record.state())

    def _event(self, name: str, data: Mapping[str, Any]) -> None:
        if name == "SHUTDOWN":
            self._shutdown_reason = str(data.get("reason", ""))
        elif name == "RESET" and data.get("guest"):
            log.warning("%s: the guest restarted itself", self._name)
        elif name == "GUEST_PANICKED":
            self.trouble = "the guest's kernel crashed"
        elif name == "BLOCK_IO_ERROR" and data.get("action") == "stop":
            reason = str(data.get("reason") or "no reason given")
            self.trouble = str(problems.explain("the virtual machine's disk cannot be written", reason))
            self.held = True
            self._holds.write(logging.ERROR, "%s: %s", self._name, self.trouble)
        elif name == "RESUME":
            self.trouble, self.held = "", False
            if self._phase is None:
                self.tell(VmState.RUNNING)
        elif self._phase is None and name == "STOP":
            self.tell(VmState.STUCK if self.trouble else VmState.PAUSED)
