"""What the agent at the other end of a link may do at the embedded broker: speak for its own guest, and hear its own.

The link has shown the guest's secret, so its messages are its own; a guest that sends for another, sends what
only HostMain may, or subscribes to others' requests is refused. Clients of the broker's port (agents of protocol 1,
tools) have shown the passcode only, which all of them share: they cannot be told apart. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vmcontrol.broker.frames import FrameLimits
from vmcontrol.protocol.messages import CONNECTIONS, REQUESTS, RESPONSES, addressed_to

GUEST_FRAME = FrameLimits(line_bytes=16 * 1024, header_bytes=64 * 1024, body_bytes=1024 * 1024)
"""Outputs of commands stay in files where HostMain dials: the largest message is a table of 1000 commands, 0.4 MB."""

_SENDER = {CONNECTIONS: "id", RESPONSES: "from"}
"""Topics to which a guest speaks, and the header that says who does."""


@dataclass(frozen=True, slots=True)
class GuestRights:
    """Of one guest. guest: its id."""

    guest: str

    def refusal_to_send(self, destination: str, headers: Mapping[str, str]) -> str:
        """Why a SEND is refused; empty: it is not."""
        name = _SENDER.get(destination)
        if name is None:
            return f"a guest may not send to {destination[:80]!r}"
        if headers.get(name, "").upper() != self.guest.upper():
            return f"it speaks for {headers.get(name, '')[:40]!r} and is {self.guest}"
        return ""

    def refusal_to_subscribe(self, destination: str) -> str:
        """Likewise of a SUBSCRIBE."""
        return "" if destination == REQUESTS else f"a guest may not listen to {destination[:80]!r}"

    def may_hear(self, headers: Mapping[str, str]) -> bool:
        """Whether a message is meant for this guest."""
        return addressed_to(headers.get("to", ""), self.guest)
