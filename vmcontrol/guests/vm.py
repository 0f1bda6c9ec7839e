"""One virtual machine as HostMain sees it: the link to its agent follows what the hypervisor says of the VM.

Owns the VM's GuestLink, and whether the guest's clock is due to be set. Never asks or changes the hypervisor: `follow`
is told its state. The callers keep `follow` and `leave` of one VM one after the other (`lock`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import DeferredLock

from vmcontrol.common import eventloop
from vmcontrol.common.clock import PausableClock
from vmcontrol.guests import runqueue
from vmcontrol.guests.conversation import Conversation
from vmcontrol.guests.registry import Guest
from vmcontrol.guests.silence import Silence
from vmcontrol.link.errors import GuestRefused, LinkError
from vmcontrol.protocol.handshake import AGENT_PORT
from vmcontrol.protocol.vm import LIVE_STATES, VmInfo, VmState

if TYPE_CHECKING:
    from vmcontrol.link.dialler import Broker, GuestLink

log = logging.getLogger(__name__)

OFF_STATES = frozenset({VmState.POWERED_OFF, VmState.ABORTED})
SPEAKING_STATES = frozenset({VmState.RUNNING, VmState.PAUSED})
CLOCK_LIMIT_S = 30.0
PATH_LIMIT = 4096
"""Characters of the folder that a guest names as its own."""
CLOCK_TRIES, CLOCK_PAUSE_S = 5, 1.0
"""A guest that was resumed under load may be slow to show the new time."""


class Machine:
    """A VM that was seen live."""

    def __init__(
        self,
        reactor: Any,
        info: VmInfo,
        *,
        conversation: Conversation,
        secret: Callable[[], bytes],
        broker: Callable[[], Broker | None],
        password: bytes,
        changed: Callable[[], None],
    ) -> None:
        """secret: of the dialled link. broker: what agents are told of it. changed: called when `guest` may differ.

        password: the broker's that both configuration files of protocol 1 name; empty: they name none.
        """
        self.name = info.name
        self.id = info.mac.upper()
        self.lock = DeferredLock()
        self._reactor = reactor
        self._conversation = conversation
        self._secret = secret
        self._broker = broker
        self._password = password
        self._changed = changed
        self._live = False
        self._paused = False
        self._clock_due = False
        self.clock = PausableClock(reactor)
        """Stands still while the VM does: paused, or held up by a full disk."""
        self._forwards: Mapping[int, int] = {}
        self._link: GuestLink | None = None
        self._address: tuple[str, int] | None = None
        self._silence = Silence()
        self._spoke_at: float | None = None
        self._pid: int | None = None
        self._speaks = False
        """The VM runs, or stands with our clock of it, so that its guest says something while that clock goes."""
        self._own_way: GuestLink | None = None
        """To the address that an agent of ours on the link of protocol 1 has named: for files, without a carrier."""

    # What the hypervisor says

    async def follow(self, info: VmInfo) -> None:
        """Make link and registry agree with this state of the VM."""
        self.id = info.mac.upper()
        self._forwards = info.forwards
        self._pid, self._speaks = info.pid, info.state in SPEAKING_STATES
        if info.state not in LIVE_STATES:
            was_live = self._live
            await self.leave()
            if was_live and info.state in OFF_STATES:
                self._conversation.commands.rolled_back(self.id, f"the VM is {info.state}")
            return
        if not self._live or (info.agent_address is not None and self._address != info.agent_address):
            await self._drop_link()
            self._live = self._clock_due = True
            self._silence = Silence()
            self._dial(info.agent_address, info.link_token)
        self._pause_or_resume(paused=info.state is VmState.PAUSED or info.resumable)

    async def leave(self) -> None:
        """The VM is not what it was (ended, started anew, deleted): no link, no registered guest."""
        self._live = False
        await self._drop_link()
        self._conversation.forget_guest(self.id)

    def stood_still(self) -> None:
        """The VM was stopped for a moment without having been paused: its clock is behind by that."""
        self._silence.stood()
        if not self._live or self._paused:
            return  # it will be set when the VM goes on
        self._clock_due = True
        if self._link is not None and self._link.is_up:
            self._start_clock(self._link)

    # The guest

    @property
    def is_live(self) -> bool:
        return self._live

    @property
    def silent_s(self) -> float:
        """Seconds for which the agent has given no sign of life although the VM was let run."""
        self._listen()
        return self._silence.seconds

    def _listen(self) -> None:
        guest = self._conversation.guests.get(self.id)
        if guest is not None and guest.spoke_at != self._spoke_at:
            self._spoke_at = guest.spoke_at
            self._silence.heard()

    def look_for_silence(self) -> None:
        """To be called every PERIOD_S of vmcontrol.guests.silence."""
        self._listen()
        if self._speaks:
            self._silence.sample(runqueue.sample(self.clock.seconds(), self._pid))
        else:
            self._silence.stood()

    def cannot_speak(self) -> None:
        """Now, though the hypervisor calls it running: a snapshot of it is being taken."""
        self._silence.stood()

    def dial_anew(self) -> None:
        """The agent does not answer over the connections that there are: drop them and dial."""
        if self._link is not None:
            self._link.renew()

    @property
    def link(self) -> GuestLink | None:
        """A way for requests to the agent; None if there is none."""
        return self._link or self._way_of_protocol_1()

    @property
    def dialled(self) -> bool:
        """HostMain reaches the agent by itself; on the link of protocol 1 the agent comes to the broker."""
        return self._link is not None

    def address_of(self, port: int) -> tuple[str, int] | None:
        """Where a port of the guest is reached: by its forward, else at the address that the agent has told."""
        if port in self._forwards:
            return "127.0.0.1", self._forwards[port]
        guest = self._conversation.guests.get(self.id)
        return (guest.ip, port) if guest is not None and guest.ip else None

    async def base_folder(self) -> str:
        """The folder of the guest in which names of files begin; empty: not known (an agent of protocol 1)."""
        link = self.link
        if link is None:
            return ""
        try:
            said = (await link.status()).get("base_folder")
        except LinkError as error:
            log.info("the base folder of %s is not known: %s", self.name, error)
            return ""
        return said if isinstance(said, str) and len(said) < PATH_LIMIT else ""

    def guest(self) -> Guest | None:
        """The guest, if its agent was heard since the VM was last started or unpaused, and can be reached."""
        if self._paused or (self._link is not None and not self._link.is_up):
            return None
        guests = self._conversation.guests
        return guests.get(self.id) if guests.is_there(self.id) else None

    def broker_changed(self) -> None:
        """What `broker` answers is another now."""
        if self._link is not None:
            self._link.broker_changed()

    def heard(self) -> None:
        """The guest registered, or showed itself again: on the link of protocol 1 that is when its clock can be set."""
        if self._clock_due and self._link is None:
            way = self._way_of_protocol_1()
            if way is not None:
                self._start_clock(way)

    def _way_of_protocol_1(self) -> GuestLink | None:
        """To an agent of ours that dials the broker: it serves files at its own address, and knows the passcode."""
        guest, address = self._conversation.guests.get(self.id), self.address_of(AGENT_PORT)
        if guest is None or guest.protocol < 2 or address is None or not self._password:
            return None
        if self._own_way is None or self._address != address:
            from vmcontrol.link.dialler import GuestLink

            self._own_way = GuestLink(
                self._reactor, name=self.name, address=address, secret=self._password, broker=lambda: None
            )
            self._address = address
        return self._own_way

    # The link

    def _dial(self, address: tuple[str, int] | None, token: str) -> None:
        if address is None:
            return
        from vmcontrol.link.dialler import GuestLink  # late: the VM's start comes before what it is talked to with

        link = GuestLink(
            self._reactor,
            name=self.name,
            address=address,
            secret=self._secret(),
            broker=self._broker,
            token=token.encode("ascii"),
            guest=self.id,
        )
        link.on_up.append(lambda: self._link_up(link))
        link.on_down.append(self._link_down)
        self._link, self._address = link, address
        link.start()

    async def _drop_link(self) -> None:
        ways = [self._link, self._own_way]
        self._link = self._own_way = self._address = None
        self._paused = False
        self.clock.resume()
        for way in ways:
            if way is not None:
                way.on_up.clear()
                way.on_down.clear()
                await way.stop()

    def _pause_or_resume(self, *, paused: bool) -> None:
        if paused == self._paused:
            return
        self._paused = paused
        if paused:
            self.clock.pause()
            self._conversation.guests.vm_paused(self.id)
            if self._link is not None:
                self._link.pause()
            return
        self.clock.resume()
        self._clock_due = True
        if self._link is not None:
            self._link.resume()
            if self._link.is_up:
                self._start_clock(self._link)
        self._conversation.resumed(self.id)

    def _link_up(self, link: GuestLink) -> None:
        self._changed()
        if self._clock_due:
            self._start_clock(link)

    def _link_down(self) -> None:
        self._conversation.guests.unconfirm(self.id)
        self._changed()

    def _start_clock(self, way: GuestLink) -> None:
        self._clock_due = False
        eventloop.start_logged(self._set_clock(way), f"clock of {self.name}")

    async def _set_clock(self, way: GuestLink) -> None:
        """Try a few times over this connection; what is not done then is due with the next."""
        for _ in range(CLOCK_TRIES):
            try:
                await way.set_clock(limit=CLOCK_LIMIT_S)
            except GuestRefused as error:
                log.info("the clock of %s is not set: %s", self.name, error)
            except LinkError as error:
                self._clock_due = way in (self._link, self._own_way)
                log.info("the clock of %s could not be set yet: %s", self.name, error)
                return
            else:
                log.debug("the clock of %s is set", self.name)
                return
            await eventloop.sleep(way.clock, CLOCK_PAUSE_S)
            if way not in (self._link, self._own_way):
                return
        log.warning("the clock of %s cannot be set", self.name)
