"""What state a VirtualBox VM is in: asked (facts.py), told by what happens to it (monitor.py), passed on.

While an operation of ours is under way the VM counts as what the operation makes of it (`phase`), and news is the
operation's to tell. Else a line in the log makes VirtualBox be asked, and the end of the process is looked into: shut
down, or aborted. Owns what was told last; never changes a VM.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import psutil
from twisted.internet.defer import DeferredLock

from vmcontrol.common.eventloop import sleep, start_logged
from vmcontrol.hypervisors.interface import HypervisorError
from vmcontrol.hypervisors.virtualbox import output, problems
from vmcontrol.hypervisors.virtualbox.console import Console
from vmcontrol.hypervisors.virtualbox.facts import FactsCache
from vmcontrol.hypervisors.virtualbox.files import Record
from vmcontrol.hypervisors.virtualbox.monitor import VmMonitor
from vmcontrol.hypervisors.virtualbox.output import Facts
from vmcontrol.hypervisors.virtualbox.registration import Registration
from vmcontrol.hypervisors.virtualbox.vboxmanage import VBoxManage
from vmcontrol.hypervisors.virtualbox.watch import FolderWatch
from vmcontrol.protocol.vm import LIVE_STATES, VmState

log = logging.getLogger(__name__)

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
    vbox: VBoxManage
    watch: FolderWatch
    registration: Registration

    def state_changed(self, name: str, state: VmState) -> None: ...


class StateTracker:
    """Of one VM."""

    def __init__(
        self, host: Host, name: str, uuid: str, record: Record | None, *, console: Console, operations: DeferredLock
    ) -> None:
        """record: None for a VM that is not ours. console: copied when something happens.

        operations: held by an operation of ours, which tells itself what it made of the VM.
        """
        self.trouble = ""
        """Why it is Aborted or Stuck, as far as known."""
        self.held = False
        """VirtualBox has paused it by itself, for a run-time error such as a full disk: it counts as Stuck, and
        resuming it tries again."""
        self.ending = False
        """We end its process ourselves; its end is no news."""
        self._host = host
        self._name = name
        self._record = record
        self._console = console
        self._operations = operations
        self._phase: VmState | None = None
        """What the VM counts as while an operation is under way."""
        self._told: VmState | None = None
        files = record.files if record is not None else None
        self.monitor = VmMonitor(
            host.reactor,
            host.watch,
            name,
            uuid,
            files.log if files is not None else None,
            on_change=self._folder_changed,
            on_end=self._process_ended,
        )
        self.facts = FactsCache(
            host.vbox,
            name,
            uuid,
            files.settings if files is not None else None,
            watched=lambda: self.monitor.watches,
            mend=lambda: host.registration.register_anew(name, uuid, files),
            on_answer=self._follow,
        )

    # Asked ----------------------------------------------------------------------------------------------------------

    async def state(self) -> VmState:
        """What the VM counts as. Raises HypervisorErrors."""
        return self._phase if self._phase is not None else await self.asked()

    async def asked(self, *, fresh: bool = False) -> VmState:
        """What VirtualBox says, an operation under way or not. Raises HypervisorErrors."""
        return self._judged(await self.facts.look(fresh=fresh))

    def _judged(self, facts: Facts) -> VmState:
        state = self.of(facts)
        if state is VmState.PAUSED and self._told is VmState.RUNNING and not self._operations.locked:
            return self._paused_by_itself()  # seen here, for its log may be on the same full disk and say nothing
        return state

    def of(self, facts: Facts) -> VmState:
        """VirtualBox forgets that a VM ran when its service dies with it, or the power fails: then it was aborted."""
        if facts.state is None:
            raise HypervisorError(f"VirtualBox says that {facts.name} is {facts.state_word!r}, which is not known here")
        if self.held and facts.state is VmState.PAUSED:
            return VmState.STUCK
        ran = self._record is not None and self._record.definition.running and self._phase is None
        return VmState.ABORTED if ran and facts.state is VmState.POWERED_OFF else facts.state

    def counts_as(self, facts: Facts) -> VmState:
        """What the VM counts as, when these are the facts."""
        return self._phase or self._judged(facts)

    async def not_live(self) -> Facts | None:
        """Until VirtualBox knows that the process is gone. None: it does not say so within the limit."""
        deadline = self._host.reactor.seconds() + DEATH_LIMIT_S
        while True:
            facts = await self.facts.look(fresh=True)
            if self.of(facts) not in LIVE_STATES:
                return facts
            if self._host.reactor.seconds() > deadline:
                return None
            await sleep(self._host.reactor, LOOK_EVERY_S)

    # Told -----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def in_phase(self, phase: VmState) -> Iterator[None]:
        """What the VM counts as until the end of the block; after an error VirtualBox is asked."""
        held, self._phase = self.held, phase
        self.tell(phase)
        try:
            yield
        except BaseException:
            self._phase, self.held = None, held
            self.facts.forget()
            start_logged(self.tell_asked(), f"the state of {self._name}")
            raise
        self._phase = None

    async def tell_asked(self) -> VmState:
        """Tell what VirtualBox says. Raises HypervisorErrors."""
        state = await self.asked()
        self.tell(state)
        return state

    def tell(self, state: VmState) -> None:
        """To the driver, if it is news."""
        if state is not VmState.STUCK:
            self.held = False
        if state is not self._told:
            self._told = state
            self._host.state_changed(self._name, state)

    # What happens by itself -----------------------------------------------------------------------------------------

    def follow(self) -> None:
        """The VM has just begun to run: watch what there is of it now."""
        if self.facts.known is not None:
            self._follow(self.facts.known)

    def _follow(self, facts: Facts) -> None:
        live = self.of(facts) in LIVE_STATES
        if facts.log_folder and self.monitor.follow(Path(facts.log_folder), live=live):
            self._console.follow()

    def _folder_changed(self) -> None:
        """Look at what VirtualBox wrote; a state that is not known yet is asked for."""
        self._console.copy()
        state = self.monitor.read_log()
        if state is None or self._phase is not None or self._operations.locked:
            return
        if self.facts.known is None or state is not self.facts.known.state:
            self.facts.forget()
            start_logged(self._ask_and_tell(), f"the state of {self._name}")

    def look_again_soon(self) -> None:
        """After a try to go on: what stopped the VM may do so at once, before anybody listens to its log again."""
        start_logged(self._look_again(), f"the state of {self._name}")

    async def _look_again(self) -> None:
        await sleep(self._host.reactor, LOOK_AGAIN_S)
        self.facts.forget()
        await self._ask_and_tell()

    async def _ask_and_tell(self) -> None:
        state = await self.asked()
        if self._phase is None and not self._operations.locked:
            if state is VmState.STUCK and not self.held:
                self.trouble = output.log_trouble(self.monitor.log_text())
            self.tell(state)

    def _paused_by_itself(self) -> VmState:
        """It is paused, and not by an operation of ours: for a run-time error, or by a person."""
        words = output.runtime_error(self.monitor.log_text())
        files = self._record.files if self._record is not None else None
        if not words and files is not None and psutil.disk_usage(str(files.folder)).free < FULL_BYTES:
            words = "no space left on device"
        if not words:
            return VmState.PAUSED
        self.held = True
        self.trouble = str(problems.explain("VirtualBox has paused the virtual machine", words))
        log.error("%s: %s", self._name, self.trouble)
        self.tell(VmState.STUCK)
        return VmState.STUCK

    def _process_ended(self) -> None:
        self.facts.forget()
        self._console.copy()
        if not self.ending and self._phase is None:
            start_logged(self._died(), f"the end of {self._name}")

    async def _died(self) -> None:
        """Its process ended, and not by us: the guest shut down, or it was killed or crashed."""
        try:
            if self._record is not None and self._shut_down():
                self._record.change(running=False)
            facts = await self.not_live()
            state = VmState.ABORTED if facts is None else self.of(facts)
        except HypervisorError as error:
            log.warning("%s: its process ended, and VirtualBox does not tell more: %s", self._name, error)
            state = VmState.ABORTED
        if state is VmState.ABORTED:
            words = output.log_trouble(self.monitor.log_text())
            self.trouble = f"its process ended without saving anything{': ' if words else ''}{words}"
            log.warning("%s: %s", self._name, self.trouble)
        else:
            log.info("%s: its process ended; it is %s", self._name, state)
        if self._phase is None:
            self.tell(state)

    def _shut_down(self) -> bool:
        """Whether the log tells of an end in order: by the guest, or by somebody at VirtualBox's window."""
        return output.log_ends_in_order(self.monitor.log_text())
