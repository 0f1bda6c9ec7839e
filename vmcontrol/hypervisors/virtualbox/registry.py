"""VirtualBox's own XML files: VirtualBox.xml, which VMs and media it remembers, and the settings of a VM of ours.

Of a VM whose files are gone VBoxManage shows neither name nor path (`<inaccessible>`); the path is read in
VirtualBox.xml. Media stand there after a snapshot that was cut off: VirtualBox's service takes them for used, and keeps
them when their VM goes. VirtualBox.xml is only read. Settings are changed while VirtualBox does not know the VM: media,
states and snapshots are named in them as seen from the VM's folder; absolute is the file of the serial port, also in
each snapshot, where no VBoxManage reaches it, and the text of the description.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

from lxml import etree

from vmcontrol.common.atomicfile import write_atomically
from vmcontrol.hypervisors.virtualbox.files import DEFINITION

log = logging.getLogger(__name__)

OUR_NAMES = "vmwrapper_"
"""The wrapper names its VMs so."""
SIZE_LIMIT = 16 * 1024 * 1024
"""Bytes. With a snapshot it has 7 KB."""
_SERIAL = re.compile(r'<Port\b[^<>]*\spath="([^"<>]*)[/\\\\]Logs[/\\\\]serial\.txt"')


def settings_files(home: Path) -> Mapping[str, Path]:
    """UUID -> settings file of each registered VM, from VirtualBox.xml in `home`; empty when it cannot be read."""
    found: dict[str, Path] = {}
    for entry in _elements(home, "MachineEntry"):
        uuid, path = entry.get("uuid"), entry.get("src")
        if uuid and path:
            found[uuid.strip("{}").lower()] = home / path  # an absolute path stays as it is
    return found


def is_another_slots(settings: Path, folder: Path) -> bool:
    """Whether a registered VM with these settings is one that vmwrapper made and uses in another slot than this one.

    A copy of BOINC's data folder has VMs of the same names, and of the same UUIDs. folder: <slot>/vm.
    """
    return not is_same_folder(settings.parent.parent, folder) and (settings.parent / DEFINITION).is_file()


def is_same_folder(one: Path, other: Path) -> bool:
    """VirtualBox may have a path as it was given, or with its links resolved."""
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def vanished_media(home: Path, folder: Path) -> list[Path]:
    """Disks in VirtualBox.xml whose files are gone with a VM of ours, children before their parents. folder: <slot>/vm.

    Those of VMs are in the VMs' settings; VirtualBox.xml has what nothing uses.
    """
    disks = [home / place for entry in _elements(home, "HardDisk") if (place := entry.get("location"))]
    return [disk for disk in reversed(disks) if not disk.exists() and _was_ours(disk, folder)]


def _was_ours(disk: Path, folder: Path) -> bool:
    """<slot>/vm/<VM>/disk-*.vdi, or one folder deeper."""
    return any(
        not vm.exists() and (vm.parent == folder or (vm.name.startswith(OUR_NAMES) and vm.parent.name == folder.name))
        for vm in (disk.parent, disk.parent.parent)
    )


def _elements(home: Path, name: str) -> list[etree._Element]:
    parser = etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=False)
    try:
        root = etree.parse(str(home / "VirtualBox.xml"), parser).getroot()
    except (OSError, etree.XMLSyntaxError) as error:
        log.info("VirtualBox's registry cannot be read: %s", error)
        return []
    return list(root.iter(f"{{*}}{name}"))


def is_ours(settings: Path, folder: Path) -> bool:
    """Whether a VM with these settings was made below `folder` (<slot>/vm), or in a slot that is gone."""
    if settings.parent.parent == folder:
        return True
    made_by_us = settings.stem.startswith(OUR_NAMES) and settings.parent.name == settings.stem
    return made_by_us and settings.parent.parent.name == folder.name and not settings.parent.exists()


def moved(text: str, folder: str) -> str:
    """The settings with each mention of the VM's old folder, known by the serial port's file, replaced by `folder`."""
    new = escape(folder, {'"': "&quot;"})
    for old in dict.fromkeys(_SERIAL.findall(text)):
        if old and old != new:
            text = text.replace(old, new)
    return text


def move_here(settings: Path, folder: Path) -> None:
    """Bring a settings file into line with the folder that it is in. Raises OSError; nothing has changed then."""
    if settings.is_symlink() or not settings.is_file() or settings.stat().st_size > SIZE_LIMIT:
        return
    try:
        before = settings.read_bytes().decode()
    except UnicodeDecodeError:
        return  # damaged; VirtualBox says so
    after = moved(before, str(folder))
    if after != before:
        log.info("%s: brought into line with its folder, which was moved or copied", settings.name)
        write_atomically(settings, after.encode(), mode=stat.S_IMODE(settings.stat().st_mode))
