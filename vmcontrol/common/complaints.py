"""Whether a change that comes again and again is still worth a line in the log.

A BOINC client that limits the processor's time suspends and resumes its tasks every second, for days; whoever may open
a connection may be refused a thousand times a second. Owns nothing but the times of the last changes.
"""

from __future__ import annotations

import logging
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


class Complaints:
    """Warnings of one kind, which others can bring about as often as they like: written until they come as a flood."""

    def __init__(self, log: logging.Logger, seconds: Callable[[], float]) -> None:
        self._log = log
        self._flapping = Flapping(seconds)

    def warn(self, text: str, *arguments: object) -> None:
        """As Logger.warning."""
        worth = self._flapping.changed()
        if worth is not Worth.NOTHING:
            last = " (there are many: the next ones are not noted)" if worth is Worth.A_LAST_LINE else ""
            self._log.warning(text + last, *arguments)
