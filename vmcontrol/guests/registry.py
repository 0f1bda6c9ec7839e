"""Which guests are there: a pure registry fed with beacons and the time. Opens nothing, sends nothing.

A guest is known by its id (MAC, upper case with colons). It is warned about `grace` seconds after its last sign of
life and dropped after 1.5 times that, as in 2009; a guest whose VM is paused is not dropped.

Being registered says that the agent was heard since its VM last started: `vm_gone` forgets it. After an unpause the
guest stays registered but is unconfirmed until it is heard (it may have been dropped by the broker meanwhile).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum

from vmcontrol.common.logthrottle import Bucket, Rate
from vmcontrol.protocol.messages import Bye, Hello, StillAlive

DROP_FACTOR = 1.5
"""Of the grace: the original's second limit."""
GUEST_LIMIT = 1000
"""Guests that are kept; whoever may speak on the broker could otherwise fill the memory with ids."""
CHANGES_OF_ONE, CHANGES_OF_ALL = Rate(20, 2.0), Rate(2 * GUEST_LIMIT, 0.02)
"""How often guests may come and go: each time others are told, and requests are sent anew. More is not heard."""
ADDRESS_LIMIT, TEXT_LIMIT = 64, 200
"""Characters kept of what a guest says about itself."""


@dataclass(slots=True)
class Guest:
    """A guest that was heard."""

    id: str
    ip: str
    protocol: int
    """1: an agent of protocol 1. 2: ours (vmcontrol.protocol.messages.PROTOCOL)."""
    agent: str
    registered_at: float
    heard_at: float
    """Clock seconds of the last sign of life."""
    confirmed: bool = True
    """Heard since its VM was last started or unpaused."""
    warned: bool = False
    paused: bool = False
    spoke_at: float = 0.0
    """Clock seconds of the last sign of life, and of nothing else: an unpause moves `heard_at`."""


class Change(Enum):
    """What a message did to the registry."""

    NONE = "none"
    REGISTERED = "registered"
    """New, or said HELLO again: it has a new connection, and may be another agent than before."""
    CONFIRMED = "confirmed"
    """Heard again after an unpause, or after a warning."""
    GONE = "gone"


class Guests:
    """The registry."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._guests: dict[str, Guest] = {}
        self._changes: OrderedDict[str, Bucket] = OrderedDict()
        self._all_changes = Bucket(CHANGES_OF_ALL, 0.0)

    def __len__(self) -> int:
        return len(self._guests)

    def get(self, id: str) -> Guest | None:
        return self._guests.get(id)

    def all(self) -> list[Guest]:
        return list(self._guests.values())

    def is_there(self, id: str) -> bool:
        """Registered, and heard since its VM was last started or unpaused."""
        guest = self._guests.get(id)
        return guest is not None and guest.confirmed

    def heard(self, message: Hello | StillAlive | Bye, now: float) -> Change:
        """A message on /topic/connections. A beacon of an unknown guest registers it, as HELLO does."""
        known = self._guests.get(message.id)
        if isinstance(message, Bye):
            if known is None or not self._may_change(message.id, now):
                return Change.NONE
            del self._guests[message.id]
            return Change.GONE
        if known is not None and isinstance(message, StillAlive):
            known.ip, known.protocol = message.ip[:ADDRESS_LIMIT], message.protocol
            return self._alive(known, now)
        if known is None and len(self._guests) >= GUEST_LIMIT:
            return Change.NONE
        if not self._may_change(message.id, now):
            return Change.NONE if known is None else self._alive(known, now)
        self._guests[message.id] = Guest(
            id=message.id,
            ip=message.ip[:ADDRESS_LIMIT],
            protocol=message.protocol,
            agent=message.agent[:TEXT_LIMIT],
            registered_at=now,
            heard_at=now,
            spoke_at=now,
            confirmed=known is None or not known.paused,
            paused=known is not None and known.paused,  # it was on its way when the VM was paused
        )
        return Change.REGISTERED

    def _may_change(self, id: str, now: float) -> bool:
        own = self._changes.setdefault(id, Bucket(CHANGES_OF_ONE, now))
        self._changes.move_to_end(id)
        if len(self._changes) > GUEST_LIMIT:
            self._changes.popitem(last=False)
        return own.take(now) and self._all_changes.take(now)

    def sign_of_life(self, id: str, now: float) -> Change:
        """Any other message of a guest (PONG, an answer about a command). Unknown guests stay unknown."""
        guest = self._guests.get(id)
        return Change.NONE if guest is None else self._alive(guest, now)

    def _alive(self, guest: Guest, now: float) -> Change:
        if guest.paused:
            return Change.NONE  # said before that
        news = not guest.confirmed or guest.warned
        guest.heard_at = guest.spoke_at = now
        guest.confirmed, guest.warned = True, False
        return Change.CONFIRMED if news else Change.NONE

    def vm_paused(self, id: str) -> None:
        """Its VM stands still: no beacons are expected."""
        guest = self._guests.get(id)
        if guest is not None:
            guest.paused, guest.confirmed = True, False

    def unconfirm(self, id: str) -> None:
        """The way to it broke: it counts as there when it is heard again."""
        guest = self._guests.get(id)
        if guest is not None:
            guest.confirmed = False

    def vm_unpaused(self, id: str, now: float) -> None:
        """Beacons are expected from now on; the guest counts as there when it is heard."""
        guest = self._guests.get(id)
        if guest is not None and guest.paused:
            guest.paused, guest.confirmed, guest.heard_at = False, False, now

    def vm_gone(self, id: str) -> bool:
        """Its VM is not live, or was started anew: what was registered is not there any more. True if it was."""
        return self._guests.pop(id, None) is not None

    def expire(self, now: float) -> tuple[list[Guest], list[Guest]]:
        """(guests to warn about now, guests that were dropped now)."""
        to_warn: list[Guest] = []
        dropped: list[Guest] = []
        for guest in list(self._guests.values()):
            silent = now - guest.heard_at
            if guest.paused or silent < self._grace_s:
                continue
            if silent >= self._grace_s * DROP_FACTOR:
                del self._guests[guest.id]
                dropped.append(guest)
            elif not guest.warned:
                guest.warned = True
                to_warn.append(guest)
        return to_warn, dropped

    def next_deadline(self) -> float | None:
        """Clock seconds at which `expire` has something to do; None: never."""
        deadlines = [
            guest.heard_at + self._grace_s * (DROP_FACTOR if guest.warned else 1.0)
            for guest in self._guests.values()
            if not guest.paused
        ]
        return min(deadlines, default=None)
