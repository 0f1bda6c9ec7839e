"""VMs that VirtualBox remembers although their files are gone, and which of them are ours to be forgotten.

Of such a VM VBoxManage shows neither name nor path (`<inaccessible>`); the path is read in VirtualBox.xml. Reads only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from lxml import etree

log = logging.getLogger(__name__)

OUR_NAMES = "vmwrapper_"
"""The wrapper names its VMs so."""


def settings_files(home: Path) -> Mapping[str, Path]:
    """UUID -> settings file of each registered VM, from VirtualBox.xml in `home`; empty when it cannot be read."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=False)
    try:
        root = etree.parse(str(home / "VirtualBox.xml"), parser).getroot()
    except (OSError, etree.XMLSyntaxError) as error:
        log.info("VirtualBox's registry cannot be read: %s", error)
        return {}
    found: dict[str, Path] = {}
    for entry in root.iter("{*}MachineEntry"):
        uuid, path = entry.get("uuid"), entry.get("src")
        if uuid and path:
            place = Path(path)
            found[uuid.strip("{}").lower()] = place if place.is_absolute() else home / place
    return found


def is_ours(settings: Path, folder: Path) -> bool:
    """Whether a VM with these settings was made below `folder` (<slot>/vm), or in a slot that is gone."""
    if settings.parent.parent == folder:
        return True
    made_by_us = settings.stem.startswith(OUR_NAMES) and settings.parent.name == settings.stem
    return made_by_us and settings.parent.parent.name == folder.name and not settings.parent.exists()
