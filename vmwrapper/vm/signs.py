"""Signs of life of the guest of one VM: whether it answers, how long it has been silent, what its console says.

Asks HostMain, which hears the guest and knows which of its silence counts (vmcontrol.guests.silence). Never touches the
VM.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from vmcontrol.common.slotfiles import GUEST_CONSOLE
from vmwrapper.context.context import JobContext
from vmwrapper.log import quote, size_of, tail_of_file
from vmwrapper.vm import incident
from vmwrapper.vm.trouble import HostMainError

if TYPE_CHECKING:
    from vmwrapper.vm.hostmain import HostMainClient

SILENCE_S = float(os.environ.get("VMWRAPPER_TEST_SILENCE_S", "180"))
"""Seconds of silence of a guest, as HostMain counts them, after which it is looked at. The variable is for tests."""
PING_LIMIT_S = min(20.0, SILENCE_S / 3)
"""For a guest to answer: a busy one, emulated, needs seconds."""
_CONSOLE_LOOK = 64 * 1024
"""Bytes at the end of the console in which is looked for what happened."""
_CONSOLE_LINES = 1000

log = logging.getLogger(__name__)


class GuestSigns:
    """Of one VM, over all its starts."""

    def __init__(self, context: JobContext, vm: str, hostmain: Callable[[], Awaitable[HostMainClient]]) -> None:
        self._vm = vm
        self._console = context.slot.file(GUEST_CONSOLE)
        self._control = context.control
        self._hostmain = hostmain
        self._console_begins = 0
        self._booted: float | None = None

    def begins(self) -> None:
        """The VM is about to be brought up: what its console says before that is of another time."""
        self._console_begins = size_of(self._console)
        self._booted = None

    def console(self) -> list[str]:
        """What the guest wrote to its console since the VM was brought up, the end of it."""
        return tail_of_file(self._console, lines=_CONSOLE_LINES, size=_CONSOLE_LOOK, since=self._console_begins)

    def quote_console(self) -> None:
        """Its last lines into stderr.txt, and those of a panic."""
        quote("guest console", incident.excerpt(self.console()))

    async def answers(self, *, patient: bool = False) -> bool:
        """Whether the guest answers now; while the client has suspended us it is not asked.

        patient: asked again until its silence is more than a slow computer explains. Raises HostMainErrors.
        """
        clock = self._control.work_clock
        while True:
            await self._control.may_work()
            hostmain, began = await self._hostmain(), clock.seconds()
            if await hostmain.ping_guest(self._vm, PING_LIMIT_S):
                return True
            suspended = clock.seconds() - began < 0.9 * PING_LIMIT_S
            if not suspended and (not patient or await hostmain.wait_silent(self._vm, SILENCE_S, 0.0) >= SILENCE_S):
                return False

    async def is_silent(self, seconds: float) -> bool:
        """Whether it has been silent for so long, without waiting for more of it."""
        return await (await self._hostmain()).wait_silent(self._vm, seconds, 0.0) >= seconds

    async def silence(self) -> str:
        """Wait until the guest has been silent for SILENCE_S and does not answer when dialled anew: why, in words.

        Raises HostMainErrors.
        """
        while True:
            await self._control.may_work()
            hostmain = await self._hostmain()
            seconds = await hostmain.wait_silent(self._vm, SILENCE_S)
            if seconds < SILENCE_S or self._control.suspended:
                continue
            log.warning("VM %s: no sign of life of the guest for %.0f s: it is dialled anew", self._vm, seconds)
            answers = await hostmain.ping_guest(self._vm, PING_LIMIT_S, anew=True)
            if answers:
                log.info("VM %s: the guest answers", self._vm)
            elif not self._control.suspended and await self.is_silent(SILENCE_S):
                return incident.silent(self.console(), seconds, await hostmain.state(self._vm))

    # --- whether it has booted since

    async def note_boot(self) -> None:
        """Remember when the guest booted; nobody waits for it."""
        uptime = await self._uptime()
        self._booted = None if uptime is None else self._control.work_clock.seconds() - uptime

    async def restarted(self) -> str:
        """Why its agent does not know what it did before, in words."""
        uptime = await self._uptime()
        expected = None if self._booted is None else self._control.work_clock.seconds() - self._booted
        return incident.restarted(self.console(), uptime, expected)

    async def _uptime(self) -> float | None:
        try:
            return await (await self._hostmain()).guest_uptime(self._vm)
        except HostMainError as error:
            log.debug("no uptime of %s: %s", self._vm, error)
            return None
