"""The files of one VM of ours, and what is remembered of it.

<slot>/vm/<name>/vmwrapper.json   Definition (0600: it holds the one-time token); written before VirtualBox hears
                                  of the VM, so that whatever a crash leaves can be found and removed
                 <name>.vbox      VirtualBox's settings of the VM, and its previous version .vbox-prev
                 base-*.vmdk, image, disk-*.vdi, further*  media.py
                 Snapshots/       VirtualBox's: differences and machine states
                 Logs/            VirtualBox's; and serial.txt, the guest's first serial port since the VM's last
                                  start, which VirtualBox begins anew each time: it is copied to the console log
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmcontrol.common.atomicfile import fsync_file, fsync_folder
from vmcontrol.hypervisors.common import folder as common
from vmcontrol.hypervisors.common.folder import VmDefinition, VmFolder

DEFINITION = "vmwrapper.json"


@dataclass(frozen=True, slots=True)
class HostForward:
    """A forward of a VM. wanted: the host port that was asked for, 0: any; used: the one in its rule now."""

    name: str
    guest_port: int
    wanted: int
    used: int
    remote: bool = False

    @property
    def rule(self) -> str:
        """VirtualBox's rule. remote: on all of the host's addresses, else on its loopback."""
        return f"{self.name},tcp,{'' if self.remote else '127.0.0.1'},{self.used},,{self.guest_port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition(VmDefinition):
    """What a VM was made for. Where VirtualBox says other, it is brought into line at the next start."""

    uuid: str
    forwards: tuple[HostForward, ...]
    network_nic: int
    """Number of the NIC that leads to the granted network; 0: none."""
    token: str = ""
    agent_nic: int = 1
    """Number of the NIC that has the forwards."""
    complete: bool = False
    """VirtualBox knows all of it. False: making it was cut off, and it is no VM."""
    console_start: int = 0
    """Size of the console log when the VM was last started: what is beyond it is the beginning of serial.txt."""
    running: bool = False
    """It was started, and has not ended in order since: its disk may be in the middle of something."""


class VmFiles(VmFolder[Definition]):
    """The folder of one VM."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, Definition, DEFINITION, "version")
        self.settings = folder / f"{folder.name}.vbox"
        self.previous_settings = folder / f"{folder.name}.vbox-prev"
        self.snapshots = folder / "Snapshots"
        self.logs = folder / "Logs"
        self.log = self.logs / "VBox.log"
        self.serial = self.logs / "serial.txt"

    def further(self, uuid: str) -> list[Path]:
        """The descriptors of further disks that are there of the VM with this UUID (media.py)."""
        return sorted(self.folder.glob(f"further*-{uuid[:8]}.vmdk"))

    def sync(self) -> None:
        """Make what VirtualBox wrote durable: machine states, disks, settings."""
        for folder in (self.snapshots, self.folder):
            if folder.is_dir():
                for path in folder.iterdir():
                    if path.suffix in (".sav", ".vdi", ".vbox", ".nvram") and not path.is_symlink():
                        fsync_file(path)
                fsync_folder(folder)


class Record(common.Record[Definition]):
    """What is remembered of a VM of ours."""

    def __init__(self, files: VmFiles, definition: Definition) -> None:
        super().__init__(files, definition)
        self.files = files
