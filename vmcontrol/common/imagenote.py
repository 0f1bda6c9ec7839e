"""What a disk image says of itself: a line of text in the comment of a VDI's header, which hypervisors leave alone.

    write      the comment of a new image
    read       what it says; an image of another format, or of somebody else, says nothing

A file's bytes are only ever read here, and nothing in them is trusted to be what it should be.
"""

from __future__ import annotations

import re
from pathlib import Path

COMMENT_AT, COMMENT_BYTES = 0x54, 256
"""VirtualBox src/VBox/Storage/VDICore.h, VDIHEADER1: szComment, which ends with a zero."""
_SIGNATURE_AT, _SIGNATURE = 0x40, b"\x7f\x10\xda\xbe"
_NOTE = re.compile(rb"vmwrapper: needs (\d{1,7}) MiB")


def write(needed_mb: int) -> bytes:
    """The comment of an image whose guest needs so much memory to boot."""
    return f"vmwrapper: needs {needed_mb} MiB".encode("ascii").ljust(COMMENT_BYTES, b"\0")


def read(image: Path) -> int | None:
    """MiB of memory that the guest in this image needs; None when it does not say. Raises OSError."""
    with image.open("rb") as file:
        header = file.read(COMMENT_AT + COMMENT_BYTES)
    if header[_SIGNATURE_AT : _SIGNATURE_AT + len(_SIGNATURE)] != _SIGNATURE:
        return None
    match = _NOTE.match(header, COMMENT_AT)
    return int(match[1]) if match else None


def too_little(needed_mb: int | None, given_mb: int, image: str) -> str:
    """Why the guest in an image will not boot with so much memory; empty when it may."""
    if needed_mb is None or given_mb >= needed_mb:
        return ""
    return f"the guest in {image} needs {needed_mb} MiB of memory, not {given_mb}"
