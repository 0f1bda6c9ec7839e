"""VMs that were there before us: one task of a computer uses one at a time, and leaves it as it found it.

Owns, for each such VM, a note in the slot (what it was when the task first used it) and a lock file in VirtualBox's
home that names that note. Whoever holds the lock file's lock uses the VM; so does a slot whose note is still there, as
a task that the client has stopped goes on with its saved state later. A slot that vanished takes its note along.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from pathlib import Path
from typing import IO

from vmcontrol import jsonfile
from vmcontrol.atomicfile import write_atomically
from vmcontrol.filelock import lock, open_lock_file
from vmcontrol.hypervisors import vbox_faults
from vmcontrol.hypervisors.interface import VmState

log = logging.getLogger(__name__)
SNAPSHOT_PREFIX = "vmwrapper_"


def home() -> Path:
    """Where VirtualBox keeps what it knows of this user's VMs."""
    told = os.environ.get("VBOX_USER_HOME")
    if told:
        return Path(told)
    base, system = Path.home(), platform.system()
    if system == "Linux":
        config = Path(os.environ.get("XDG_CONFIG_HOME") or base / ".config")
        return base / ".VirtualBox" if (base / ".VirtualBox").is_dir() else config / "VirtualBox"
    return base / ("Library/VirtualBox" if system == "Darwin" else ".VirtualBox")


class Existing:
    """The existing VMs that this slot uses."""

    def __init__(self, folder: Path) -> None:
        """folder: <slot>/vm, for the notes."""
        self._folder = folder
        self._locks: dict[str, IO[str]] = {}

    def take(self, name: str, uuid: str, state: VmState) -> None:
        """This slot uses the VM from now on. Raises Fault `vm-in-use` when another one does."""
        note = self._note(uuid)
        if uuid not in self._locks:
            home().mkdir(parents=True, exist_ok=True)
            file = os.fdopen(open_lock_file(home() / f"vmwrapper-{uuid}.lock"), "a+")
            try:
                lock(file)
            except OSError as error:
                file.close()
                raise vbox_faults.in_use(name) from error
            file.seek(0)
            user = file.read().strip()
            if user and user != str(note) and Path(user).exists():
                file.close()
                raise vbox_faults.in_use(name)
            file.truncate(0)
            file.write(f"{note}\n")
            file.flush()
            self._locks[uuid] = file
        if not note.exists():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(note, json.dumps({"name": name, "found": state.value}).encode())

    def found(self, uuid: str) -> VmState | None:
        """The state in which this slot found it; None when it does not use it."""
        try:
            return VmState(jsonfile.load(self._note(uuid))["found"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: %s; taken for a VM that was off", self._note(uuid), error)
            return VmState.POWERED_OFF

    @staticmethod
    def is_our_snapshot(name: str) -> bool:
        return name.startswith(SNAPSHOT_PREFIX)

    def release(self, uuid: str) -> None:
        self._note(uuid).unlink(missing_ok=True)
        file = self._locks.pop(uuid, None)
        if file is not None:
            file.truncate(0)
            file.close()

    def close(self) -> None:
        """This HostMain ends; the slot uses what it uses."""
        for file in self._locks.values():
            file.close()
        self._locks.clear()

    def _note(self, uuid: str) -> Path:
        return self._folder / f".existing-{uuid}.json"
