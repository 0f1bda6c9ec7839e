"""The virtual machines of this HostMain: the hypervisor's calls, and for each live VM the link to its agent.

Owns the hypervisor, and a Machine (with the link to the agent) for each VM that was seen live. The state of a VM is the
hypervisor's, asked anew each time; what is kept here is which VMs this HostMain has started: those are saved when it
ends (endings.py).

    HypervisorError         as the driver raises it
    NotReady                the hypervisor has not been opened within the limit
    BadSpec                 a VM with such a name, or without an image, cannot be
    GuestSilent             the guest's agent is not there
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmcontrol.common import eventloop
from vmcontrol.common.atomicfile import write_atomically
from vmcontrol.common.eventloop import Event, LimitReached, TimerHandle, with_limit
from vmcontrol.guests.conversation import Conversation
from vmcontrol.guests.newvm import new_vm
from vmcontrol.guests.outputs import output_texts
from vmcontrol.guests.registry import Guest
from vmcontrol.guests.silence import PERIOD_S
from vmcontrol.guests.vm import Machine
from vmcontrol.guests.waiting import wait_until
from vmcontrol.hypervisors.interface import HostProblem, Hypervisor, HypervisorError, SpecRefused, VmNotFound
from vmcontrol.link.errors import LinkDown
from vmcontrol.protocol.vm import LIVE_STATES, PortForward, VmSettings, VmState
from vmcontrol.protocol.xmltext import LongText
from vmcontrol.transfer.chirp import CHIRP_PORT, ChirpPrograms, ChirpTransfer
from vmcontrol.transfer.diskroom import DiskRoom
from vmcontrol.transfer.http import HttpTransfer
from vmcontrol.transfer.interface import FileTransfer

if TYPE_CHECKING:
    from vmcontrol.common.clock import PausableClock
    from vmcontrol.link.dialler import Broker, GuestLink

log = logging.getLogger(__name__)

PASSING_STATES = frozenset({VmState.STARTING, VmState.SAVING, VmState.RESTORING, VmState.STOPPING})
READY_LIMIT_S = 60.0
"""Seconds for the hypervisor to be opened (a VirtualBox service that starts, an accelerator that is tried)."""


class NotReady(Exception):  # noqa: N818
    """The hypervisor is not there yet."""


class GuestSilent(Exception):  # noqa: N818
    """The guest's agent is not there."""


class Machines:
    """All VMs. Methods that only ask the hypervisor are called on `await ready()`."""

    def __init__(
        self,
        reactor: Any,
        *,
        conversation: Conversation,
        secret_file: Path,
        broker: Callable[[], Broker | None],
        password: str = "",
        chirp: ChirpPrograms | None = None,
        slot: Path,
        standalone: bool = False,
        disk_bound: int = 0,
    ) -> None:
        """password: of the broker, if HostConfig.cfg names it. chirp: files go by Chirp, with these programs.
        standalone: links below the slot are followed when files are copied. disk_bound: bytes of the job; 0: none."""
        self._reactor = reactor
        self._conversation = conversation
        self._secret_file = secret_file
        self._broker = broker
        self._password = password.encode()
        self._chirp = chirp
        self._slot = slot
        self._guarded = None if standalone else slot
        self._room = DiskRoom(slot, disk_bound)
        self._hypervisor: Hypervisor | None = None
        self._failure: Exception | None = None
        self._opened = Event()
        self._changed = Event()
        self._looked = Event()
        self._next_look: TimerHandle | None = None
        self._snapshotting: set[str] = set()
        self._machines: dict[str, Machine] = {}
        self._ours: set[str] = set()
        self._closing = False

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
            except HostProblem:
                raise
            except HypervisorError as error:  # deleted meanwhile, or damaged: the others have their names all the same
                log.info("the id of %s is not known: %s", name, error)
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

    async def create(self, name: str, image: str, settings: VmSettings) -> None:
        """Make a VM of this slot. image: a file, relative to the slot. Raises BadSpec, VmExists, SpecRefused."""
        spec = new_vm(self._slot, name, image, settings, self._secret_file, self._needed_forwards)
        self.secret()  # there must be one before a guest looks for it
        hypervisor = await self.ready()
        if spec.network_mode == "hostonly" and not hypervisor.capabilities.host_only_network:
            raise SpecRefused(f"network_mode: {hypervisor.name} has no host-only network")
        await hypervisor.create(spec)

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

    async def save_snapshot(self, name: str, snapshot: str, description: str) -> None:
        """The guest stood still meanwhile, and nothing says so to it: its clock is set after that."""
        hypervisor = await self.ready()
        self._snapshotting.add(name)
        try:
            await hypervisor.save_snapshot(name, snapshot, description)
        finally:
            self._snapshotting.discard(name)
            machine = self._machines.get(name)
            if machine is not None:
                machine.stood_still()

    async def restore_snapshot(self, name: str, snapshot: str | None) -> None:
        await (await self.ready()).restore_snapshot(name, snapshot)
        log.info("VM %s: taken back to %s", name, snapshot or "its current snapshot")
        await self._rolled_back(name, "the VM was taken back to a snapshot")

    async def take(self, name: str) -> None:
        """Use a VM that was there before us; one that runs is ours to end from now on."""
        hypervisor = await self.ready()
        await hypervisor.take(name)
        if await hypervisor.state(name) in LIVE_STATES:
            self._ours.add(name)

    async def release(self, name: str) -> None:
        """It is not needed any more: left as it was found."""
        await (await self.ready()).release(name)
        self._ours.discard(name)
        log.info("VM %s: released", name)
        await self._follow(name)

    async def delete(self, name: str) -> None:
        hypervisor = await self.ready()
        try:
            id = await self.id_of(name)
        except HypervisorError:  # there is none, or what is remembered of it cannot be read
            id = ""
        await hypervisor.delete(name)
        await self._leave(name)
        self._machines.pop(name, None)
        self._ours.discard(name)
        if id:
            self._conversation.commands.rolled_back(id, "the VM was deleted")
        log.info("VM %s: deleted", name)

    @property
    def ours(self) -> list[str]:
        """The VMs that this HostMain has started or found running: it ends them when it ends."""
        return sorted(self._ours)

    async def state(self, name: str) -> VmState:
        return await (await self.ready()).state(name)

    async def trouble(self, name: str) -> str:
        """Why it is Aborted or Stuck, as far as known."""
        return (await (await self.ready()).info(name)).trouble

    async def close(self) -> None:
        """Links and hypervisor. VMs are not touched."""
        self._closing = True
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        for name in list(self._machines):
            await self._leave(name)
        if self._hypervisor is not None:
            await self._hypervisor.close()

    # Waiting

    async def wait_state(self, name: str, states: list[str], limit_s: float) -> VmState:
        """The state as soon as it is one of these, or at the limit."""
        hypervisor = await self.ready()
        is_one = lambda state: state.value in states  # noqa: E731
        return await wait_until(self._reactor, self._changed, lambda: hypervisor.state(name), is_one, limit_s)

    async def wait_guest(self, name: str, limit_s: float) -> Guest | None:
        """The guest as soon as its agent is there and can be reached; None at the limit."""
        id = await self.id_of(name)

        async def look() -> Guest | None:
            return self._present(name, id)

        return await wait_until(self._reactor, self._changed, look, lambda guest: guest is not None, limit_s)

    async def wait_silent(self, name: str, silent_s: float, limit_s: float) -> float:
        """Seconds of silence of the guest that count, as soon as they are `silent_s`, or at the limit."""

        async def look() -> float:
            machine = self._machines.get(name)
            return 0.0 if machine is None else machine.silent_s

        return await wait_until(self._reactor, self._looked, look, lambda silent: silent >= silent_s, limit_s)

    async def answers(self, name: str, limit_s: float, *, dial_anew: bool) -> bool:
        """Whether the guest answers within the limit. dial_anew: over a new connection."""
        machine = self._machines.get(name)
        if dial_anew and machine is not None:
            machine.dial_anew()
        began = self._reactor.seconds()
        if await self.wait_guest(name, limit_s) is None:
            return False
        try:
            await self._conversation.ping(await self.id_of(name), max(1.0, limit_s - self._reactor.seconds() + began))
        except LimitReached:
            return False
        return True

    def _look_for_silence(self) -> None:
        """Every PERIOD_S while a VM is live."""
        self._next_look = None
        for name, machine in self._machines.items():
            if machine.is_live:
                if name in self._snapshotting:
                    machine.cannot_speak()
                else:
                    machine.look_for_silence()
                self._go_on_looking()
        self._looked.pulse()

    def _go_on_looking(self) -> None:
        if self._next_look is None and not self._closing:
            self._next_look = self._reactor.callLater(PERIOD_S, self._look_for_silence)

    def _present(self, name: str, id: str) -> Guest | None:
        machine = self._machines.get(name)
        if machine is not None:
            return machine.guest()
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
        link = None if machine is None else machine.link
        if link is None:
            raise GuestSilent(
                f"there is no way for files to the agent in {name} "
                "(an agent of protocol 1 has Chirp's: [Host] chirp_path)"
            )
        return link

    def is_dialled(self, id: str) -> bool:
        """Whether HostMain dials this guest, so that what is in it can be fetched."""
        machine = self._of_guest(id)
        return machine is not None and machine.dialled

    def clock_of(self, id: str) -> PausableClock | None:
        """Stands still while the guest's VM is paused. None: of a guest in no VM of ours."""
        machine = self._of_guest(id)
        return None if machine is None else machine.clock

    def _of_guest(self, id: str) -> Machine | None:
        return next((machine for machine in self._machines.values() if machine.id == id), None)

    async def output_texts(self, id: str, result: Mapping[str, Any]) -> dict[str, LongText]:
        """The texts of a command's outputs, which are files in the guest. Raises LinkDown."""
        machine = self._of_guest(id)
        if machine is None or machine.link is None:
            raise LinkDown(f"there is no way to the agent of {id}")
        return await output_texts(machine.link, result)

    def files(self, name: str) -> FileTransfer:
        """The way for files to and from a live VM. Raises GuestSilent."""
        if self._chirp is None:
            return HttpTransfer(self.link(name), self._guarded, self._room)
        machine = self._machines.get(name)
        address = None if machine is None else machine.address_of(CHIRP_PORT)
        if machine is None or address is None:
            raise GuestSilent(f"there is no way for files to {name}: its agent has not told an address")
        return ChirpTransfer(
            self._reactor,
            machine.clock,
            address=address,
            programs=self._chirp,
            base=machine.base_folder,
            slot=self._guarded,
            room=self._room,
        )

    @property
    def _needed_forwards(self) -> tuple[PortForward, ...]:
        """Ports of a guest behind NAT that have to be reached besides the agent's."""
        return () if self._chirp is None else (PortForward(CHIRP_PORT),)

    def secret(self) -> bytes:
        """The link's secret; made now if HostMain was started standalone and there is none. Raises HypervisorError."""
        try:
            found = self._secret_file.read_bytes().strip()
        except FileNotFoundError:
            found = secrets.token_hex(32).encode()
            write_atomically(self._secret_file, found, mode=0o600)
        if not found:  # who has none could be imitated by anybody, and guests were not made with it
            raise HypervisorError(f"{self._secret_file}, the secret of the link to guests, is empty: remove it")
        return found

    def broker_changed(self) -> None:
        """What `broker()` answers is another now."""
        for machine in self._machines.values():
            machine.broker_changed()

    # Following the hypervisor

    def _state_changed(self, name: str, state: VmState) -> None:
        log.debug("VM %s: %s", name, state)
        self._changed.pulse()
        if not self._closing:
            eventloop.start_logged(self._follow(name), f"VM {name}")

    def guest_changed(self, guest: Guest | None, id: str) -> None:
        """A guest registered, showed itself again, or went (None)."""
        if guest is not None:
            for machine in self._machines.values():
                if machine.id == id:
                    machine.heard()
        self._changed.pulse()

    async def _follow_all(self) -> None:
        """VMs of this slot that an earlier HostMain has left running are ours to end, too."""
        hypervisor = await self.ready()
        for name in await hypervisor.list_running():
            await self._follow(name)
            try:
                if (await hypervisor.info(name)).made_here:
                    self._ours.add(name)
            except VmNotFound:  # it has ended meanwhile
                continue

    async def _follow(self, name: str) -> None:
        """Make link and registry agree with what the hypervisor says of this VM now."""
        try:
            info = await (await self.ready()).info(name)
        except VmNotFound:
            await self._leave(name)
            return
        machine = self._machines.get(name)
        if machine is None:
            machine = self._machines[name] = Machine(
                self._reactor,
                info,
                conversation=self._conversation,
                secret=self.secret,
                broker=self._broker,
                password=self._password,
                changed=self._changed.pulse,
            )
        await machine.lock.run(lambda: eventloop.start(self._catch_up(machine)))
        if machine.is_live:
            self._go_on_looking()
        self._changed.pulse()

    async def _catch_up(self, machine: Machine) -> None:
        if not self._closing:
            # asked anew: what was true before the lock may be over
            await machine.follow(await (await self.ready()).info(machine.name))

    async def _leave(self, name: str) -> None:
        machine = self._machines.get(name)
        if machine is not None:
            await machine.lock.run(lambda: eventloop.start(machine.leave()))

    async def _rolled_back(self, name: str, why: str) -> None:
        id = await self.id_of(name)
        await self._leave(name)
        self._conversation.commands.rolled_back(id, why)
        await self._follow(name)
