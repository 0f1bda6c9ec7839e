"""The files of one VM of ours, and what we remember of it.

<slot>/vm/<name>/vmwrapper.json   Definition (0600: it holds the one-time token); written before VirtualBox hears
                                  of the VM, so that whatever a crash leaves can be found and removed
                 <name>.vbox      VirtualBox's settings of the VM, and its previous version .vbox-prev
                 base-*.vmdk, image, disk-*.vdi  vbox_media
                 Snapshots/       VirtualBox's: differences and machine states
                 Logs/            VirtualBox's; and serial.txt, the guest's first serial port since the VM's last
                                  start, which VirtualBox begins anew each time: it is copied to the console log
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vmcontrol.common import jsonfile
from vmcontrol.common.atomicfile import fsync_folder, write_atomically
from vmcontrol.hypervisors.common import places
from vmcontrol.hypervisors.interface import HypervisorError
from vmcontrol.hypervisors.qemu.files import fsync_file, remove_folder

DEFINITION = "vmwrapper.json"
VERSION = 1
VM_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
"""What a VM of ours may be called, for its folder has that name."""


@dataclass(frozen=True, slots=True)
class HostForward:
    """A forward of a VM. wanted: the host port that was asked for, 0: any; used: the one in its rule now."""

    name: str
    guest_port: int
    wanted: int
    used: int
    remote: bool = False


@dataclass(frozen=True, slots=True)
class Definition:
    """What a VM was made for. Where VirtualBox says other, it is brought into line at the next start."""

    name: str
    uuid: str
    image: str
    """Path; as that of the console log relative to the slot where it moves along with it (places.py)."""
    mac: str
    agent_port: int
    forwards: tuple[HostForward, ...]
    network: bool
    network_nic: int
    """Number of the NIC that leads to the granted network; 0: none."""
    console_log: str
    memory_mb: int
    token: str = ""
    network_connected: bool = True
    agent_nic: int = 1
    """Number of the NIC that has the forwards."""
    complete: bool = False
    """VirtualBox knows all of it. False: making it was cut off, and it is no VM."""
    console_start: int = 0
    """Size of the console log when the VM was last started: what is beyond it is the beginning of serial.txt."""
    running: bool = False
    """It was started, and has not ended in order since: its disk may be in the middle of something."""
    image_id: str = ""
    """What imageid said of the image when the VM was made from it; empty: an older version made it."""


class VmFiles:
    """Reads and writes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.slot = folder.parent.parent
        self.definition = folder / DEFINITION
        self.settings = folder / f"{folder.name}.vbox"
        self.previous_settings = folder / f"{folder.name}.vbox-prev"
        self.snapshots = folder / "Snapshots"
        self.logs = folder / "Logs"
        self.log = self.logs / "VBox.log"
        self.serial = self.logs / "serial.txt"

    def load(self) -> Definition | None:
        """None where there is none. Raises HypervisorError when it cannot be read."""
        try:
            value = jsonfile.load(self.definition)
            if not isinstance(value, dict) or value.get("version") != VERSION:
                raise ValueError("another version of vmwrapper wrote it")
            value = places.carried_over(value)
            found = jsonfile.typed(Definition, value)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise HypervisorError(f"{self.definition}: {error}") from error
        if found.name != self.folder.name:
            raise HypervisorError(f"{self.definition}: it is of a VM {found.name!r:.120}")
        return found

    def is_readable(self) -> bool:
        """Whether there is a definition that can be read, or none."""
        try:
            self.load()
        except HypervisorError:
            return False
        return True

    def store(self, definition: Definition) -> None:
        """Atomic. Raises OSError."""
        value: dict[str, Any] = {"version": VERSION, **asdict(definition)}
        write_atomically(self.definition, json.dumps(value, indent=1).encode(), mode=0o600)

    def sync(self) -> None:
        """Make what VirtualBox wrote durable: machine states, disks, settings."""
        for folder in (self.snapshots, self.folder):
            if folder.is_dir():
                for path in folder.iterdir():
                    if path.suffix in (".sav", ".vdi", ".vbox", ".nvram") and not path.is_symlink():
                        fsync_file(path)
                fsync_folder(folder)

    def disk_bytes(self) -> int:
        """Space that the VM's files take."""
        total = 0
        for root, _, names in os.walk(self.folder):
            for name in names:
                try:
                    total += os.lstat(os.path.join(root, name)).st_blocks * 512  # noqa: PTH118
                except OSError:
                    continue  # deleted just now
        return total

    def remove(self) -> None:
        """Delete the folder; see `remove_folder`."""
        remove_folder(self.folder)


class Record:
    """What is remembered of a VM of ours: its Definition, in memory and on the disk the same."""

    def __init__(self, files: VmFiles, definition: Definition) -> None:
        self.files = files
        self.definition = definition

    def change(self, **changes: Any) -> None:
        """Fields of the Definition, stored when one of them differs. Raises OSError; nothing has changed then."""
        changed = replace(self.definition, **changes)
        if changed != self.definition:
            self.files.store(changed)
            self.definition = changed
