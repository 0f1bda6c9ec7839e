"""How long and how often something is tried again that may pass by itself. Pure but for the clock and the ledger.

Patience    in time: for a full disk that holds a VM up, a HostMain that cannot be reached
InARow      in number: failures without a step forward of the job between them
"""

from __future__ import annotations

from collections.abc import Callable

from vmwrapper.state.ledger import Ledger

FORGIVEN_S = 60.0
"""A fault that has stayed away for so long is over; the next one begins anew."""
LONGEST_PAUSE_S = 10.0


class Patience:
    """With one fault. Tell it each time that the fault is seen; it says how long to wait before the next try."""

    def __init__(self, seconds: Callable[[], float], limit_s: float) -> None:
        """seconds: a clock that stands still while the client has suspended us."""
        self._seconds = seconds
        self._limit_s = limit_s
        self._began = self._seen = float("-inf")
        self._pause_s = 1.0

    @property
    def is_new(self) -> bool:
        """Whether the next time is the first: worth a line."""
        return self._seconds() - self._seen > FORGIVEN_S

    def next_pause_s(self) -> float | None:
        """The fault is there: seconds until another try, longer each time; None when it has lasted too long."""
        now = self._seconds()
        if self.is_new:
            self._began, self._pause_s = now, 1.0
        if now - self._began >= self._limit_s:
            return None
        pause, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        self._seen = now + pause
        return pause


class InARow:
    """Counts failures since the job got further last."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._steps = ledger.steps
        self._count = 0

    def add(self) -> int:
        """Another failure; how many there are now."""
        self._count = self.count + 1
        return self._count

    @property
    def count(self) -> int:
        if self._steps != self._ledger.steps:
            self._steps, self._count = self._ledger.steps, 0
        return self._count
