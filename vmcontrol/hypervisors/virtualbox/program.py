"""Where VirtualBox's command-line program is on this computer. Runs nothing, and imports little."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

PROGRAM_VARIABLE = "VMWRAPPER_VBOXMANAGE"
"""Environment variable that names the VBoxManage to call."""
_PLACES = {
    # Debian's and Oracle's /usr/bin/VBoxManage are scripts that warn on stdout; these are the program itself.
    "linux": ("/usr/lib/virtualbox/VBoxManage", "/opt/VirtualBox/VBoxManage", "/usr/lib64/virtualbox/VBoxManage"),
    "darwin": ("/Applications/VirtualBox.app/Contents/MacOS/VBoxManage",),
    "win32": ("C:\\Program Files\\Oracle\\VirtualBox\\VBoxManage.exe",),
}


def find(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> str | None:
    """The VBoxManage of this computer, the program itself rather than a script around it; None if there is none."""
    return next((found for place in _candidates(environment, platform) if (found := shutil.which(place))), None)


def _candidates(environment: Mapping[str, str], platform: str) -> Iterator[str]:
    if told := environment.get(PROGRAM_VARIABLE):
        yield told
        return
    for variable in ("VBOX_MSI_INSTALL_PATH", "VBOX_INSTALL_PATH"):  # Oracle's installer on Windows sets one of them
        if folder := environment.get(variable):
            yield str(Path(folder) / "VBoxManage.exe")
    yield from _PLACES.get(platform, ())
    yield "VBoxManage"
