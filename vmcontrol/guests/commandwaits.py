"""Callers that wait for the next version of a command. Owns their timers; who waits is in the Command."""

from __future__ import annotations

from twisted.internet.defer import Deferred

from vmcontrol.common.eventloop import Clock
from vmcontrol.guests.command import Command
from vmcontrol.protocol.command import CommandState

TOLD_EVERY_S = 0.1
"""Seconds between two answers that a command still runs: an agent may say so a thousand times a second."""


async def wait_for_change(clock: Clock, command: Command, version: int, limit_s: float) -> None:
    """Return as soon as the command's version is not `version`, or at the limit."""
    if command.status.version != version or limit_s <= 0:
        return
    await _next_change(clock, command, limit_s)
    while (
        command.status.version != version
        and command.state is CommandState.RUNNING
        and (early_s := command.told_at + TOLD_EVERY_S - clock.seconds()) > 0
    ):
        await _next_change(clock, command, early_s)
    command.told_at = clock.seconds()


def wake(command: Command) -> None:
    """The command has changed, or nobody is to wait any more."""
    waiting, command.waiting = command.waiting, []
    for deferred in waiting:
        deferred.callback(None)


async def _next_change(clock: Clock, command: Command, limit_s: float) -> None:
    """Return at the next change, or at the limit."""
    changed: Deferred[None] = Deferred(lambda d: command.waiting.remove(d) if d in command.waiting else None)
    command.waiting.append(changed)

    def expire() -> None:
        if changed in command.waiting:
            command.waiting.remove(changed)
            changed.callback(None)

    timer = clock.callLater(limit_s, expire)
    try:
        await changed
    finally:
        if timer.active():
            timer.cancel()
