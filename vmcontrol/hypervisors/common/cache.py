"""The account's folder for what was found out about this computer, shared by all jobs and versions: one file a subject.

Owns the folder (~/.cache/vmwrapper, or below $XDG_CACHE_HOME). What is in a file is its user's, who reads and writes it
by vmcontrol.common.jsonfile: another version's, or a damaged one, costs only what has to be found out anew.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_file(name: str) -> Path | None:
    """Where something is kept for this account; None where nothing can be kept that others cannot change."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    try:
        folder = (Path(base) if base.startswith("/") else Path.home() / ".cache") / "vmwrapper"
        for missing in [one for one in (*reversed(folder.parents), folder) if not one.exists()]:
            missing.mkdir(mode=0o700, exist_ok=True)  # `parents=True` would leave those above to the umask
        status = folder.stat()
    except (RuntimeError, OSError):
        return None
    if os.name == "posix" and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        return None
    return folder / name
