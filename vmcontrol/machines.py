"""The virtual machines of this HostMain: the hypervisor's calls, and for each live VM the link to its agent.

Owns the hypervisor and the GuestLinks. The state of a VM is the hypervisor's, asked anew each time; what is kept here
is which link belongs to which VM, whether the guest's clock has to be set, and which VMs this HostMain has started
(those are saved when it ends).

    HypervisorError         as the driver raises it
    NotReady                the hypervisor has not been opened within the limit
    GuestSilent             the guest's agent is not there
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, DeferredList, DeferredLock

from vmcontrol import eventloop
from vmcontrol.conversation import Conversation
from vmcontrol.eventloop import Event, LimitReached, with_limit
from vmcontrol.files import FileTransfer, http_transfer
from vmcontrol.guests import Change, Guest
from vmcontrol.hypervisors.interface import LIVE_STATES, Hypervisor, VmInfo, VmNotFound, VmState
from vmcontrol.link.dialler import Broker, GuestLink, GuestRefused, LinkError
from vmcontrol.link.handshake import AGENT_PORT

log = logging.getLogger(__name__)

READY_LIMIT_S = 60.0
"""Seconds for the hypervisor to be opened (a VirtualBox service that starts, an accelerator that is tried)."""
CLOCK_LIMIT_S = 30.0
OFF_STATES = frozenset({VmState.POWERED_OFF, VmState.ABORTED})


class NotReady(Exception):  # noqa: N818
    """The hypervisor is not there yet."""


class GuestSilent(Exception):  # noqa: N818
    """The guest's agent is not there."""


@dataclass(slots=True)
class _Machine:
    """What is kept for a VM that was seen live."""

    name: str
    id: str
    link: GuestLink | None = None
    address: tuple[str, int] | None = None
    live: bool = False
    clock_due: bool = False
    paused: bool = False
    own_way: GuestLink | None = None
    """To the address that an agent of ours on the link of 2009 has named: for files, without a carrier."""
    lock: DeferredLock = field(default_factory=DeferredLock)


class Machines:
    """All VMs. Methods that only ask the hypervisor are called on `await ready()`."""

    def __init__(
        self, reactor: Any, *, conversation: Conversation, secret_file: Path, broker: Callable[[], Broker | None]
    ) -> None:
        self._reactor = reactor
        self._conversation = conversation
        self._secret_file = secret_file
        self._broker = broker
        self._hypervisor: Hypervisor | None = None
        self._failure: Exception | None = None
        self._opened = Event()
        self._changed = Event()
        self._machines: dict[str, _Machine] = {}
        self._ours: set[str] = set()
        self._closing = False
        conversation.on_guest.append(self._guest_changed)

    # The hypervisor

    def opened(self, hypervisor: Hypervisor) -> None:
        """It can be used. VMs that are live already get their links."""
        self._hypervisor = hypervisor
        hypervisor.on_state_change(self._state_changed)
        self._opened.set()
        eventloop.start_logged(self._follow_all(), "links to the VMs that are live")

    def failed(self, error: Exception) -> None:
        """It cannot be used: each call that needs it raises this."""
        self._failure = error
        self._opened.set()

    @property
    def hypervisor(self) -> Hypervisor | None:
        """None while it is not open, or when it could not be opened."""
        return self._hypervisor

    @property
    def failure(self) -> Exception | None:
        return self._failure

    async def ready(self) -> Hypervisor:
        """The hypervisor, when it is open. Raises what opening it raised, or NotReady."""
        if not self._opened.is_set():
            try:
                await with_limit(self._reactor, READY_LIMIT_S, "the hypervisor", self._opened.wait())
            except LimitReached as error:
                raise NotReady(str(error)) from error
        if self._hypervisor is None:
            raise self._failure or NotReady("the hypervisor could not be opened")
        return self._hypervisor

    # Names and ids

    async def name_of(self, name_or_id: str) -> str:
        """The name of a VM that was given by name or by id (MAC)."""
        if len(name_or_id) == 17 and name_or_id.count(":") == 5:
            for name, id in (await self.names_to_ids()).items():
                if id == name_or_id.upper():
                    return name
        return name_or_id

    async def names_to_ids(self) -> dict[str, str]:
        """Asked of the hypervisor now, so that VMs made a moment ago are in it."""
        hypervisor = await self.ready()
        mapping: dict[str, str] = {}
        for name in await hypervisor.list_vms():
            try:
                mapping[name] = (await hypervisor.info(name)).mac.upper()
            except VmNotFound:
                continue  # deleted meanwhile
        return mapping

    async def id_of(self, name: str) -> str:
        known = self._machines.get(name)
        if known is not None:
            return known.id
        return (await (await self.ready()).info(name)).mac.upper()

    async def registered(self) -> list[str]:
        """Names of the VMs whose agents are registered; an agent in no VM of this hypervisor has none."""
        ids = {guest.id for guest in self._conversation.guests.all()}
        return [name for name, id in (await self.names_to_ids()).items() if id in ids] if ids else []

    # Life

    async def start(self, name: str) -> None:
        """Start or resume; the guest registers anew."""
        hypervisor = await self.ready()
        state = await hypervisor.state(name)
        if state not in LIVE_STATES:
            await self._leave(name)
            self._ours.add(name)
            log.info("VM %s: starting from %s", name, state)
        await hypervisor.start(name)
        await self._follow(name)

    async def pause(self, name: str) -> None:
        await (await self.ready()).pause(name)
        await self._follow(name)

    async def unpause(self, name: str) -> None:
        await (await self.ready()).unpause(name)
        await self._follow(name)

    async def save_state(self, name: str) -> None:
        await (await self.ready()).save_state(name)
        log.info("VM %s: saved", name)
        await self._follow(name)

    async def power_off(self, name: str) -> None:
        await (await self.ready()).power_off(name)
        log.info("VM %s: powered off", name)
        await self._rolled_back(name, "the VM was powered off")

    async def restore_snapshot(self, name: str, snapshot: str | None) -> None:
        await (await self.ready()).restore_snapshot(name, snapshot)
        log.info("VM %s: taken back to %s", name, snapshot or "its current snapshot")
        await self._rolled_back(name, "the VM was taken back to a snapshot")

    async def delete(self, name: str) -> None:
        hypervisor = await self.ready()
        try:
            id = await self.id_of(name)
        except VmNotFound:
            id = ""
        await hypervisor.delete(name)
        await self._leave(name)
        self._machines.pop(name, None)
        self._ours.discard(name)
        if id:
            self._conversation.commands.rolled_back(id, "the VM was deleted")
        log.info("VM %s: deleted", name)

    async def end_ours(self, *, save: bool, limit_s: float) -> None:
        """Save, or power off, every live VM that this HostMain has started. Failures are logged; it never raises."""
        if self._hypervisor is None:
            return
        ending = [eventloop.start_logged(self._end_one(n, save=save), f"ending VM {n}") for n in list(self._ours)]
        try:
            await with_limit(self._reactor, limit_s, "the VMs to end", DeferredList(ending))
        except LimitReached as error:
            log.error("%s", error)

    async def _end_one(self, name: str, *, save: bool) -> None:
        assert self._hypervisor is not None  # noqa: S101 (the caller looked)
        if await self._hypervisor.state(name) not in LIVE_STATES:
            return
        if save:
            await self.save_state(name)
        else:
            await self.power_off(name)

    async def close(self) -> None:
        """Links and hypervisor. VMs are not touched."""
        self._closing = True
        for machine in list(self._machines.values()):
            await self._drop_link(machine)
        if self._hypervisor is not None:
            await self._hypervisor.close()

    # Waiting

    async def wait_state(self, name: str, states: list[str], limit_s: float) -> VmState:
        """The state as soon as it is one of these, or at the limit."""
        hypervisor = await self.ready()
        deadline = self._reactor.seconds() + limit_s
        while True:
            changed = self._changed.wait()  # before asking, so that no change falls between
            state = await hypervisor.state(name)
            if state.value in states:
                _drop(changed)
                return state
            if not await self._until(changed, deadline):
                return state

    async def wait_guest(self, name: str, limit_s: float) -> Guest | None:
        """The guest as soon as its agent is there and can be reached; None at the limit."""
        id = await self.id_of(name)
        deadline = self._reactor.seconds() + limit_s
        while True:
            guest = self._present(name, id)
            if guest is not None or not await self._until(self._changed.wait(), deadline):
                return guest

    async def _until(self, changed: Deferred[None], deadline: float) -> bool:
        """Whether a change came before the deadline."""
        left = deadline - self._reactor.seconds()
        if left <= 0:
            _drop(changed)
            return False
        try:
            await with_limit(self._reactor, left, "a change", changed)
        except LimitReached:
            return False
        return True

    def _present(self, name: str, id: str) -> Guest | None:
        machine = self._machines.get(name)
        if machine is not None and (machine.paused or (machine.link is not None and not machine.link.is_up)):
            return None
        guests = self._conversation.guests
        return guests.get(id) if guests.is_there(id) else None

    # Guests

    async def guest(self, name: str, limit_s: float) -> Guest:
        """The guest, waited for at most `limit_s`. Raises GuestSilent."""
        guest = await self.wait_guest(name, limit_s)
        if guest is None:
            raise GuestSilent(f"the agent in {name} has not been heard within {limit_s:g} s")
        return guest

    def link(self, name: str) -> GuestLink:
        """The link to a live VM's agent. Raises GuestSilent if there is none."""
        machine = self._machines.get(name)
        link = None if machine is None else machine.link or self._own_way(machine)
        if link is None:
            raise GuestSilent(f"there is no way for files to the agent in {name}")
        return link

    def _own_way(self, machine: _Machine) -> GuestLink | None:
        """To an agent of ours that dials the broker: it serves files at its own address, and knows the passcode."""
        guest = self._conversation.guests.get(machine.id)
        broker = self._broker()
        if guest is None or guest.protocol < 2 or not guest.ip or broker is None or not broker[3]:
            return None
        address = (guest.ip, AGENT_PORT)
        if machine.own_way is None or machine.address != address:
            machine.own_way = GuestLink(
                self._reactor, name=machine.name, address=address, secret=broker[3].encode(), broker=lambda: None
            )
            machine.address = address
        return machine.own_way

    def files(self, name: str) -> FileTransfer:
        """The way for files to and from a live VM. Raises GuestSilent."""
        return http_transfer(self.link(name))

    def secret(self) -> bytes:
        """The secret of the link; made now if HostMain was started by hand and there is none."""
        try:
            return self._secret_file.read_bytes().strip()
        except FileNotFoundError:
            fd = os.open(self._secret_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "w") as file:
                file.write(secrets.token_hex(32))
            return self._secret_file.read_bytes().strip()

    def broker_changed(self) -> None:
        """What `broker()` answers is another now."""
        for machine in self._machines.values():
            if machine.link is not None:
                machine.link.broker_changed()

    # Following the hypervisor

    def _state_changed(self, name: str, state: VmState) -> None:
        log.debug("VM %s: %s", name, state)
        self._changed.pulse()
        if not self._closing:
            eventloop.start_logged(self._follow(name), f"VM {name}")

    def _guest_changed(self, guest: Guest | None, change: Change, id: str) -> None:  # noqa: ARG002
        if guest is not None:
            for machine in self._machines.values():
                if machine.id == id:
                    self._heard(machine)
        self._changed.pulse()

    async def _follow_all(self) -> None:
        for name in await (await self.ready()).list_running():
            await self._follow(name)

    async def _follow(self, name: str) -> None:
        """Make link and registry agree with what the hypervisor says of this VM now."""
        try:
            info = await (await self.ready()).info(name)
        except VmNotFound:
            await self._leave(name)
            return
        machine = self._machines.get(name)
        if machine is None:
            machine = self._machines[name] = _Machine(name, info.mac.upper())
        await self._locked(machine, lambda: self._apply(machine, info))
        self._changed.pulse()

    async def _apply(self, machine: _Machine, _: VmInfo) -> None:
        info = await (await self.ready()).info(machine.name)  # what was true before the lock may be over
        machine.id = info.mac.upper()
        if info.state not in LIVE_STATES:
            was_live, machine.live = machine.live, False
            await self._drop_link(machine)
            self._conversation.forget_guest(machine.id)
            if was_live and info.state in OFF_STATES:
                self._conversation.commands.rolled_back(machine.id, f"the VM is {info.state}")
            return
        if not machine.live or (info.agent_address is not None and machine.address != info.agent_address):
            await self._drop_link(machine)
            machine.live = True
            self._dial(machine, info.agent_address)
        self._pause_or_resume(machine, paused=info.state is VmState.PAUSED)

    def _dial(self, machine: _Machine, address: tuple[str, int] | None) -> None:
        machine.clock_due = True
        if address is None or self._closing:
            return
        link = GuestLink(self._reactor, name=machine.name, address=address, secret=self.secret(), broker=self._broker)
        link.on_up.append(lambda: self._link_up(machine, link))
        link.on_down.append(lambda: self._link_down(machine))
        machine.link, machine.address = link, address
        link.start()

    def _pause_or_resume(self, machine: _Machine, *, paused: bool) -> None:
        if paused == machine.paused:
            return
        machine.paused = paused
        if paused:
            self._conversation.guests.vm_paused(machine.id)
            if machine.link is not None:
                machine.link.pause()
            return
        machine.clock_due = True
        if machine.link is not None:
            machine.link.resume()
            if machine.link.is_up:
                self._link_up(machine, machine.link)
        self._conversation.resumed(machine.id)

    def _heard(self, machine: _Machine) -> None:
        """A guest registered, or showed itself again: on the link of 2009 that is when its clock can be set."""
        if machine.clock_due and machine.link is None:
            way = self._own_way(machine)
            if way is not None:
                machine.clock_due = False
                eventloop.start_logged(self._set_clock(machine, way), f"clock of {machine.name}")

    def _link_up(self, machine: _Machine, link: GuestLink) -> None:
        self._changed.pulse()
        if machine.clock_due:
            machine.clock_due = False
            eventloop.start_logged(self._set_clock(machine, link), f"clock of {machine.name}")

    def _link_down(self, machine: _Machine) -> None:
        self._conversation.guests.unconfirm(machine.id)
        self._changed.pulse()

    async def _set_clock(self, machine: _Machine, link: GuestLink) -> None:
        try:
            await link.set_clock(limit=CLOCK_LIMIT_S)
            log.debug("the clock of %s is set", machine.name)
        except GuestRefused as error:
            log.warning("the clock of %s cannot be set: %s", machine.name, error)
        except LinkError as error:
            machine.clock_due = link in (machine.link, machine.own_way)  # with the next connection
            log.info("the clock of %s could not be set yet: %s", machine.name, error)

    async def _leave(self, name: str) -> None:
        """The VM is not what it was (started anew, deleted): no link, no registered guest."""
        machine = self._machines.get(name)
        if machine is not None:
            machine.live = False
            await self._locked(machine, lambda: self._drop_link(machine))
            self._conversation.forget_guest(machine.id)

    async def _rolled_back(self, name: str, why: str) -> None:
        id = await self.id_of(name)
        await self._leave(name)
        self._conversation.commands.rolled_back(id, why)
        await self._follow(name)

    async def _drop_link(self, machine: _Machine) -> None:
        link, machine.link, machine.address, machine.paused = machine.link, None, None, False
        own_way, machine.own_way = machine.own_way, None
        if own_way is not None:
            await own_way.stop()
        if link is not None:
            link.on_up.clear()
            link.on_down.clear()
            await link.stop()

    async def _locked(self, machine: _Machine, work: Callable[[], Awaitable[None]]) -> None:
        await machine.lock.acquire()
        try:
            await work()
        finally:
            machine.lock.release()


def _drop(waiting: Deferred[None]) -> None:
    waiting.addErrback(lambda failure: failure.trap(CancelledError) and None)
    waiting.cancel()
