"""What a VM can be given: the one place for the limits that job file, `check`, wrapper, XML-RPC and drivers hold. Pure.

The job file is checked against what any hypervisor takes; the chosen one is asked for its own limit when a VM is made
(interface.Hypervisor.max_cpus).
"""

from __future__ import annotations

MEMORY_MB = range(16, 1024 * 1024 + 1)
"""MiB. No Linux boots with less; 1 TiB is more than a volunteer's computer has (VirtualBox's own limit is 2 TiB)."""
QEMU_CPUS = 255
"""QEMU's machine q35 says 288; more than 255 need KVM, and an interrupt remapper that ours has not."""
VIRTUALBOX_CPUS, VIRTUALBOX_CPUS_BEFORE_7 = 64, 32
"""Where VirtualBox does not say it ("Maximum guest CPU count" of `VBoxManage list systemproperties`)."""
MOST_CPUS = max(QEMU_CPUS, VIRTUALBOX_CPUS)
"""More than this no hypervisor takes."""
MOST_DISKS = 8
"""Beside the image. A VM of VirtualBox has 30 ports for disks, one of QEMU 31 places for devices."""
SAFE_CPUS = min(QEMU_CPUS, VIRTUALBOX_CPUS_BEFORE_7)
"""So many every hypervisor takes: nobody has to be asked."""


def fault_of(memory_mb: int, cpus: int, most_cpus: int, hypervisor: str) -> str:
    """Why such a VM cannot be, in words; empty when it can. most_cpus: what the hypervisor takes."""
    if memory_mb not in MEMORY_MB:
        return f"{memory_mb} MiB of memory cannot be: it has to be from {MEMORY_MB[0]} to {MEMORY_MB[-1]} MiB"
    if cpus < 1:
        return f"{cpus} processors cannot be"
    if cpus > most_cpus:
        return f"{cpus} processors are more than {hypervisor} takes: at most {most_cpus}"
    return ""


def more_than_there_is(memory_mb: int, cpus: int, *, there_mb: int, there_cpus: int) -> list[str]:
    """Lines for a VM that is given more than the computer has: it may be slow, or not start at all."""
    lines = []
    if memory_mb > there_mb:
        lines.append(f"the virtual machine is to have {memory_mb} MiB of memory, and this computer has {there_mb}")
    if cpus > there_cpus:
        lines.append(f"the virtual machine is to have {cpus} processors, and this computer has {there_cpus}")
    return lines
