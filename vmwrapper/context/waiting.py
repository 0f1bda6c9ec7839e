"""How long a fault that passes by itself is waited for, and how often it is looked at. Pure but for its clock.

Used for what is no fault of the job: a full disk that holds a VM up, a HostMain that cannot be reached.
"""

from __future__ import annotations

from collections.abc import Callable

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
