"""By hand: what host programs say on stderr goes to our stderr and, as under a client, into stderr.txt.

Under a client both are one file, and programs simply have it. By hand each program gets a pipe, which is read here as
soon as there is something in it. Owns the pipe's reading end until the last writer is gone.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from vmwrapper.log import open_unlinked

_CHUNK = 65536


class StderrCopy:
    """The stderr of one program and of all that it starts."""

    def __init__(self, reactor: Any, path: Path) -> None:
        """path: of stderr.txt. Raises OSError."""
        self._reactor = reactor
        self._path = path
        self._fd, self.writing_end = os.pipe()
        """For the program."""
        os.set_blocking(self._fd, False)
        reactor.addReader(self)

    def started(self) -> None:
        """The program has its copy of the writing end, or will never have one."""
        os.close(self.writing_end)

    def drain(self) -> None:
        """Pass on all that was written until now."""
        while self._fd >= 0 and self._pass_on():
            pass

    def _pass_on(self) -> bool:
        """Whether there may be more."""
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._reactor.removeReader(self)
            os.close(self._fd)
            self._fd = -1
            return False
        with contextlib.suppress(OSError):  # closed, or on a full disk: the file below is one more chance
            left = memoryview(data)
            while left:
                left = left[os.write(2, left) :]
        with contextlib.suppress(OSError), open(self._path, "ab", opener=open_unlinked) as file:
            file.write(data)
        return True

    # Twisted's names

    def fileno(self) -> int:
        return self._fd

    def logPrefix(self) -> str:  # noqa: N802
        return "stderr"

    def doRead(self) -> None:  # noqa: N802
        self._pass_on()

    def connectionLost(self, _reason: object) -> None:  # noqa: N802
        self.drain()
