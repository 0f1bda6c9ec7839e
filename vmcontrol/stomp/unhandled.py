"""What a receiving thread has handed over and the reactor thread has not handled yet: counted, and bounded.

Owns two counters. A broker that sends faster than the reactor thread handles makes the receiving thread wait, and so
the broker; without it the calls that wait in the reactor would grow without bound.
"""

from __future__ import annotations

import threading

MESSAGES = 256
CHARACTERS = 1024 * 1024
"""One message more is taken, of whatever size: with it one of the largest is in memory, not two."""


class Unhandled:
    """Counts what was received and not handled yet; makes stomp.py's receiving thread wait, and so the broker."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._messages = self._characters = 0
        self._released = False

    def add_in_thread(self, characters: int) -> None:
        with self._changed:
            self._changed.wait_for(self._has_room)
            self._messages += 1
            self._characters += characters

    def take(self, characters: int) -> None:
        with self._changed:
            self._messages -= 1
            self._characters -= characters
            self._changed.notify()

    def release(self) -> None:
        """The session is over: nobody waits any more."""
        with self._changed:
            self._released = True
            self._changed.notify()

    def _has_room(self) -> bool:
        return self._released or (self._messages < MESSAGES and self._characters < CHARACTERS)
