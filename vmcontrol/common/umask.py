"""Files that our programs make are written by their account alone, whatever umask the client was started with."""

from __future__ import annotations

import os

OTHERS_MAY_NOT_WRITE = 0o022


def tighten() -> int:
    """Add to this process's umask that neither group nor others may write; returns the umask before."""
    before = os.umask(0o077)
    os.umask(before | OTHERS_MAY_NOT_WRITE)
    return before
