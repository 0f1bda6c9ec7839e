"""Which words of a job file may name what. Pure: each function gives None, or one sentence that says what was expected.

The rule behind it: what the host writes for a guest is named by job.xml alone and stays in the slot
(docs/projects/job-file.md, "File names"). Host tasks run programs of the project on the host anyway and keep
the freedom they have with BOINC's wrapper.
"""

from __future__ import annotations

import functools
import posixpath
import re
import unicodedata
from pathlib import PurePosixPath

from vmcontrol.common import slotfiles

MAX_NAME = 1000
"""Characters; BOINC's buffers for paths have 1024."""
MAX_PART_BYTES = 255
"""NAME_MAX of Linux and macOS; Windows counts as many UTF-16 units. A longer one can never be the name of a file."""

KEPT_PREFIXES = ("boinc_uf", "vmwrapper_", ".vmwrapper_", f".{slotfiles.GRAPHICS_STATUS}")
"""Of names that client or wrapper keep for themselves: also what is made beside a file before it takes its place."""
UNPACKED_PREFIX = "_mei"
"""Folders of the frozen executable's libraries."""

_DRIVE = re.compile(r"[A-Za-z]:")


TEMPORARY_PREFIX = ".vmwrapper_"
"""Of files that are made beside others before they take their place."""


def is_kept_by_us(name: str) -> bool:
    """Whether client or wrapper keep this file of the slot for themselves. stderr.txt and job.xml are no such files."""
    if name in (slotfiles.STDERR, slotfiles.JOB_FILE):
        return False
    return name in slotfiles.RESERVED or name.startswith(KEPT_PREFIXES)


def is_one_line(text: str) -> bool:
    """Whether a value is free of line breaks and other control characters."""
    return not any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in text)


def fault_of_any_name(name: str) -> str | None:
    """For names that only tasks on the host use, and for names in the guest."""
    if not is_one_line(name):
        return "expected a name without line breaks or control characters"
    if len(name) > MAX_NAME:
        return f"expected a name of at most {MAX_NAME} characters"
    if any(len(part.encode("utf-8", "surrogatepass")) > MAX_PART_BYTES for part in name.split("/")):
        return f"expected a name of at most {MAX_PART_BYTES} bytes between slashes, which is all that a folder takes"
    return None


def fault_of_slot_name(name: str) -> str | None:
    """For a file of a guest task on the host: a relative path that stays in the slot on every system."""
    fault = fault_of_any_name(name)
    if fault:
        return fault
    path = PurePosixPath(name)
    if path.is_absolute() or "\\" in name or _DRIVE.match(name):
        return f"expected a relative name with / between folders, not {name!r}"
    if ".." in path.parts:
        return f"expected a name without '..', not {name!r}: files of a guest task stay in the slot"
    if not path.parts or name.endswith("/"):
        return f"expected the name of a file, not {name!r}"
    return None


def fault_of_written_name(name: str) -> str | None:
    """For a file that the host writes with what came out of a guest."""
    fault = fault_of_slot_name(name)
    if fault:
        return fault
    parts = PurePosixPath(name).parts
    # Case is folded because Windows' and macOS' file systems do.
    first = parts[0].casefold()
    if (
        first in slotfiles.RESERVED
        or first == slotfiles.VM_FOLDER
        or first.startswith((*KEPT_PREFIXES, UNPACKED_PREFIX))
        or (len(parts) == 1 and slotfiles.TRICKLE_DOWN in first)
    ):
        return f"expected another name than {name!r}, which the BOINC client or vmwrapper uses itself"
    return None


@functools.lru_cache(maxsize=100)
def fault_of_our_name(name: str) -> str | None:
    """For what is written for a program on the host: any name, as with BOINC's wrapper, but that of a file of ours."""
    plain = posixpath.normpath(name).casefold()
    if plain in slotfiles.RESERVED and plain.startswith("vmwrapper_"):
        return f"expected another name than {name!r}, a file that vmwrapper keeps for itself"
    return None


def fault_of_vm_name(name: str) -> str | None:
    """For virtualmachine: usable as a name for every hypervisor, as a folder, and as an argument of VBoxManage."""
    if not is_one_line(name) or len(name) > 200:
        return "expected one line of at most 200 characters"
    if "/" in name or "\\" in name or name in (".", "..") or name.startswith("-"):
        return f"expected a name without slashes that does not begin with '-', not {name!r}"
    return None
