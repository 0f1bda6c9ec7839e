"""A Conversation without HostMain around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vmcontrol.guests.conversation import Conversation, OnGuest


async def no_outputs(_guest: str, _result: Mapping[str, Any]) -> Mapping[str, str]:
    """Of commands without output."""
    return {}


def a_conversation(clock: Any, on_guest: OnGuest = lambda _guest, _id: None) -> Conversation:
    """A guest is warned about after 30 s."""
    return Conversation(clock, grace_s=30, on_broker=lambda *_: None, on_guest=on_guest, fetch=no_outputs)
