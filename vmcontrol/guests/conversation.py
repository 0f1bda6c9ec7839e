"""What is said over the broker: STOMP messages in and out, sorted to the registry of guests and the table of commands.

Owns our client of the broker, the subscriptions and the pings under way. Decides nothing about VMs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from twisted.internet.defer import Deferred, fail

from vmcontrol.common import eventloop
from vmcontrol.common.eventloop import Clock, LimitReached, TimerHandle, with_limit
from vmcontrol.common.logthrottle import LogThrottle
from vmcontrol.guests.commands import Commands
from vmcontrol.guests.fetches import Fetch
from vmcontrol.guests.registry import Change, Guest, Guests
from vmcontrol.protocol.command import CommandStatus
from vmcontrol.protocol.messages import (
    CONNECTIONS,
    RESPONSES,
    Bye,
    CommandForgotten,
    CommandResult,
    CommandTable,
    Hello,
    Message,
    Ping,
    Pong,
    StillAlive,
    StompMessage,
    decode,
    encode,
)
from vmcontrol.protocol.text import BadMessage

log = logging.getLogger(__name__)

PING_AGAIN_S, PING_AGAIN_MOST_S = 1.0, 16.0
"""A ping may be lost; another is sent while the caller waits, each time after twice the pause: what is sent to one
guest goes to all that share the broker, and a broker that is slow because of that must not get more of it."""

OnGuest = Callable[[Guest | None, str], None]
"""Gets a guest that registered or showed itself again (None: it went), and its id."""
OnBroker = Callable[[bool, str], None]
"""Gets True when the broker is connected; False and the reason when it is lost."""


class BrokerClient(Protocol):
    """Our way to the broker: over STOMP (link.stompclient), or in the process (broker.inprocess)."""

    on_connected: Callable[[], None] | None
    on_disconnected: Callable[[str], None] | None

    @property
    def connected(self) -> bool: ...
    def subscribe(self, destination: str, handler: Callable[[Mapping[str, str], str], None]) -> None: ...
    def send(self, message: StompMessage) -> Deferred[None]: ...
    def close(self) -> Deferred[None]: ...


class Conversation:
    """HostMain's side of the talk with all guests."""

    def __init__(self, reactor: Any, *, grace_s: float, on_broker: OnBroker, on_guest: OnGuest, fetch: Fetch) -> None:
        """fetch: the way to outputs of commands, which are files in the guest."""
        self.clock: Clock = reactor
        self.guests = Guests(grace_s)
        self.commands = Commands(reactor, self.send, fetch)
        self._on_broker = on_broker
        self._on_guest = on_guest
        self._pings: dict[tuple[str, str], Deferred[None]] = {}
        self._last_ping_ms = 0
        self._dropped = LogThrottle(log, self.clock.seconds)
        self._expiry: TimerHandle | None = None
        self._was_connected = False
        self._client: BrokerClient | None = None
        """None until `use`."""

    @property
    def connected(self) -> bool:
        return self._client is not None and self._client.connected

    def use(self, client: BrokerClient) -> None:
        """Talk over this client from now on. The caller connects it then."""
        self._client = client
        client.on_connected, client.on_disconnected = self._connected, self._disconnected
        client.subscribe(CONNECTIONS, self.received)
        client.subscribe(RESPONSES, self.received)

    def send(self, message: Message) -> Deferred[None]:
        """Hand a message to the broker. Errback: not connected, or too much waits."""
        try:
            encoded = encode(message)
        except ValueError:
            return fail()
        if self._client is None:
            return fail(ConnectionError("the broker has not been connected yet"))
        return self._client.send(encoded)

    async def ping(self, id: str, limit_s: float) -> None:
        """Returns when the guest has answered. Raises LimitReached."""
        answered: Deferred[None] = Deferred()
        stamps: list[str] = []

        timers: list[TimerHandle] = []

        def send(pause: float = PING_AGAIN_S) -> None:
            timers[:] = [self.clock.callLater(pause, send, min(PING_AGAIN_MOST_S, pause * 2))]
            stamp = self._stamp()
            stamps.append(stamp)
            self._pings[id, stamp] = answered
            self.send(Ping(id, stamp)).addErrback(lambda failure: log.debug("ping: %s", failure.getErrorMessage()))

        send()
        try:
            await with_limit(self.clock, limit_s, f"ping of {id}", answered)
        finally:
            timers[0].cancel()
            for stamp in stamps:
                self._pings.pop((id, stamp), None)

    async def confirm(self, id: str, limit_s: float) -> None:
        """Have a guest that is registered show that it is still there; nothing happens if it does not."""
        try:
            await self.ping(id, limit_s)
        except LimitReached:
            log.info("guest %s has not answered for %g s since it was resumed", id, limit_s)

    def forget_guest(self, id: str) -> None:
        """Its VM is not live any more."""
        if self.guests.vm_gone(id):
            self._on_guest(None, id)
        self._expire()

    async def close(self) -> None:
        """End the connection; whoever waits for a guest gets Dropped."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        self.commands.close()
        if self._client is not None:
            await self._client.close()

    def _stamp(self) -> str:
        """Whole milliseconds, each only once: ActiveMQ drops the connection on a fraction."""
        self._last_ping_ms = max(int(time.time() * 1000), self._last_ping_ms + 1)
        return str(self._last_ping_ms)

    def _connected(self) -> None:
        self._was_connected = True
        self._on_broker(True, "")
        self.commands.way_is_open()

    def _disconnected(self, reason: str) -> None:
        was, self._was_connected = self._was_connected, False
        if was:
            self._on_broker(False, reason)

    def received(self, headers: Mapping[str, str], body: str) -> None:
        """A message came. What is none of ours is logged and dropped."""
        try:
            message = decode(headers, body, by_hostmain=True)
        except BadMessage as error:
            self._dropped.warning("dropped: %s", error)
            return
        now = self.clock.seconds()
        match message:
            case Hello(id) | StillAlive(id) | Bye(id):
                self._changed(self.guests.heard(message, now), id)
            case Pong(sender, timestamp):
                self._changed(self.guests.sign_of_life(sender, now), sender)
                answered = self._pings.pop((sender, timestamp), None)
                if answered is not None and not answered.called:
                    answered.callback(None)
            case CommandResult(_, sender) | CommandStatus(_, sender) | CommandForgotten(sender) | CommandTable(sender):
                self._changed(self.guests.sign_of_life(sender, now), sender)
                self.commands.heard(message)
            case _:
                self._dropped.warning("dropped: %s is not for a host", type(message).__name__)

    def _changed(self, change: Change, id: str) -> None:
        if change is not Change.NONE:
            guest = self.guests.get(id)
            if change is Change.REGISTERED and guest is not None:
                log.info("guest %s is there (address %s, protocol %d %s)", id, guest.ip, guest.protocol, guest.agent)
            elif change is Change.GONE:
                log.info("guest %s said good-bye", id)
            if guest is not None:
                self.commands.guest_is_back(guest)
            self._on_guest(guest, id)
        if self._expiry is None:
            self._expire()

    def _expire(self) -> None:
        """Warn about silent guests, drop dead ones, and set the timer for the next."""
        if self._expiry is not None and self._expiry.active():
            self._expiry.cancel()
        self._expiry = None
        now = self.clock.seconds()
        to_warn, dropped = self.guests.expire(now)
        for guest in to_warn:
            log.warning("guest %s has not been heard for %.0f s", guest.id, now - guest.heard_at)
        for guest in dropped:
            log.warning("guest %s is gone: not heard for %.0f s", guest.id, now - guest.heard_at)
            self._on_guest(None, guest.id)
        deadline = self.guests.next_deadline()
        if deadline is not None:
            # beacons move the deadline on without touching the timer; a little later than due is early enough
            self._expiry = self.clock.callLater(max(0.05, deadline - now), self._expire)

    def resumed(self, id: str) -> None:
        """Its VM was unpaused: beacons count again, and it is asked to show itself."""
        self.guests.vm_unpaused(id, self.clock.seconds())
        self._expire()
        if self.guests.get(id) is not None:
            eventloop.start_logged(self.confirm(id, 60.0), f"ping of {id}")
