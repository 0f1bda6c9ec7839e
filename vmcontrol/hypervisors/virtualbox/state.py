"""What state a VirtualBox VM is in: asked of VirtualBox as seldom as can be, and what happens to it by itself.

An answer counts until something happens to the VM: an operation of ours, a line in its log, the end of its process
(who notices one calls `forget`), a change of its settings, or until it is a few seconds old. When no operation
is under way a line in the log makes VirtualBox be asked, and the end of the process is looked into: shut down, or
aborted. Owns the last answer; never changes a VM.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import psutil
from twisted.internet.defer import DeferredLock

from vmcontrol.common.eventloop import sleep, start_logged
from vmcontrol.hypervisors.common.phases import Phases
from vmcontrol.hypervisors.common.tool import ToolResult
from vmcontrol.hypervisors.interface import HypervisorError
from vmcontrol.hypervisors.virtualbox import output, problems
from vmcontrol.hypervisors.virtualbox.console import Console
from vmcontrol.hypervisors.virtualbox.dialect import Dialect
from vmcontrol.hypervisors.virtualbox.files import Record
from vmcontrol.hypervisors.virtualbox.monitor import VmMonitor
from vmcontrol.hypervisors.virtualbox.output import Facts
from vmcontrol.hypervisors.virtualbox.registration import Registration
from vmcontrol.hypervisors.virtualbox.registry import is_same_folder
from vmcontrol.hypervisors.virtualbox.vboxmanage import VBoxManage
from vmcontrol.hypervisors.virtualbox.watch import FolderWatch
from vmcontrol.protocol.vm import LIVE_STATES, VmState

log = logging.getLogger(__name__)

FACTS_KEPT_S = 5.0
"""How long an answer counts of a VM of ours, whose folder is watched."""
FACTS_KEPT_UNWATCHED_S = 0.5
DEATH_LIMIT_S = 10.0
"""Until VirtualBox knows that a VM's process is gone: 0.1 s."""
LOOK_EVERY_S = 0.05
FULL_BYTES = 1024 * 1024
"""A growing VDI needs so much for its next block."""
LOOK_AGAIN_S = 0.5
"""A write that is tried again on a full disk fails within milliseconds."""


class Host(Protocol):
    """What is needed of the driver."""

    reactor: Any
    folder: Path
    vbox: VBoxManage
    watch: FolderWatch
    registration: Registration

    async def dialect(self) -> Dialect: ...
    def state_changed(self, name: str, state: VmState) -> None: ...


class StateTracker(Phases):
    """Of one VM."""

    def __init__(self, host: Host, name: str, uuid: str, record: Record | None, operations: DeferredLock) -> None:
        """record: None for a VM that is not ours. operations: held by an operation of ours, which reports itself."""
        super().__init__(name, host.state_changed)
        self.known: Facts | None = None
        """The last answer, if nothing has happened since that we know of; it may be too old to count."""
        self._known_at = 0.0
        self._settings_seen: tuple[int, int] | None = None
        self._asking = DeferredLock()
        self._host = host
        self._uuid = uuid
        self._record = record
        self._files = record.files if record is not None else None
        self._operations = operations
        self.console = Console(record)
        self.monitor = VmMonitor(
            host.reactor,
            host.watch,
            name,
            uuid,
            self._files.log if self._files is not None else None,
            on_change=self._folder_changed,
            on_end=self._process_ended,
        )

    # Asked ----------------------------------------------------------------------------------------------------------

    async def look(self, *, fresh: bool = False) -> Facts:
        """What VirtualBox says of the VM. fresh: asked in any case. Raises HypervisorErrors.

        One whose settings it cannot read, or of which it knows a copy in another folder, is registered anew.
        """
        async with self._asking:
            if self.known is not None and not fresh and self._counts():
                return self.known
            began = self._host.reactor.seconds()
            argv = ("showvminfo", self._uuid, "--machinereadable")
            answer = await self._host.vbox.ask(*argv)
            if (answer.status != 0 and problems.is_limited(answer.text)) or self._is_elsewhere(answer):
                await self._host.registration.register_anew(self.name, self._uuid, self._files)
                answer = await self._host.vbox.ask(*argv)
            if answer.status != 0:
                self.known = None
                raise problems.explain(f"asking for {self.name}", answer.text)
            facts = output.facts(answer.stdout)
            if facts is None:
                raise HypervisorError(
                    f"VirtualBox's answer about {self.name} cannot be understood: {answer.text[:300]}"
                )
            self.known, self._known_at = facts, began
            self._settings_seen = self._settings_now()
            self._follow(facts)
            return facts

    def _is_elsewhere(self, answer: ToolResult) -> bool:
        """Whether this is a copy of our VM, in a copy of BOINC's data folder, that VirtualBox knows instead."""
        facts = output.facts(answer.stdout) if answer.status == 0 and self._files is not None else None
        if facts is None or self._files is None or not facts.settings_file:
            return False
        return not is_same_folder(Path(facts.settings_file).parent, self._files.folder)

    def _counts(self) -> bool:
        age: float = self._host.reactor.seconds() - self._known_at
        if not self.monitor.watches:
            return age < FACTS_KEPT_UNWATCHED_S
        return age < FACTS_KEPT_S and self._settings_now() == self._settings_seen

    def _settings_now(self) -> tuple[int, int] | None:
        """VirtualBox writes its settings anew at each change that is to last: state, snapshots, hardware."""
        if self._files is None:
            return None
        try:
            status = self._files.settings.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def state_is(self, state: VmState) -> None:
        """VirtualBox has just said so by the success of an operation."""
        if self.known is not None:
            self.known = replace(self.known, state=state, state_word=state.value)
            self.renew()
            self._settings_seen = self._settings_now()

    def renew(self) -> None:
        """What is known counts from now on: VirtualBox has just answered another order."""
        self._known_at = self._host.reactor.seconds()

    def forget(self) -> None:
        """The next question goes to VirtualBox."""
        self.known = None

    async def asked(self, *, fresh: bool = False) -> VmState:
        return self._judged(await self.look(fresh=fresh))

    def _judged(self, facts: Facts) -> VmState:
        state = self.of(facts)
        if state is VmState.PAUSED and self.reported is VmState.RUNNING and not self._operations.locked:
            return self._paused_by_itself()  # seen here, for its log may be on the same full disk and say nothing
        return state

    def of(self, facts: Facts) -> VmState:
        """VirtualBox forgets that a VM ran when its service dies with it, or the power fails: then it was aborted."""
        if facts.state is None:
            raise HypervisorError(f"VirtualBox says that {facts.name} is {facts.state_word!r}, which is not known here")
        if self.held and facts.state is VmState.PAUSED:
            return VmState.STUCK
        ran = self._record is not None and self._record.definition.running and self.phase is None
        return VmState.ABORTED if ran and facts.state is VmState.POWERED_OFF else facts.state

    def counts_as(self, facts: Facts) -> VmState:
        """What the VM counts as, when these are the facts."""
        return self.phase or self._judged(facts)

    async def not_live(self) -> Facts | None:
        """Until VirtualBox knows that the process is gone. None: it does not say so within the limit."""
        deadline = self._host.reactor.seconds() + DEATH_LIMIT_S
        while True:
            facts = await self.look(fresh=True)
            if self.of(facts) not in LIVE_STATES:
                return facts
            if self._host.reactor.seconds() > deadline:
                return None
            await sleep(self._host.reactor, LOOK_EVERY_S)

    # Reported -------------------------------------------------------------------------------------------------------

    def operation_failed(self, before: VmState) -> None:  # noqa: ARG002 (VirtualBox is asked)
        self.forget()
        start_logged(self.report_asked(), f"the state of {self.name}")

    async def report_asked(self) -> VmState:
        """Report what VirtualBox says. Raises HypervisorErrors."""
        state = await self.asked()
        self.report(state)
        return state

    def report(self, state: VmState) -> None:
        if state is not VmState.STUCK and self.phase is None:  # an operation that fails has changed nothing
            self.held = False
        self.console.copy()  # a listener finds all that the guest has printed
        super().report(state)

    # What happens by itself -----------------------------------------------------------------------------------------

    def follow(self) -> None:
        """The VM has just begun to run: watch what there is of it now."""
        if self.known is not None:
            self._follow(self.known)

    def _follow(self, facts: Facts) -> None:
        live = self.of(facts) in LIVE_STATES
        if facts.log_folder and self.monitor.follow(Path(facts.log_folder), live=live):
            self.console.follow()

    def _folder_changed(self) -> None:
        """Look at what VirtualBox wrote; ask VirtualBox when it has a new state."""
        self.console.copy()
        state = self.monitor.read_log()
        if state is None or self.phase is not None or self._operations.locked:
            return
        if self.known is None or state is not self.known.state:
            self.forget()
            start_logged(self._ask_and_report(), f"the state of {self.name}")

    def look_again_soon(self) -> None:
        """After a try to go on: what stopped the VM may do so at once, before anybody listens to its log again."""
        start_logged(self._look_again(), f"the state of {self.name}")

    async def _look_again(self) -> None:
        await sleep(self._host.reactor, LOOK_AGAIN_S)
        self.forget()
        await self._ask_and_report()

    async def _ask_and_report(self) -> None:
        state = await self.asked()
        if self.phase is None and not self._operations.locked:
            if state is VmState.STUCK and not self.held:
                self.trouble = output.log_trouble(self.monitor.log_text())
            self.report(state)

    def _paused_by_itself(self) -> VmState:
        """It is paused, and not by an operation of ours: for a run-time error, or by a person."""
        words = output.runtime_error(self.monitor.log_text())
        files = self._files
        if not words and files is not None and psutil.disk_usage(str(files.folder)).free < FULL_BYTES:
            words = "no space left on device"
        if not words:
            return VmState.PAUSED
        self.held = True
        self.trouble = str(problems.explain("VirtualBox has paused the virtual machine", words))
        log.error("%s: %s", self.name, self.trouble)
        self.report(VmState.STUCK)
        return VmState.STUCK

    def _process_ended(self) -> None:
        self.forget()
        self.console.copy()
        if not self.ending and self.phase is None:
            start_logged(self._died(), f"the end of {self.name}")

    async def _died(self) -> None:
        """Its process ended, and not by us: the guest shut down, or it was killed or crashed."""
        try:
            if self._record is not None and output.log_ends_in_order(self.monitor.log_text()):
                self._record.change(running=False)
            facts = await self.not_live()
            state = VmState.ABORTED if facts is None else self.of(facts)
        except HypervisorError as error:
            log.warning("%s: its process ended, and VirtualBox does not tell more: %s", self.name, error)
            state = VmState.ABORTED
        if state is VmState.ABORTED:
            words = output.log_trouble(self.monitor.log_text())
            self.trouble = f"its process ended without saving anything{': ' if words else ''}{words}"
            log.warning("%s: %s", self.name, self.trouble)
        else:
            log.info("%s: its process ended; it is %s", self.name, state)
        if self.phase is None:
            self.report(state)
