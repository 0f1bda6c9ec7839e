"""Whether a change that comes again and again is still worth a line in the log.

A BOINC client that limits the processor's time suspends and resumes its tasks every second, for days. Owns nothing but
the times of the last changes; never logs itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum

MANY = 8
"""Changes..."""
WINDOW_S = 20.0
"""...within so many seconds are flapping..."""
CALM_S = 60.0
"""...which is over when nothing has changed for so long."""


class Worth(Enum):
    """What to write about a change."""

    A_LINE = "a line"
    A_LAST_LINE = "a line that says that the next ones are left out"
    NOTHING = "nothing"


class Flapping:
    """Told of each change of one thing."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        """seconds: a clock that only goes forward."""
        self._seconds = seconds
        self._times: deque[float] = deque(maxlen=MANY)
        self._silent = False

    def changed(self) -> Worth:
        """One more change."""
        now = self._seconds()
        calm = not self._times or now - self._times[-1] > CALM_S
        self._times.append(now)
        if calm:
            self._silent = False
        if self._silent:
            return Worth.NOTHING
        if len(self._times) == MANY and now - self._times[0] <= WINDOW_S:
            self._silent = True
            return Worth.A_LAST_LINE
        return Worth.A_LINE
