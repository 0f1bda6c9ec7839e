"""The guest's first serial port, copied from VirtualBox's file to the console log in the slot.

VirtualBox begins serial.txt anew at each start of the VM; the console log goes on. Where it stands is kept so that each
byte is copied once, also by a HostMain that takes over from one that was killed. Owns both files of a VM of ours
(the console log is bounded, what was copied of serial.txt is given back); for another VM all of it does nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from vmcontrol.hypervisors.qemu_files import bound_console
from vmcontrol.hypervisors.vbox_files import Record
from vmcontrol.hypervisors.vbox_watch import Follower

log = logging.getLogger(__name__)

SERIAL_KEPT = 8 * 1024 * 1024
"""Bytes of serial.txt on disk beyond which what was copied is given back to the file system."""


class Console:
    """Of one VM. Before a start: `finish`, then `begin` when VirtualBox is told to start it; `copy` as it grows."""

    def __init__(self, record: Record | None) -> None:
        """record: None for a VM that is not ours, which has no console log."""
        self._record = record
        self._serial: Follower | None = None

    def copy(self) -> None:
        """Append to the console log what is new in serial.txt."""
        if self._serial is None or self._record is None:
            return
        data = self._serial.read()
        if not data:
            return
        console_log = self._record.definition.console_log
        try:
            with Path(console_log).open("ab") as console:
                console.write(data)
        except OSError as error:
            log.warning("%s: %s", console_log, error.strerror)
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

    def bound(self) -> None:
        """Cut a console log that has grown too long."""
        if self._record is not None and bound_console(Path(self._record.definition.console_log)):
            copied = self._serial.offset if self._serial is not None else 0
            self._record.change(console_start=self.size() - copied)

    def size(self) -> int:
        """Bytes of the console log; 0 when there is none."""
        try:
            return Path(self._record.definition.console_log).stat().st_size if self._record is not None else 0
        except OSError:
            return 0

    def close(self) -> None:
        """Copy what there is, and follow no longer."""
        self.copy()
        self._serial = None
