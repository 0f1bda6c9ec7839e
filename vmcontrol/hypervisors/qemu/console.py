"""The guest's first serial port under QEMU: a pipe from QEMU to us, and a log in the slot that we alone write.

A guest may print as fast as it can, for ever. What it prints is taken at a rate that is beyond a real serial port's;
when the pipe is full the guest's port is not ready for the next character, as a real one's would not be, so it waits or
loses what it prints, and nothing else of it stands still. So the log, its growth and our own time are bounded, at the
source. Owns the pipe; the process has its other end.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from vmcontrol.hypervisors.common.console import ConsoleLog

log = logging.getLogger(__name__)

RATE, BURST = 32 * 1024, 1024 * 1024
"""Bytes a second, in the long run, and at once. A serial port of 115200 baud has 11520; a guest's boot prints 60 KB."""
PIECE = 64 * 1024
"""A pipe holds so much."""
GATHER_S = 0.05
"""Between two reads: QEMU writes each character by itself."""


class ConsolePipe:
    """What one QEMU's guest prints, into its log. `close` ends it, after a last look."""

    def __init__(self, reactor: Any, to: ConsoleLog) -> None:
        """`theirs` is for QEMU; close it when that has it. Raises OSError."""
        self._reactor = reactor
        self._to = to
        self._fd, self.theirs = os.pipe()
        os.set_blocking(self._fd, False)
        self._credit = float(BURST)
        self._credit_at: float = reactor.seconds()
        self._later: Any = None
        reactor.addReader(self)

    def drain(self) -> None:
        """Take what has been printed until now: for a guest that stands, or has ended. At most a pipe full."""
        if self._fd >= 0:
            self._take()

    def close(self) -> None:
        """QEMU has ended."""
        if self._fd < 0:
            return
        self.drain()
        if self._fd >= 0:
            self._end()

    def _take(self) -> bool:
        """Whether there was anything; the pipe's end closes it."""
        try:
            data = os.read(self._fd, PIECE)
        except BlockingIOError:
            return False
        except OSError as error:
            log.warning("the guest's console cannot be read: %s", error)
            data = b""
        if not data:
            self._end()
            return False
        self._to.write(data)
        self._credit -= len(data)
        return True

    def _wait(self) -> None:
        """Look again when there may be more than a few characters, and when they may be taken."""
        now = self._reactor.seconds()
        self._credit = min(float(BURST), self._credit + (now - self._credit_at) * RATE)
        self._credit_at = now
        self._reactor.removeReader(self)
        self._later = self._reactor.callLater(max(GATHER_S, (PIECE - self._credit) / RATE), self._go_on)

    def _go_on(self) -> None:
        self._later = None
        if self._fd >= 0:
            self._reactor.addReader(self)

    def _end(self) -> None:
        self._reactor.removeReader(self)
        if self._later is not None:
            self._later.cancel()
            self._later = None
        os.close(self._fd)
        self._fd = -1

    # IReadDescriptor

    def fileno(self) -> int:
        return self._fd

    def logPrefix(self) -> str:  # noqa: N802
        return "guest console"

    def doRead(self) -> None:  # noqa: N802
        if self._take():
            self._wait()

    def connectionLost(self, reason: object) -> None:  # noqa: N802, ARG002 (the reactor ends)
        if self._fd >= 0:
            self._end()
