"""The files by which an application and the BOINC client speak: finish, temporary exit, uploads, trickles.

Facts: api/boinc_api.cpp, client/app_control.cpp. Owns nothing; every function
takes the slot's folder. What must survive a power failure is written atomically and synced.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from vmcontrol.common import slotfiles
from vmcontrol.common.atomicfile import write_atomically
from vmwrapper.boinc.runtime import BoincError, UploadStatus

MAX_DELAY_S = 86400
"""client/app_control.cpp, temporary_exit_file_present: a longer delay counts as 300 s."""
MAX_REASON_BYTES = 250
"""The client reads a line into 256 bytes; the rest of a longer one would be taken for the next line."""
MAX_MESSAGE_BYTES = 1000

_STATUS = re.compile(rb"<status>\s*(-?\d+)\s*</status>")


def write_finish_file(folder: Path, status: int, message: str = "", *, notice: bool = False) -> None:
    """boinc_finish_called, durable: from then on exit status 0 means that the job is done. Raises OSError."""
    text = f"{status}\n"
    if message:
        text += f"{_one_line(message, MAX_MESSAGE_BYTES)}\n{'notice' if notice else ''}\n"
    write_atomically(folder / slotfiles.FINISH_FILE, text.encode("utf-8", "replace"))


def write_temporary_exit_file(folder: Path, delay_s: int, reason: str, *, notice: bool = False) -> None:
    """boinc_temporary_exit, durable. Raises BoincError when there is no reason: the client would count a crash."""
    line = _one_line(reason, MAX_REASON_BYTES)
    if not line:
        raise BoincError("boinc_temporary_exit: needs a reason")
    delay = min(max(int(delay_s), 0), MAX_DELAY_S)
    text = f"{delay}\n{line}\n" + ("notice\n" if notice else "")
    write_atomically(folder / slotfiles.TEMPORARY_EXIT_FILE, text.encode("utf-8", "replace"))


def write_trickle_up(folder: Path, variety: str, text: str) -> None:
    """trickle_up.xml, which the client moves away when it is told of it."""
    content = f"<variety>{variety}</variety>\n{text}"
    write_atomically(folder / slotfiles.TRICKLE_UP, content.encode("utf-8", "replace"))


def trickle_up_waits(folder: Path) -> bool:
    """Whether the client has not taken the last one yet. What is no file is replaced by the next one."""
    try:
        return stat.S_ISREG((folder / slotfiles.TRICKLE_UP).lstat().st_mode)
    except OSError:
        return False


def trickles_down(folder: Path) -> list[str]:
    """Names of the trickle-down files in the slot, oldest name first. The client makes no links of them."""
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if slotfiles.TRICKLE_DOWN in entry.name and entry.is_file(follow_symlinks=False)
    )


def request_upload(folder: Path, logical: str) -> None:
    """Ask for a file to be uploaded before the job ends; the client looks when it is told. Raises OSError."""
    write_atomically(folder / f"{slotfiles.UPLOAD_REQUEST_PREFIX}{_plain_name(logical)}", b"")


def upload_status(folder: Path, logical: str) -> UploadStatus:
    """What the client wrote about an upload; it writes the file in place, so a half one counts as none."""
    try:
        content = (folder / f"{slotfiles.UPLOAD_STATUS_PREFIX}{_plain_name(logical)}").read_bytes()
    except OSError:
        return UploadStatus.NOT_READY
    found = _STATUS.search(content)
    if found is None:
        return UploadStatus.NOT_READY
    # The client writes the file's status: 0 or 1 (FILE_PRESENT) when it is uploaded, an ERR_ number when it is not.
    return UploadStatus.DONE if int(found[1]) in (0, 1) else UploadStatus.FAILED


def _plain_name(logical: str) -> str:
    if not logical or "/" in logical or "\\" in logical or "\0" in logical:
        raise BoincError(f"boinc_upload_file: {logical!r} is no logical name of a file in the slot")
    return logical


def _one_line(text: str, limit: int) -> str:
    line = " ".join(text.split())
    return line.encode("utf-8", "replace")[:limit].decode("utf-8", "ignore")
