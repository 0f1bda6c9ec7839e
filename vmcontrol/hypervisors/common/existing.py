"""A VM that was there before the job: used, and left as it was found. Owns a note of the state in which it was found.

The note is in the slot: while it is there the slot uses the VM, for a task that the client has stopped goes on later.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from vmcontrol.common import jsonfile
from vmcontrol.common.atomicfile import fsync_folder, write_atomically
from vmcontrol.protocol.vm import VmState

log = logging.getLogger(__name__)

SNAPSHOT_PREFIX = "vmwrapper_"
"""Our snapshots are called so; others are its owner's."""
NOTE_FORMAT = 1


class Existing:
    """One such VM."""

    def __init__(self, note: Path) -> None:
        self.note = note

    def take(self, name: str, state: VmState) -> None:
        """Note the state in which it is found, once. Raises OSError."""
        if not self.note.exists():
            self.note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            content = {jsonfile.FORMAT: NOTE_FORMAT, "name": name, "found": state.value}
            write_atomically(self.note, json.dumps(content).encode(), mode=0o600)
            log.info("%s was there before and is %s: it will be left so", name, state)

    def found(self) -> VmState | None:
        """The state in which it was taken; None when it is not. A note that cannot be read counts as PoweredOff."""
        try:
            return VmState(jsonfile.load(self.note)["found"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: %s; taken for a VM that was off", self.note, error)
            return VmState.POWERED_OFF

    def give_back(self) -> None:
        """It is used no longer."""
        self.note.unlink(missing_ok=True)
        if self.note.parent.is_dir():
            fsync_folder(self.note.parent)

    def close(self) -> None:
        """This HostMain ends; the slot uses what it uses."""
