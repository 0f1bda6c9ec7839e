"""The log of a guest's first serial port, in the slot. We alone write it, whatever the hypervisor; its size is bounded.

When the disk refuses it, what the guest prints is lost, and one line in our log says so.
"""

from __future__ import annotations

import logging
from pathlib import Path

from vmcontrol.hypervisors.common import boundedlog

log = logging.getLogger(__name__)

LIMIT, KEPT = 2 * 1024 * 1024, 512 * 1024
"""Bytes of the log, and of its end that is kept when it is cut. All our logs of a job: 16 MiB."""


class ConsoleLog:
    """The file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._told = False

    def write(self, data: bytes) -> None:
        """Append. Raises nothing."""
        try:
            boundedlog.append(self._path, data, LIMIT, KEPT)
        except (OSError, ValueError) as error:
            if not self._told:
                log.warning("the guest's console is not kept in %s: %s", self._path.name, error)
            self._told = True
        else:
            self._told = False

    def size(self) -> int:
        """Bytes; 0 when there is none."""
        try:
            return self._path.stat().st_size
        except OSError:
            return 0
