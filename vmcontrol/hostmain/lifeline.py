"""The two pipes between HostMain and the wrapper that started it: the lifeline, and the status lines.

Owns the two file descriptors that the environment named; both are None when HostMain was started standalone.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet.interfaces import IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

log = logging.getLogger(__name__)


@implementer(IReadDescriptor)
class Lifeline:
    """The read end of a pipe that the wrapper holds: its end is the wrapper's end."""

    def __init__(self, reactor: Any, fd: int | None, ended: Callable[[], None]) -> None:
        self._reactor = reactor
        self._fd = fd
        self._ended = ended

    def start(self) -> None:
        if self._fd is not None:
            os.set_blocking(self._fd, False)
            os.set_inheritable(self._fd, False)
            self._reactor.addReader(self)

    def stop(self) -> None:
        if self._fd is not None:
            self._reactor.removeReader(self)
            os.close(self._fd)
            self._fd = None

    def fileno(self) -> int:
        return -1 if self._fd is None else self._fd

    def doRead(self) -> None:  # noqa: N802
        if self._fd is None:
            return
        try:
            if os.read(self._fd, 4096):
                return  # nothing is said there; only the end counts
        except BlockingIOError:
            return
        except OSError as error:
            log.warning("lifeline: %s", error)
        self._over()

    def connectionLost(self, reason: Failure) -> None:  # noqa: N802, ARG002
        """The reactor saw the end before we read it, or is stopping."""
        if self._reactor.running:
            self._over()

    def logPrefix(self) -> str:  # noqa: N802
        return "lifeline"

    def _over(self) -> None:
        if self._fd is not None:
            self.stop()
            self._ended()


class StatusPipe:
    """The write end of a pipe to the wrapper: one JSON object a line. Never waits: who does not read misses lines."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        if fd is not None:
            os.set_blocking(fd, False)
            os.set_inheritable(fd, False)

    def tell(self, event: Mapping[str, object]) -> None:
        if self._fd is None:
            return
        try:
            os.write(self._fd, json.dumps(event).encode("ascii") + b"\n")
        except BlockingIOError:
            log.warning("the wrapper does not read its status pipe: %s not told", event.get("event"))
        except OSError as error:
            log.info("status pipe: %s", error)
            self.close()

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
