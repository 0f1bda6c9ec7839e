"""How long programs get to end, and when: the rules, without the programs. Pure but for the clock that is given.

TERM goes to a program's main process alone, which may have to ask others to save. These get it when the main one has
ended, or after OTHERS_S; those that were started meanwhile, perhaps in order to save, after OTHERS_S. Whatever is still
there when the patience is used up gets KILL.
"""

from __future__ import annotations

from vmcontrol.common.eventloop import Clock

OTHERS_S = 10.0
"""As lib/proc_control.cpp, kill_descendants."""
QUIT_S = 45.0
"""From the client's message to KILL, for all programs and VMs together: after 60 s (QUIT_TIMEOUT of
client/app_control.cpp) the client kills everything itself, and we have to note and to tell what became of it."""
ABORT_S = 15.0
"""The same when nothing of the work is kept: abort, failure; and for a program that has reached its time_limit."""


class Patience:
    """One for all that is being ended together; it can get shorter meanwhile."""

    scale = 1.0
    """Of all times here. Tests make it smaller."""

    def __init__(self, clock: Clock, limit_s: float) -> None:
        self._clock = clock
        self._kill_at = clock.seconds() + limit_s * self.scale

    @property
    def left_s(self) -> float:
        """Seconds until KILL, at least 0."""
        return max(0.0, self._kill_at - self._clock.seconds())

    def shorten(self, limit_s: float) -> None:
        """KILL at most that many seconds from now on."""
        self._kill_at = min(self._kill_at, self._clock.seconds() + limit_s * self.scale)

    @classmethod
    def others_s(cls) -> float:
        """Seconds until all processes of a program get TERM."""
        return OTHERS_S * cls.scale
