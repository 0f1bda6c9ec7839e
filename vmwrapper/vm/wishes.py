"""One VM kept as the client wants it: paused or running, its share of the processors, its network plugged in or not.

Compares, at each change, what the client wants (vmwrapper.context.control) with what the VM was last made to do. Does
nothing to a VM that does not run: `began` is called when it does.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from vmcontrol.common.eventloop import sleep, start_logged
from vmwrapper.boinc.runtime import InitData
from vmwrapper.context.context import JobContext
from vmwrapper.vm.trouble import CallFailed, HostMainError, HypervisorTrouble

if TYPE_CHECKING:
    from vmwrapper.vm.hostmain import HostMainClient

_AGAIN_S = 1.0
"""Between tries to pause or resume; HostMain may be starting."""
_NETWORK_AGAIN_S = 5.0

log = logging.getLogger(__name__)


class Wishes:
    """Of one VM."""

    def __init__(
        self,
        context: JobContext,
        name: str,
        *,
        has_network: bool,
        hostmain: Callable[[], Awaitable[HostMainClient]],
        locked: Callable[[Coroutine[Any, Any, None]], Awaitable[None]],
    ) -> None:
        """has_network: the job grants one. locked: runs a step on the VM when no other one is under way."""
        self._context = context
        self._control = context.control
        self._name = name
        self._has_network = has_network
        self._hostmain = hostmain
        self._locked = locked
        self.live = False
        """The VM was last seen running or paused."""
        self.paused = False
        self._network_suspended = self._control.network_suspended
        self._cpu_share = cpu_share(context.init_data)
        self._stop_listening = self._control.listen(self._look)

    async def began(self, hostmain: HostMainClient, *, paused: bool) -> None:
        """The VM runs: what it has not kept over its start is set again. Raises HostMainErrors."""
        if self._has_network:  # it may have been pulled when the VM was saved
            await hostmain.set_network(self._name, connected=not self._control.network_suspended)
        if self._cpu_share < 100:
            await hostmain.set_cpu_cap(self._name, self._cpu_share)
        self.look_again(paused=paused)

    def look_again(self, *, paused: bool) -> None:
        """Whether it is paused was found out anew."""
        self.paused = paused
        self._follow_suspension()

    def over(self) -> None:
        """The VM does not run any more."""
        self.live = self.paused = False

    def close(self) -> None:
        """No wish of the client is followed any more."""
        self.over()
        self._stop_listening()
        self._stop_listening = lambda: None

    def _look(self) -> None:
        self._follow_suspension()
        share, network = cpu_share(self._context.init_data), self._control.network_suspended
        if share != self._cpu_share:
            self._cpu_share = share
            if self.live:
                start_logged(self._set_cpu_share(), "the VM's share of the processors")
        if network != self._network_suspended:
            self._network_suspended = network
            start_logged(self._set_network(connected=not network), "network of the VM")

    # --- pause

    def _follow_suspension(self) -> None:
        if self.live and self.paused != self._control.suspended:
            start_logged(self._follow(), f"pause or resume of {self._name}")

    async def _follow(self) -> None:
        """Pause or resume until the VM is as the client wants it."""
        while self.live and self._control.ending is None and self.paused != self._control.suspended:
            try:
                await self._locked(self._follow_once())
            except HostMainError as error:
                log.warning("VM %s: %s", self._name, error)
                await sleep(self._context.reactor, _AGAIN_S)

    async def _follow_once(self) -> None:
        wanted = self._control.suspended
        if not self.live or self.paused == wanted:
            return
        hostmain = await self._hostmain()
        if wanted:
            await hostmain.pause(self._name)
        else:
            await hostmain.unpause(self._name)
        self.paused = wanted

    # --- processors and network

    async def _set_cpu_share(self) -> None:
        try:
            if not await (await self._hostmain()).set_cpu_cap(self._name, self._cpu_share):
                log.info("this hypervisor cannot limit a VM's share of the processors")
        except HostMainError as error:
            log.warning("VM %s: %s", self._name, error)

    async def _set_network(self, *, connected: bool) -> None:
        """Plug in or pull the network that the job granted; nothing to do when it granted none."""
        done = "plugged in" if connected else "pulled"
        while self.live and self._has_network and self._control.network_suspended != connected:
            try:
                await (await self._hostmain()).set_network(self._name, connected=connected)
            except (HypervisorTrouble, CallFailed) as error:
                log.error("VM %s: its network is not %s: %s", self._name, done, error)
            except HostMainError as error:
                log.warning("VM %s: its network is not %s yet: %s", self._name, done, error)
                await sleep(self._context.reactor, _NETWORK_AGAIN_S)
                continue
            else:
                log.info("VM %s: network %s", self._name, done)
            return


def cpu_share(data: InitData) -> int:
    """Percent of its processors that a VM may use, 1 to 100.

    The client throttles all other programs itself, by suspending them for parts of each second. Those whose plan class
    says VirtualBox it leaves alone (client/client_types.cpp, RESULT::dont_throttle): they cap their VM.
    """
    if "vbox" not in data.plan_class:
        return 100
    return max(1, min(100, round(data.cpu_usage_limit)))
