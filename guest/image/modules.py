"""Which kernel modules the guest gets; kmod resolves what they need and writes the tables of the guest's modprobe."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from guest.image.tools import run

BOOT_MODULES = (
    # what carries the disk: QEMU's and VirtualBox's
    "virtio_pci",
    "virtio_blk",
    "virtio_scsi",
    "ahci",
    "ata_piix",
    "ata_generic",
    "mptspi",
    "mptsas",
    "megaraid_sas",
    "BusLogic",
    "sym53c8xx",
    "nvme",
    "sd_mod",
    # network cards
    "virtio_net",
    "e1000",
    "e1000e",
    "pcnet32",
    # file systems
    "squashfs",
    "ext4",
    "crc32c_generic",
    "crc32c_intel",
    # entropy: Python waits for it at its start
    "virtio_rng",
)
"""In the initramfs: what may be needed before the system is there."""

LATER_MODULES = (
    "button",
    "evdev",
    "virtio_balloon",
    "virtio_console",
    "overlay",
    "loop",
    "fuse",
    "isofs",
    "sr_mod",
    "vfat",
)
"""In the system: loaded when a device or a mount asks for them, or by a project's own files."""

NO_CONFIGURATION = ("--config", "/dev/null")
"""Not this computer's own aliases and blacklists."""
TABLES = ("modules.dep", "modules.alias")
"""What busybox's modprobe reads of depmod's tables."""


def index(root: Path, version: str) -> None:
    """Write the tables of all modules below `root`/lib/modules/VERSION: Debian's kernel package has none."""
    run(["depmod", *NO_CONFIGURATION, "--basedir", root, version])


def closure(root: Path, version: str, names: Iterable[str]) -> list[Path]:
    """Files of these modules and of all they need, from an indexed tree; what is built in has none.

    Raises BuildError, which names a module that is not there.
    """
    kernel = ("--dirname", root, "--set-version", version)
    listed = run(["modprobe", *NO_CONFIGURATION, *kernel, "--show-depends", "--all", *names])
    steps = (line.partition(" ") for line in listed.splitlines())  # insmod PATH, or builtin NAME
    return sorted({Path(path.strip()) for kind, _, path in steps if kind == "insmod"})


def install(files: Iterable[Path], root: Path, version: str) -> None:
    """Put modules side by side into `root`/lib/modules/VERSION, with the tables that modprobe needs."""
    target = root / "lib/modules" / version
    target.mkdir(parents=True)
    for path in files:
        shutil.copyfile(path, target / path.name)
    index(root, version)
    for table in target.glob("modules.*"):
        if table.name not in TABLES:
            table.unlink()
