"""A VM's QEMU from its start to its end, and what state the VM is in, with and without one.

Owns the running QEMU. QEMU's events and its end are reported as they come, unless an operation is under way
(common/phases.py). Which operation comes when, and what it does to the files, is vm.py's business; here only the mark
of a run that ended in order is taken away (running.json).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vmcontrol.common.eventloop import LimitReached, with_limit
from vmcontrol.common.logthrottle import LogThrottle
from vmcontrol.hypervisors.common.console import ConsoleLog
from vmcontrol.hypervisors.common.folder import Record
from vmcontrol.hypervisors.common.phases import Phases
from vmcontrol.hypervisors.common.problems import process_stuck
from vmcontrol.hypervisors.qemu import problems
from vmcontrol.hypervisors.qemu.files import Definition, VmFiles
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


class Lifecycle(Phases):
    """Of one VM. At most one QEMU at a time: `spawn`, then `end`, unless it ends by itself."""

    def __init__(
        self, reactor: Any, files: VmFiles, record: Record[Definition], state_changed: Callable[[str, VmState], None]
    ) -> None:
        super().__init__(record.definition.name, state_changed)
        self.process: QemuSession | None = None
        """The QEMU that is there now."""
        self._reactor = reactor
        self._files = files
        self._record = record
        self._shutdown_reason = ""
        self._holds = LogThrottle(log, reactor.seconds, "again and again: the next times are not noted")

    # State ----------------------------------------------------------------------------------------------------------

    async def asked(self) -> VmState:
        process = self.process
        if process is None:
            return self.of_files()
        try:
            status = (await process.qmp.execute("query-status"))["status"]
        except ConnectionGone:
            with contextlib.suppress(LimitReached):
                await with_limit(self._reactor, 2.0, "the end of QEMU", process.ended.wait())
            return VmState.STUCK if self.process is process else self.of_files()
        except QmpError as error:
            self.trouble = str(error)
            return VmState.STUCK
        return _STATES.get(status, VmState.STUCK)

    def of_files(self) -> VmState:
        """The state of the VM when it has no process."""
        return self._files.state(self._record.definition)

    def operation_failed(self, before: VmState) -> None:
        self.report(before if self.process is not None else self.of_files())

    def report(self, state: VmState) -> None:
        if self.process is not None:
            self.process.console.drain()  # who hears of a guest that stands finds all that it has printed
        super().report(state)

    # QEMU -----------------------------------------------------------------------------------------------------------

    def spawn(self, argv: Sequence[str]) -> QemuSession:
        """Start QEMU; the caller connects. Raises OSError."""
        self.ending, self.held, self._shutdown_reason = False, False, ""
        console = ConsoleLog(self._files.path(self._record.definition.console_log))
        process = QemuSession.spawn(self._reactor, argv, self.name, self._event, console)
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
            raise process_stuck(str(error)) from error
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
        if self.ending or self.phase is not None:
            return  # the operation under way reports
        if process.status == 0 and self._shutdown_reason == "guest-shutdown":
            log.info("%s: the guest shut down", self.name)
            self._files.ended_orderly()
        else:
            self.trouble = process.last_words()
            log.warning("%s: QEMU ended by itself (%s)", self.name, self.trouble)
        self.report(self.of_files())

    def _event(self, name: str, data: Mapping[str, Any]) -> None:
        if name == "SHUTDOWN":
            self._shutdown_reason = str(data.get("reason", ""))
        elif name == "RESET" and data.get("guest"):
            log.warning("%s: the guest restarted itself", self.name)
        elif name == "GUEST_PANICKED":
            self.trouble = "the guest's kernel crashed"
        elif name == "BLOCK_IO_ERROR" and data.get("action") == "stop":
            reason = str(data.get("reason") or "no reason given")
            self.trouble = str(problems.explain("the virtual machine's disk cannot be written", reason))
            self.held = True
            self._holds.write(logging.ERROR, "%s: %s", self.name, self.trouble)
        elif name == "RESUME":
            self.trouble, self.held = "", False
            if self.phase is None:
                self.report(VmState.RUNNING)
        elif self.phase is None and name == "STOP":
            self.report(VmState.STUCK if self.trouble else VmState.PAUSED)
