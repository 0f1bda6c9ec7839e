"""The guest's first serial port, copied from VirtualBox's file to the console log in the slot.

VirtualBox begins serial.txt anew at each start of the VM; the console log goes on. Where it stands is kept so that each
byte is copied once, also by a HostMain that takes over from one that was killed. VirtualBox does not let a guest wait
that prints without end: of what it prints at once the end is copied, and what was copied of serial.txt is given back.
Owns both files of a VM of ours; for another VM all of it does nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time

from vmcontrol.hypervisors.common.console import ConsoleLog
from vmcontrol.hypervisors.virtualbox.files import Record
from vmcontrol.hypervisors.virtualbox.watch import Follower

log = logging.getLogger(__name__)

SERIAL_KEPT = 1024 * 1024
"""Bytes of serial.txt on disk beyond which what was copied is given back to the file system."""
AT_ONCE, AT_ONCE_KEPT = 256 * 1024, 64 * 1024
"""Bytes that are copied at once, and the end of what is more than that."""
NOTE_EVERY_S = 10.0
"""Where the console log stands after it was cut is written down at most so often: that costs a sync."""


class Console:
    """Of one VM. Before a start: `finish`, then `begin` just before VirtualBox starts it; `copy` as it grows."""

    def __init__(self, record: Record | None) -> None:
        """record: None for a VM that is not ours, which has no console log."""
        self._record = record
        self._log = None if record is None else ConsoleLog(record.files.path(record.definition.console_log))
        self._serial: Follower | None = None
        self._noted_at = -NOTE_EVERY_S

    def copy(self) -> None:
        """Append to the console log what is new in serial.txt."""
        if self._serial is None or self._log is None:
            return
        passed = self._serial.skip(AT_ONCE, AT_ONCE_KEPT)
        data = self._serial.read()
        if not data:
            return
        if passed:
            data = f"\n[... {passed} bytes were printed too fast to be kept ...]\n".encode() + data
        before = self.size()
        self._log.write(data)
        if self.size() != before + len(data) or passed:
            self._note()
        with contextlib.suppress(OSError):
            if self._serial.path.stat().st_blocks * 512 > SERIAL_KEPT:
                os.truncate(self._serial.path, 0)  # VirtualBox goes on at its offset; before it is a hole

    def follow(self) -> None:
        """Go on where the console log ends: it got whatever was copied, also by a HostMain that was killed."""
        if self._serial is None and self._record is not None:
            copied = self.size() - self._record.definition.console_start
            self._serial = Follower(self._record.files.serial, offset=max(0, copied))

    def finish(self) -> None:
        """Copy what a run left that nobody watched, and remove its serial.txt."""
        self.follow()
        self.copy()
        if self._record is not None:
            self._record.files.serial.unlink(missing_ok=True)

    def begin(self) -> None:
        """The VM is about to start, with a new serial.txt."""
        if self._record is not None:
            self._serial = Follower(self._record.files.serial)

    def _note(self, *, now: bool = False) -> None:
        """The console log is longer or shorter than what was copied: `follow` has to know where that stands."""
        if self._record is None or self._serial is None:
            return
        if now or time.monotonic() - self._noted_at >= NOTE_EVERY_S:
            self._noted_at = time.monotonic()
            try:
                self._record.change(console_start=self.size() - self._serial.offset)
            except OSError as error:
                log.info("where the guest's console stands is not written down: %s", error)

    def size(self) -> int:
        """Bytes of the console log; 0 when there is none."""
        return self._log.size() if self._log is not None else 0

    def close(self) -> None:
        """Copy what there is, and follow no longer."""
        self.copy()
        if self._noted_at > 0:
            self._note(now=True)
        self._serial = None
