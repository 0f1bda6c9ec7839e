"""Where VirtualBox is on this computer: its command-line program, and its folder of this user. Runs nothing.

For wrapper and HostMain alike.
"""

from __future__ import annotations

import os
import platform
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


def program(environment: Mapping[str, str] = os.environ, system: str = sys.platform) -> str | None:
    """The VBoxManage of this computer, the program itself rather than a script around it; None if there is none."""
    return next((found for place in _candidates(environment, system) if (found := shutil.which(place))), None)


def _candidates(environment: Mapping[str, str], system: str) -> Iterator[str]:
    if told := environment.get(PROGRAM_VARIABLE):
        yield told
        return
    for variable in ("VBOX_MSI_INSTALL_PATH", "VBOX_INSTALL_PATH"):  # Oracle's installer on Windows sets one of them
        if folder := environment.get(variable):
            yield str(Path(folder) / "VBoxManage.exe")
    yield from _PLACES.get(system, ())
    yield "VBoxManage"


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
