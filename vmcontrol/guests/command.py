"""What HostMain knows of one command, and how what an agent says of it is read. Pure."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from twisted.internet.defer import Deferred

from vmcontrol.protocol.command import CommandState, CommandStatus
from vmcontrol.protocol.text import BODY_LIMIT, number
from vmcontrol.protocol.xmltext import LongText


@dataclass(slots=True)
class Command:
    """A command of a guest: its status, and what HostMain needs to keep it."""

    status: CommandStatus
    asked_attempt: int = 0
    """The attempt of the last CMD_RUN that was sent from here; 0: none."""
    old_agent: bool = False
    """Runs on an agent of protocol 1: no state words, a result without sender."""
    inline: bool = False
    """The result carries out and err; asked for by runCmd of an agent that HostMain did not dial."""
    fetched: bool = False
    """out and err are fetched from the guest and put into the result; asked for by runCmd of the other agents."""
    asked: bool = False
    """Somebody here wants to know about it."""
    taken: bool = False
    """The result is out of the list of finished commands."""
    cost: int = 0
    """Bytes of its texts, as last counted (vmcontrol.guests.knowncommands)."""
    fetches: int = 0
    """How often its output was begun to be fetched."""
    fetch_after: float = -math.inf
    """Clock seconds before which it is not begun again."""
    told_at: float = -math.inf
    """Clock seconds of the last change that somebody had waited for."""
    waiting: list[Deferred[None]] = field(default_factory=list)
    """Who waits for the next version."""

    @property
    def guest(self) -> str:
        """Id of the guest."""
        return self.status.sender

    @property
    def id(self) -> str:
        return self.status.id

    @property
    def state(self) -> CommandState:
        return self.status.state

    @property
    def attempt(self) -> int:
        return self.status.attempt

    @property
    def result(self) -> Mapping[str, Any] | None:
        return self.status.result

    @property
    def of_run_cmd(self) -> bool:
        """runCmd asked for it, as far as is known: or nobody but getCmdResults has (of another HostMain's commands)."""
        return self.inline or self.fetched or not self.asked

    @property
    def is_kept(self) -> bool:
        """The result and its output are here for who called runCmd, whatever becomes of the guest."""
        return self.result is not None and self.of_run_cmd and (self.inline or "out" in self.result)


def characters(result: Mapping[str, Any] | None) -> int:
    """Bytes of a result's texts."""
    return sum(map(_size, (result or {}).values()))


def _size(value: object) -> int:
    if isinstance(value, LongText):
        return len(value)
    if isinstance(value, str):
        return len(value) if value.isascii() else sys.getsizeof(value)
    return sum(map(_size, value.values())) if isinstance(value, Mapping) else 0


TEXTS = {"out": BODY_LIMIT, "err": BODY_LIMIT, "stderr_tail": 16 * 1024, "stdout_path": 4096, "stderr_path": 4096}
"""Characters that are kept of a result's texts; of all others"""
TEXT = 2100
KEYS = 64
"""Of a result, and of `resources` in it."""


def sound_result(body: Mapping[str, Any]) -> dict[str, Any]:
    """A result with the keys that callers use: numbers that are numbers, and an exit status also from protocol 1.

    Of other keys numbers and short texts are kept. An agent of protocol 1 has the number of a signal in the same place
    as an exit status.
    """
    result = _sound(body)
    if isinstance(resources := body.get("resources"), Mapping):
        result["resources"] = _sound(resources)
    if "exit_status" not in body:
        code = body.get("exitCodeOrSignal")
        result |= {"exit_status": 0 if body.get("finished") else _whole(code) or -1, "signal": None}
    for name in ("exit_status", "signal"):
        if body.get(name) is not None:
            result[name] = _whole(body[name])
    for name in ("cpu_time_s", "elapsed_s", "started", "ended"):
        if name in body:
            result[name] = number(body[name], 0.0)
    return result


def _sound(values: Mapping[str, Any]) -> dict[str, Any]:
    sound: dict[str, Any] = {}
    for name in [name for name in values if isinstance(name, str) and len(name) <= KEYS][:KEYS]:
        value = values[name]
        if isinstance(value, str):
            sound[name] = value[: TEXTS.get(name, TEXT)]
        elif (
            value is None
            or isinstance(value, bool | LongText)
            or (isinstance(value, int | float) and number(value, math.nan) == value and abs(value) < 2**63)
        ):
            sound[name] = value
    return sound


def _whole(value: object) -> int:
    """-1 for what is no number of an exit or a signal."""
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31 else -1


def cpu_time(resources: object) -> float:
    """Seconds, of protocol 1's rusage."""
    if not isinstance(resources, Mapping):
        return 0.0
    return number(resources.get("ru_utime"), 0.0) + number(resources.get("ru_stime"), 0.0)
