"""What of this computer keeps virtual machines from running, seen without starting one. For `vmwrapper doctor`.

Reads only. A hint is a sentence that says what is there and what to do; what a test boot shows counts more than any.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import psutil

from vmcontrol.common.virtualbox import home
from vmcontrol.hypervisors.choose import virtualbox_advice
from vmcontrol.hypervisors.interface import NO_VIRTUALIZATION

LEAST_MEMORY_MB, LEAST_DISK_MB = 1024, 2048
"""A job's VM has 512 MiB by default and writes its memory to disk when it is saved."""


def hints(folder: Path, *, virtualbox: str = "", root: Path = Path("/")) -> list[str]:
    """What stands out. folder: where VMs would be made. virtualbox: its version, as it says. root: of the system, for
    tests."""
    return [*_processor(root), *_room(folder), *_virtualbox(root, virtualbox), *_kvm(root)]


def _processor(root: Path) -> Iterator[str]:
    try:
        flags = re.search(r"^flags\s*:(.*)$", (root / "proc" / "cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return
    if flags and not {"vmx", "svm"} & set(flags[1].split()):
        yield (
            "the processor shows no hardware virtualization (VT-x, AMD-V): switch it on in the firmware set-up (BIOS,"
            f" UEFI); in a virtual machine, allow nested virtualization there [{NO_VIRTUALIZATION}]"
        )


def _room(folder: Path) -> Iterator[str]:
    memory = psutil.virtual_memory().available // 2**20
    if memory < LEAST_MEMORY_MB:
        yield f"only {memory} MiB of memory are available: jobs with virtual machines wait until there is more"
    free = psutil.disk_usage(str(folder)).free // 2**20
    if free < LEAST_DISK_MB:
        yield f"only {free} MiB are free on the disk of {folder}: free some space"
    if not os.access(folder, os.W_OK):
        yield f"{folder} cannot be written by this user"


def _virtualbox(root: Path, version: str) -> Iterator[str]:
    settings = home()
    there = next(place for place in (settings, *settings.parents) if place.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        yield f"VirtualBox's settings folder {settings} cannot be written by this user: change the owner of {there}"
    installed = (root / "usr/lib/virtualbox").is_dir() or (root / "opt/VirtualBox").is_dir()
    device = root / "dev" / "vboxdrv"
    if installed and not device.exists():
        yield f"/dev/vboxdrv is not there: {virtualbox_advice('driver-missing')}"
    driver = _first_words(root / "sys/module/vboxdrv/version")
    if version and driver and not re.match(rf"{re.escape(version)}(?!\d)", driver):
        yield f"VirtualBox is {version}, its kernel driver {driver}: {virtualbox_advice('driver-version')}"
    if installed and device.exists() and not _in_group("vboxusers"):
        yield "this user is not in the group vboxusers: some installations need that (as root: adduser USER vboxusers)"


def _kvm(root: Path) -> Iterator[str]:
    device = root / "dev" / "kvm"
    flag = _first_words(root / "proc/cpuinfo", r"^flags\s*:.*\b(vmx|svm)\b")
    if flag and not device.exists():
        module = "kvm_intel" if flag == "vmx" else "kvm_amd"
        yield f"/dev/kvm is not there, so QEMU would emulate: load the module (as root: modprobe {module})"
    for module in ("kvm_intel", "kvm_amd"):
        try:
            users = int((root / "sys/module" / module / "refcnt").read_text())
        except (OSError, ValueError):
            continue
        if users > 0:
            yield f"{module} is in use by another virtual machine: VirtualBox may not run beside it"
    if device.exists() and not os.access(device, os.R_OK | os.W_OK):
        yield "this user may not use /dev/kvm, so QEMU would emulate: add the user to the group kvm"


def _first_words(path: Path, pattern: str = r"\A\s*(\S+)") -> str:
    """What the pattern's group finds in a small file of the system; empty where there is none."""
    try:
        found = re.search(pattern, path.read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1] if found else ""


def _in_group(name: str) -> bool:
    if os.name != "posix" or os.geteuid() == 0:
        return True
    import grp

    try:
        return grp.getgrnam(name).gr_gid in os.getgroups()
    except KeyError:
        return True
