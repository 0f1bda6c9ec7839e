"""HostMain's own TCP ports, and the file of the slot that names them for people and tools.

With a door (vmcontrol.common.door) no port is needed for a job to run: one that cannot be had, because something else
on the computer listens there, is tried again until HostMain ends.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet.error import CannotListenError

from vmcontrol.common.atomicfile import write_atomically
from vmcontrol.common.eventloop import TimerHandle

log = logging.getLogger(__name__)

TRY_AGAIN_S = 5.0


class Ports:
    """Ports by name. `close` at the end: the file goes."""

    def __init__(self, reactor: Any, file: Path, *, patient: bool) -> None:
        """patient: a port that cannot be had is tried again; else CannotListenError."""
        self._reactor = reactor
        self._file = file
        self._patient = patient
        self._known: dict[str, int | None] = {}
        self._timers: dict[str, TimerHandle] = {}
        self._written = False

    def known(self, name: str, port: int | None) -> None:
        """A port that is somebody else's to open. None: there is none."""
        self._known[name] = port

    def open(self, name: str, what: str, listen: Callable[[], int], later: Callable[[int], None]) -> int:
        """Open a port and return it; 0: not yet, `later` gets it then. what: for the log."""
        try:
            port = listen()
        except CannotListenError as error:
            if not self._patient:
                raise
            if name not in self._known:
                where = f"{error.interface}:{error.port}"
                log.warning("%s cannot be reached from outside: %s: %s; tried again", what, where, error.socketError)
            self._known[name] = None
            self._timers[name] = self._reactor.callLater(TRY_AGAIN_S, self._open_later, name, what, listen, later)
            return 0
        self._known[name] = port
        return port

    def write(self) -> None:
        """Name them in the file. Raises OSError."""
        self._written = True
        write_atomically(self._file, json.dumps(self._known).encode() + b"\n")

    def close(self) -> None:
        """Nothing is tried any more."""
        for timer in self._timers.values():
            if timer.active():
                timer.cancel()
        self._file.unlink(missing_ok=True)

    def _open_later(self, name: str, what: str, listen: Callable[[], int], later: Callable[[int], None]) -> None:
        port = self.open(name, what, listen, later)
        if port:
            log.info("%s can be reached at port %d now", what, port)
            later(port)
            try:
                self.write()
            except OSError as error:
                log.warning("%s is not up to date: %s", self._file.name, error)
