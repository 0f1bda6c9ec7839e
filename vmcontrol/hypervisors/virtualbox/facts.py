"""What VirtualBox says of one VM, asked as seldom as can be.

An answer counts until something happens to the VM: an operation of ours, a line in its log, the end of its process
(whoever knows of these calls `forget`), a change of its settings, or until it is a few seconds old. Owns the last
answer. Never decides what it means for the VM: state.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from twisted.internet.defer import DeferredLock

from vmcontrol.hypervisors.interface import HypervisorError
from vmcontrol.hypervisors.virtualbox import output, problems
from vmcontrol.hypervisors.virtualbox.output import Facts
from vmcontrol.hypervisors.virtualbox.registry import is_same_folder
from vmcontrol.hypervisors.virtualbox.vboxmanage import Answer, VBoxManage
from vmcontrol.protocol.vm import VmState

FACTS_KEPT_S = 5.0
"""How long an answer counts of a VM of ours, whose folder is watched."""
FACTS_KEPT_UNWATCHED_S = 0.5


class FactsCache:
    """The last answer of `showvminfo` about one VM."""

    def __init__(
        self,
        vbox: VBoxManage,
        name: str,
        uuid: str,
        settings: Path | None,
        *,
        watched: Callable[[], bool],
        mend: Callable[[], Awaitable[None]],
        on_answer: Callable[[Facts], None],
    ) -> None:
        """settings: VirtualBox's file of a VM of ours. watched: whether changes of the VM are told to us.

        mend: called when VirtualBox cannot read the VM's settings, or knows a copy of it in another folder, before it
        is asked once more; raises HypervisorErrors.
        on_answer: called with each new answer.
        """
        self.known: Facts | None = None
        """The last answer, if nothing has happened since that we know of; it may be too old to count."""
        self._known_at = 0.0
        self._vbox = vbox
        self._name = name
        self._uuid = uuid
        self._settings = settings
        self._settings_seen: tuple[int, int] | None = None
        self._watched = watched
        self._mend = mend
        self._on_answer = on_answer
        self._lock = DeferredLock()

    async def look(self, *, fresh: bool = False) -> Facts:
        """What VirtualBox says of it. fresh: asked in any case. Raises HypervisorErrors."""
        async with self._lock:
            if self.known is not None and not fresh and self._counts():
                return self.known
            began = self._vbox.reactor.seconds()
            words = ("showvminfo", self._uuid, "--machinereadable")
            answer = await self._vbox.ask(*words)
            if (answer.status != 0 and problems.is_limited(answer.text)) or self._is_elsewhere(answer):
                await self._mend()
                answer = await self._vbox.ask(*words)
            if answer.status != 0:
                self.known = None
                raise problems.explain(f"asking for {self._name}", answer.text)
            facts = output.facts(answer.out)
            if facts is None:
                raise HypervisorError(
                    f"VirtualBox's answer about {self._name} cannot be understood: {answer.text[:300]}"
                )
            self.known, self._known_at = facts, began
            self._settings_seen = self._settings_now()
            self._on_answer(facts)
            return facts

    def _is_elsewhere(self, answer: Answer) -> bool:
        """Whether this is a copy of our VM, in a copy of BOINC's data folder, that VirtualBox knows instead."""
        facts = output.facts(answer.out) if answer.status == 0 and self._settings is not None else None
        if facts is None or self._settings is None or not facts.settings_file:
            return False
        return not is_same_folder(Path(facts.settings_file).parent, self._settings.parent)

    def _counts(self) -> bool:
        age: float = self._vbox.reactor.seconds() - self._known_at
        if not self._watched():
            return age < FACTS_KEPT_UNWATCHED_S
        return age < FACTS_KEPT_S and self._settings_now() == self._settings_seen

    def _settings_now(self) -> tuple[int, int] | None:
        """VirtualBox writes its settings anew at each change that is to last: state, snapshots, hardware."""
        if self._settings is None:
            return None
        try:
            status = self._settings.stat()
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
        self._known_at = self._vbox.reactor.seconds()

    def forget(self) -> None:
        """The next question goes to VirtualBox."""
        self.known = None
