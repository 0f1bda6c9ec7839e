"""VirtualBox's settings file of a VM of ours, as far as we change it while VirtualBox does not know the VM.

Media, states and snapshots are named in it as seen from its folder. What is absolute is the file of the serial port, in
the settings and in those of each snapshot, where no VBoxManage reaches it, and the text of the description.
"""

from __future__ import annotations

import logging
import re
import stat
from pathlib import Path
from xml.sax.saxutils import escape

from vmcontrol.common.atomicfile import write_atomically

log = logging.getLogger(__name__)

SIZE_LIMIT = 16 * 1024 * 1024
"""Bytes. With a snapshot it has 7 KB."""
_SERIAL = re.compile(r'<Port\b[^<>]*\spath="([^"<>]*)[/\\\\]Logs[/\\\\]serial\.txt"')


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
