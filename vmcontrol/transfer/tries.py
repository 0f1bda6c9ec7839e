"""What uploads and downloads by HTTP have in common: how often a copy is tried, and when a try counts as over.

Broken      this try ended; the transfer goes on where it stopped
Damaged     what arrived is not what was sent; the transfer begins anew
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from vmcontrol.common import eventloop
from vmcontrol.common.eventloop import Clock, TimerHandle
from vmcontrol.common.filestream import ALGORITHMS
from vmcontrol.link.errors import LinkEnded
from vmcontrol.transfer.interface import TransferFailed

log = logging.getLogger(__name__)

TRIES = 10
"""Tries in a row that move no byte."""
ALL_TRIES = 200
"""Tries of one transfer in all."""
DAMAGED_TRIES = 3
"""Copies whose SHA-256 differs, or of a file that changes while it is copied."""
WAIT_S = 0.1
WAIT_MOST_S = 3.0
"""Seconds between tries: doubled each time, up to the latter."""
STALL_LIMIT_S = 60.0
ASK_LIMIT_S = 30.0
"""Seconds for a small answer."""
SYNC_RATE = 2 * 1024 * 1024
"""Bytes a second that the guest's disk is expected to sync at least, or to hash."""


class Broken(Exception):  # noqa: N818
    """This try ended; the transfer goes on."""


class Damaged(Exception):  # noqa: N818
    """What arrived is not what was sent: from the beginning."""


class Stall:
    """Cancels `target` when nothing moved for STALL_LIMIT_S."""

    def __init__(self, clock: Clock, break_off: Callable[[], object]) -> None:
        self._clock = clock
        self._break_off = break_off
        self._moved = clock.seconds()
        self._timer: TimerHandle = clock.callLater(STALL_LIMIT_S, self._look)
        self.stalled = False

    def moved(self) -> None:
        self._moved = self._clock.seconds()

    def end(self) -> None:
        if self._timer.active():
            self._timer.cancel()

    def _look(self) -> None:
        left = self._moved + STALL_LIMIT_S - self._clock.seconds()
        if left > 0:
            self._timer = self._clock.callLater(left, self._look)
        else:
            self.stalled = True
            self._break_off()


class Tries:
    """Counts what failed and waits between tries."""

    def __init__(self, clock: Clock, what: str) -> None:
        self._clock = clock
        self._what = what
        self._fruitless = 0
        self._damaged = 0
        self._position = -1
        self.count = 1

    async def after_break(self, error: Exception, position: int) -> None:
        """Wait for the next try. TransferFailed when there is none, `error` when none can help.

        position: bytes that are over by now.
        """
        if isinstance(error, LinkEnded):
            raise error
        self.count += 1
        self._fruitless = 0 if position > self._position else self._fruitless + 1
        self._position = position
        if self._fruitless >= TRIES or self.count > ALL_TRIES:
            raise TransferFailed(f"{self._what}: given up after {self.count - 1} tries: {error}") from error
        log.info("%s: broke at byte %d: %s; going on", self._what, position, error)
        await eventloop.sleep(self._clock, min(WAIT_MOST_S, WAIT_S * 2**self._fruitless))

    def after_damage(self, error: Exception) -> None:
        self.count += 1
        self._damaged += 1
        self._position = -1
        if self._damaged >= DAMAGED_TRIES:
            raise TransferFailed(f"{self._what}: given up after {self._damaged} copies: {error}") from error
        log.warning("%s: %s; from the beginning", self._what, error)


def known_algorithm(name: object, what: str) -> str:
    """The digest that a guest asks for."""
    if not isinstance(name, str) or name not in ALGORITHMS:
        said = name[:40] if isinstance(name, str) else type(name).__name__
        raise TransferFailed(f"{what}: the guest confirms copies by {said!r}, which this HostMain does not know")
    return name
