"""The names that the wrapper gives: VMs, snapshots, commands. Pure.

A name tells the next start of the slot, and a person who reads the hypervisor's list, to whom the VM belongs.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

NAME_LIMIT = 100
"""Characters; VirtualBox makes folder names of VM names, and UNIX socket paths end at 108."""
VM_PREFIX = "vmwrapper_"
SNAPSHOT_PREFIX = "vmwrapper_"
STANDALONE = "byhand"
"""Stands for project and result without a client."""

_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9._-]+")
_SNAPSHOT = re.compile(re.escape(SNAPSHOT_PREFIX) + r"([0-9]{1,9})")


def reduced(text: str, limit: int = NAME_LIMIT) -> str:
    """`text` with every run of other characters than [A-Za-z0-9._-] as one `-`; a hash ends it where it was cut."""
    name = _NOT_ALLOWED.sub("-", text)
    if len(name) <= limit:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return f"{name[: limit - 11]}_{digest}"


def project_part(project_url: str, slot_folder: Path) -> str:
    """The project in a VM's name; standalone a hash of the slot, so that two slots never share a VM."""
    if project_url:
        return re.sub(r"^[a-z]+://", "", project_url).strip("/")
    return f"{STANDALONE}-{hashlib.sha256(str(slot_folder).encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def vm_name(project: str, result: str, slot: int, virtualmachine: str) -> str:
    """Name of a VM that we make: one for each slot, result and `virtualmachine` of the job."""
    return reduced(f"{VM_PREFIX}{project}_{result or STANDALONE}_{slot}_{virtualmachine}")


def command_id(result: str, task: int, task_digest: str) -> str:
    """Id of a guest command: the same for the same task of the same result, at every start."""
    return reduced(f"{result or STANDALONE}_{task}_{task_digest[:8]}")


def snapshot_name(number: int) -> str:
    return f"{SNAPSHOT_PREFIX}{number}"


def snapshot_number(name: str) -> int | None:
    """The number of a snapshot of ours; None for any other snapshot."""
    match = _SNAPSHOT.fullmatch(name)
    return int(match[1]) if match else None
