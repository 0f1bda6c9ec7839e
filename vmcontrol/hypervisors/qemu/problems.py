"""QEMU's error messages, and what they mean. Pure. The texts are those of QEMU 7.2 unless a comment says otherwise."""

from __future__ import annotations

import re

from vmcontrol.hypervisors.common.problems import HOUR, MINUTE, MINUTES_5, look_up, one_line, row
from vmcontrol.hypervisors.interface import HostProblem, HypervisorError

PROBLEMS = (
    row(r"cannot set up guest memory|cannot allocate memory|unable to allocate", "no-memory"),
    row(
        r"no space left on device|disk quota exceeded|file too large|not enough (free )?space|the disk is full"
        r"|\berror -(28|122|27)\b|\b(ENOSPC|EDQUOT|EFBIG)\b",
        "disk-full",
    ),
    row(r"could not set up host forwarding rule", "port-taken"),
    row(
        r'failed to get "?\w+"? lock|failed to get shared',
        "disk-locked",
        "another process still uses the virtual machine's disk; it will be tried again",
        MINUTE,
    ),
    # The driver checks the image itself; these are for one that vanished or broke later.
    row(
        r'"node-name": "image".*: (could not open|image is|invalid|unsupported|not a)'
        r"|could not open backing (file|image)",
        "image-damaged",
    ),
    row(r"read-only file system", "read-only", "BOINC's data folder cannot be written", HOUR),
    row(r"permission denied", "no-permission"),
    row(r"too many open files", "no-files"),
    row(
        r"could not load (pc bios|firmware)|could not find bios|failed to find romfile",
        "qemu-incomplete",
        "QEMU is installed without its firmware; reinstall QEMU (Debian: qemu-system-x86 and seabios)",
    ),
    row(
        r"unsupported machine type|machine type received is",
        "qemu-version",
        "this virtual machine was made by another version of QEMU than the one installed now",
    ),
    row(
        r"device or resource busy|failed to initialize kvm|could not access kvm",
        "accelerator-taken",
        "hardware virtualization is in use by another program (VirtualBox, for example) or switched off",
        MINUTES_5,
    ),
)

_INPUT_OUTPUT = re.compile(r"input/output error|\berror -5\b|\bEIO\b|gave no reason", re.IGNORECASE)
"""What QEMU says of a full disk where it writes the machine's state into a snapshot."""


def explain(what: str, text: str, *, has_room: bool = True) -> HypervisorError:
    """The error for `text`, which QEMU or qemu-img said when `what` was tried.

    has_room: False when the disk has less space left than what was tried may need: then an input/output error is that.
    """
    words = one_line(text)
    if not has_room and _INPUT_OUTPUT.search(words):
        words += " (no space left on device)"
    return look_up(PROBLEMS, what, words)


def qemu_missing(program: str) -> HostProblem:
    """The program is not installed."""
    return HostProblem(
        f"QEMU is not installed ({program} is not on the PATH); Debian: apt install qemu-system-x86 qemu-utils",
        key="qemu-missing",
        delay_s=None,
    )
