"""Who this guest is: MAC (its id) and IP of one network card, asked of netifaces. Waits for the card to come up.

Which card: the one named in SMBIOS (by name or MAC), else in VMConfig.cfg, else the only one that is not the loopback.
On the default link the MAC is enough; with protocol 1, where the guest dials the broker, it needs an address.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vmcontrol.common import eventloop

log = logging.getLogger(__name__)

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 2.0
"""Between two looks at the cards. The kernel could tell (netlink); a look costs less than the code for that."""

_NO_MAC = "00:00:00:00:00:00"


@dataclass(frozen=True, slots=True)
class Identity:
    """id: MAC, upper case with colons. ip: dotted IPv4, empty while the card has none."""

    id: str
    ip: str
    interface: str


@dataclass(frozen=True, slots=True)
class Card:
    """A network card as the system shows it."""

    name: str
    mac: str
    ips: tuple[str, ...]

    @property
    def loopback(self) -> bool:
        return self.mac in {"", _NO_MAC} or self.name == "lo"


CardSource = Callable[[], list[Card]]


def cards() -> list[Card]:
    """The cards of this system, by netifaces."""
    import netifaces  # late: start-up time

    found = []
    for name in netifaces.interfaces():
        try:
            addresses: Mapping[int, list[dict[str, Any]]] = netifaces.ifaddresses(name)
        except (ValueError, OSError):
            continue  # went away meanwhile
        links = [entry.get("addr", "") for entry in addresses.get(netifaces.AF_LINK, [])]
        ips = [entry.get("addr", "") for entry in addresses.get(netifaces.AF_INET, [])]
        found.append(Card(name, next(filter(None, links), "").upper(), tuple(filter(None, ips))))
    return found


def choose(found: list[Card], *, named_by_host: str, configured: str) -> Card | str:
    """The card that is this guest's identity, or why there is none yet."""
    wanted = named_by_host or configured
    if wanted:
        mac = wanted.upper().replace("-", ":")
        for card in found:
            if wanted == card.name or mac == card.mac:
                return card if card.mac else f"network interface {wanted} has no MAC"
        there = ", ".join(card.name for card in found) or "none"
        return f"network interface {wanted} is not there (there: {there})"
    others = sorted((card for card in found if not card.loopback), key=lambda card: card.name)
    if len(others) == 1:
        return others[0]
    if not others:
        return "no network interface but the loopback"
    names = ", ".join(card.name for card in others)
    return f"several network interfaces ({names}): [VM] network_interface says which one"


def refreshed(known: Identity, source: CardSource = cards) -> Identity:
    """The same guest with the address that its card has now; the id never changes while the agent runs."""
    for card in source():
        if card.name == known.interface:
            return Identity(known.id, card.ips[0] if card.ips else "", known.interface)
    return known


async def wait_for(
    clock: eventloop.Clock,
    *,
    named_by_host: str,
    configured: str,
    ip_needed: bool,
    source: CardSource = cards,
) -> Identity:
    """This guest's identity, as soon as there is one. Waits for ever: a guest without its card is of no use.

    Looks again with a growing pause; what is missing is logged when it changes, not at every look.
    """
    pause = FIRST_WAIT_S
    said = ""
    while True:
        card = choose(source(), named_by_host=named_by_host, configured=configured)
        if isinstance(card, Card) and (card.ips or not ip_needed):
            return Identity(card.mac, card.ips[0] if card.ips else "", card.name)
        missing = card if isinstance(card, str) else f"network interface {card.name} has no address"
        if missing != said:
            log.warning("waiting: %s", missing)
            said = missing
        await eventloop.sleep(clock, pause)
        pause = min(LONGEST_WAIT_S, pause * 2)
