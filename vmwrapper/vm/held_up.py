"""What this computer lacks for a moment, such as space on its disk, while a VM is up: waited for.

Nothing of the guest is lost meanwhile, so nothing is given up: the write that the disk did not take is tried again,
more seldom each time, until it works or it has taken too long. Never changes anything else of the VM.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from vmcontrol.common.eventloop import sleep
from vmwrapper.context.context import JobContext
from vmwrapper.context.waiting import Patience
from vmwrapper.errors import TemporaryExit
from vmwrapper.vm.decisions import DEAD
from vmwrapper.vm.trouble import HostMainError

if TYPE_CHECKING:
    from vmwrapper.vm.hostmain import HostMainClient

PATIENCE_S = float(os.environ.get("VMWRAPPER_TEST_PATIENCE_S", "600"))
"""Un-suspended seconds; then the job makes place for others, its state saved if there is room for that. The variable is
for tests."""
PASSING = frozenset({"disk-full", "no-files", "checkpoint-file", "output-file"})
"""Keys of HostMain's problems, and faults of temporary exits, that may be over in a moment. To leave for them at once
would cost the work since the last snapshot: a full disk takes no saved state, either."""
DELAY_S = 600
_SETTLED_S = 0.5
"""A guest that goes on on a disk that is still full is stopped again within milliseconds."""

log = logging.getLogger(__name__)


class HeldUp:
    """Of one VM."""

    def __init__(self, context: JobContext, name: str, hostmain: Callable[[], Awaitable[HostMainClient]]) -> None:
        self._reactor = context.reactor
        self._name = name
        self._control = context.control
        self._hostmain = hostmain
        self._patience = Patience(context.control.work_clock.seconds, PATIENCE_S)
        self.reason = ""
        """Why it stands still, while that is waited for."""

    async def is_so(self) -> bool:
        """Whether it stands still now. Not known is no."""
        try:
            return (await (await self._hostmain()).info(self._name)).resumable
        except HostMainError:
            return False

    async def wait(self) -> None:
        """Return when it runs, at once if nothing holds it up. Raises HostMainError, TemporaryExit after PATIENCE_S."""
        if not await self.is_so():
            return
        hostmain = await self._hostmain()
        try:
            while (info := await hostmain.info(self._name)).resumable:
                if self._patience.is_new:
                    log.warning("VM %s stands still: %s. It goes on when that has passed", self._name, info.trouble)
                self.reason = info.trouble
                pause_s = self._patience.next_pause_s()
                if pause_s is None:
                    why = f"The virtual machine stands still: {info.trouble}"
                    raise TemporaryExit(why, fault="held-up", delay_s=DELAY_S)
                await sleep(self._reactor, pause_s)
                await self._control.may_work()
                await hostmain.unpause(self._name)
                await hostmain.wait_vm(self._name, DEAD, _SETTLED_S)
        finally:
            self.reason = ""
        log.info("VM %s goes on", self._name)

    async def passes(self, fault: str, reason: str) -> bool:
        """After a step that failed for what may pass: wait a little. Whether the step is worth another try."""
        if fault not in PASSING:
            return False
        if self._patience.is_new:
            log.warning("%s. It is tried again", reason)
        pause_s = self._patience.next_pause_s()
        if pause_s is None:
            return False
        self.reason = reason
        try:
            await sleep(self._reactor, pause_s)
            await self._control.may_work()
        finally:
            self.reason = ""
        return True
