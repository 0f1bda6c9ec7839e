"""The end of the VMs that this HostMain has started, and what became of each: saved, switched off, or why not.

Owns the order of an end. What is said of a VM is what the hypervisor did or says of it, never that a call came back. A
VM that could not be saved is switched off: nothing may run on behind the wrapper's back, and its snapshots are there.
"""

from __future__ import annotations

import errno
import logging
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, DeferredList

from vmcontrol.common import eventloop
from vmcontrol.common.eventloop import Event, LimitReached, sleep, with_limit
from vmcontrol.guests.vms import PASSING_STATES, READY_LIMIT_S, Machines
from vmcontrol.hypervisors.interface import HostProblem, HypervisorError, VmNotFound
from vmcontrol.protocol.vm import LIVE_STATES, VmState
from vmcontrol.protocol.vmends import Outcome, VmEnd

log = logging.getLogger(__name__)

AGAIN_FOR_S = 4.0
"""For which a save that may work in a moment is tried again; who ends us does not wait long."""
OFF_LIMIT_S = 5.0
"""For switching off a VM that could not be saved in time."""


class Endings:
    """Of one HostMain."""

    def __init__(self, reactor: Any, machines: Machines) -> None:
        self._reactor = reactor
        self._machines = machines
        self._ends: dict[str, VmEnd] = {}
        self._saving: Event | None = None
        """Set when the saving that is under way is over."""

    async def end(self, *, save: bool, limit_s: float) -> list[VmEnd]:
        """Save, or switch off, every live VM that is ours to end; what became of each. Never raises.

        TERM and `shutdown` may come together: who asks for a save while one is under way gets the answer of that one.
        """
        while self._saving is not None:
            await self._saving.wait()
            if save:
                return list(self._ends.values())
        if self._machines.hypervisor is None:
            return []
        if save:
            self._saving = Event()
        try:
            return await self._end_all(save=save, limit_s=limit_s)
        finally:
            saving, self._saving = self._saving, None
            if saving is not None:
                saving.set()

    async def _end_all(self, *, save: bool, limit_s: float) -> list[VmEnd]:
        names = self._machines.ours
        self._ends = {}
        ending: list[Deferred[object]] = [
            eventloop.start_logged(self._end_one(name, save=save), f"ending VM {name}") for name in names
        ]
        try:
            await with_limit(self._reactor, limit_s, "the VMs to end", DeferredList(ending))
        except LimitReached as error:
            log.error("%s", error)
        late = [name for name in names if name not in self._ends]
        for name in late:
            self._say(VmEnd(name, Outcome.FAILED, f"it took longer than {limit_s:g} s"))
        if late:
            off: list[Deferred[object]] = [eventloop.start_logged(self._off(n), f"switching off VM {n}") for n in late]
            try:
                await with_limit(self._reactor, OFF_LIMIT_S, "the VMs to be switched off", DeferredList(off))
            except LimitReached as error:
                log.error("%s", error)
        return list(self._ends.values())

    async def _end_one(self, name: str, *, save: bool) -> None:
        try:
            self._say(await (self._saved(name) if save else self._switched_off(name)))
        except CancelledError:
            raise  # the limit is reached: who set it says so
        except VmNotFound:
            self._say(VmEnd(name, Outcome.OFF, "it is not there any more"))
        except HostProblem as fault:
            self._say(VmEnd(name, Outcome.FAILED, fault.reason, fault.key))
        except Exception as error:  # noqa: BLE001 (whatever it is, it is told)
            self._say(VmEnd(name, Outcome.FAILED, str(error) or type(error).__name__))

    async def _saved(self, name: str) -> VmEnd:
        state = await self._settled(name)
        if state not in LIVE_STATES:
            return await self._not_live(name, state)
        deadline, pause_s = self._reactor.seconds() + AGAIN_FOR_S, 0.5
        while True:
            try:
                await self._machines.save_state(name)
            except CancelledError:
                raise
            except Exception as error:
                if await self._machines.state(name) is VmState.SAVED:  # what failed came after that
                    return VmEnd(name, Outcome.SAVED)
                if not _may_pass(error) or self._reactor.seconds() + pause_s > deadline:
                    await self._off(name)
                    raise
                log.warning("VM %s: %s; it is tried again", name, error)
                await sleep(self._reactor, pause_s)
                pause_s *= 2
            else:
                return VmEnd(name, Outcome.SAVED)

    async def _not_live(self, name: str, state: VmState) -> VmEnd:
        if state is VmState.SAVED:
            return VmEnd(name, Outcome.SAVED)
        if state is VmState.POWERED_OFF:
            return VmEnd(name, Outcome.OFF)
        trouble = await self._machines.trouble(name)
        return VmEnd(name, Outcome.FAILED, f"it is {state}{': ' if trouble else ''}{trouble}")

    async def _switched_off(self, name: str) -> VmEnd:
        if await self._settled(name) in LIVE_STATES:
            await self._machines.power_off(name)
        return VmEnd(name, Outcome.OFF)

    async def _off(self, name: str) -> None:
        try:
            if await self._machines.state(name) in LIVE_STATES:
                await self._machines.power_off(name)
        except HypervisorError as error:
            log.warning("VM %s could not be switched off: %s", name, error)

    async def _settled(self, name: str) -> VmState:
        """A VM that is being saved or started is let finish that: the caller who asked may be the wrapper that died."""
        settled = [state.value for state in VmState if state not in PASSING_STATES]
        return await self._machines.wait_state(name, settled, READY_LIMIT_S)

    def _say(self, end: VmEnd) -> None:
        self._ends[end.name] = end
        if end.outcome is Outcome.FAILED:
            log.error("VM %s: %s", end.name, end.reason)


def _may_pass(error: Exception) -> bool:
    """Whether a save that failed may work in a second or two: after a moment without space or descriptors."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EMFILE, errno.ENFILE)
    return isinstance(error, HostProblem) and error.key in ("disk-full", "no-files")
