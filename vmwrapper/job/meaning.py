"""What tasks mean, apart from how and where a job file says it. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace

from vmwrapper.job.model import Program, Task

_ELEMENTS = {
    "time_limit_s": "time_limit",
    "job_duration_s": "job_duration",
    "minimum_checkpoint_interval_s": "minimum_checkpoint_interval",
    "boot_timeout_s": "boot_timeout",
    "app_path_vm": "app_pathVM",
    "copy_app_to_vm": "copy_app_to_VM",
    "copy_files_to_vm": "copy_file_to_VM",
    "copy_files_from_vm": "copy_file_from_VM",
    "port_forwards": "port_forward",
    "memory_mb": "memory_size_mb",
    "os_type": "os_name",
    "network": "enable_network",
    "remote_desktop": "enable_remotedesktop",
    "trickle_trigger_files": "trickle_trigger_file",
}
"""Where the model's names are not the job file's."""


def digest(program: Program) -> str:
    """SHA-256, hex, of all that a task says."""
    said = repr(replace(program, line=0))
    if isinstance(program, Task) and program.guest is not None and program.guest.container:
        said += repr((program.guest.container, program.guest.container_workdir))
    return hashlib.sha256(said.encode("utf-8", "surrogateescape")).hexdigest()


def differences(one: Program, other: Program) -> list[str]:
    """The elements in which two tasks differ; none: they mean the same."""
    if type(one) is not type(other):
        return ["task"]
    return _differences(replace(one, line=0), replace(other, line=0))


def _differences(one: object, other: object) -> list[str]:
    found: list[str] = []
    for name in (field.name for field in fields(one)):  # type: ignore[arg-type]
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine == theirs:
            continue
        if name in ("guest", "host", "settings") and type(mine) is type(theirs):
            found += _differences(mine, theirs)
        else:
            found.append("virtualmachine" if name == "guest" else _ELEMENTS.get(name, name))
    return found
