"""The disk of a VM over the project's image: neither copied, nor written, nor made known to VirtualBox.

VirtualBox knows media by UUID, for the whole user account, and keeps a base with all its children in the settings of
the VM that came first: two copies of one image, two slots at the same moment or a slot that vanished then break other
slots' VMs. So each VM has a base of its own: a VMDK descriptor of a few hundred bytes with a new UUID, whose read-only
extents say where in the image's file the disk's blocks are (VMware's "Virtual Disk Format 1.1"; VirtualBox reads it).
A differencing child of it is what the guest writes to. All of it lies in the VM's folder, and nothing is shared but the
image's bytes.

    image (VDI or raw) <- base-*.vmdk (text) <- disk-*.vdi (differences) <- Snapshots/{...}.vdi
    further disk       <- further0-*.vmdk (text), "writethrough": snapshots make no differences of it

For the `*` stands the beginning of the VM's UUID: VirtualBox's service does not let go of media after an interrupted
snapshot until it ends, and a VM that is made in the same folder meanwhile must not meet them.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from vmcontrol.hypervisors.common import diskruns
from vmcontrol.hypervisors.common.diskimage import SECTOR, BadImage
from vmcontrol.hypervisors.common.diskruns import Run

LINK = "image"
MOST_EXTENTS = 1000
"""VirtualBox reads at most 1100 lines of a descriptor (src/VBox/Storage/VMDK.cpp, VMDK_DESCRIPTOR_LINES_MAX)."""


def runs(image: Path) -> list[Run]:
    """As diskruns has them, no more than VirtualBox reads. Raises BadImage, or OSError."""
    merged = diskruns.runs(image)
    if len(merged) > MOST_EXTENTS:
        raise BadImage(
            f"its blocks lie in {len(merged)} pieces, more than VirtualBox can be told of ({MOST_EXTENTS}); convert it"
            " with qemu-img convert, which puts them in order"
        )
    return merged


def descriptor(found: Iterable[Run], file_name: str, identity: uuid.UUID, modification: uuid.UUID) -> str:
    """The text of a VMDK descriptor: each run an extent, read-only."""
    parts = list(found)
    sectors = sum(run.length for run in parts) // SECTOR
    extents = "".join(
        f"RDONLY {run.length // SECTOR} ZERO\n"
        if run.offset is None
        else f'RDONLY {run.length // SECTOR} FLAT "{file_name}" {run.offset // SECTOR}\n'
        for run in parts
    )
    return f"""# Disk DescriptorFile
version=1
CID={modification.int & 0xFFFFFFFE or 2:08x}
parentCID=ffffffff
createType="monolithicFlat"

# Extent description
{extents}
# The disk Data Base
#DDB

ddb.virtualHWVersion = "4"
ddb.adapterType="ide"
ddb.geometry.cylinders="{min(max(sectors // (16 * 63), 1), 16383)}"
ddb.geometry.heads="16"
ddb.geometry.sectors="63"
ddb.uuid.image="{identity}"
ddb.uuid.modification="{modification}"
ddb.uuid.parent="{uuid.UUID(int=0)}"
ddb.uuid.parentmodification="{uuid.UUID(int=0)}"
"""


def base_name(vm: str) -> str:
    """File name of the base of the VM with this UUID."""
    return f"base-{vm[:8]}.vmdk"


def disk_name(vm: str) -> str:
    """File name of its differencing disk."""
    return f"disk-{vm[:8]}.vdi"


def further_name(vm: str, number: int) -> str:
    """File name of the descriptor of its further disk with this number, from 0."""
    return f"further{number}-{vm[:8]}.vmdk"


def further_link(number: int) -> str:
    """File name of the link to that disk."""
    return f"further{number}"


def write_base(image: Path, folder: Path, vm: str) -> Path:
    """Make the base of a VM in its folder. vm: its UUID. Raises BadImage, or OSError."""
    base = _write(image, folder / base_name(vm), LINK)
    base.chmod(0o444)
    return base


def write_further(disk: Path, folder: Path, vm: str, number: int) -> Path:
    """Make the descriptor of a further disk of a VM in its folder. Raises BadImage, or OSError.

    VirtualBox opens the descriptor, no more, for writing.
    """
    return _write(disk, folder / further_name(vm, number), further_link(number))


def _write(image: Path, base: Path, link: str) -> Path:
    found = runs(image)
    if any(first.length % SECTOR for first, _ in pairwise(found)):
        raise BadImage("its blocks do not end with a sector")
    if found and found[-1].length % SECTOR:
        raise BadImage("its size is no multiple of a sector")
    base.write_text(
        descriptor(found, _reachable(image, base.with_name(link)), uuid.uuid4(), uuid.uuid4()),
        encoding="utf-8",
        newline="\n",
    )
    return base


def lay_links(image: Path, disks: Iterable[Path], folder: Path) -> None:
    """The links to image and further disks in a VM's folder, relative, so that they hold where the data folder is
    moved to.

    Laid anew before each start: an older version laid an absolute one. Raises OSError.
    """
    if os.name != "posix":
        return
    _lay_link(image, folder / LINK)
    for number, disk in enumerate(disks):
        _lay_link(disk, folder / further_link(number))


def _lay_link(image: Path, link: Path) -> None:
    wanted = os.path.relpath(image.resolve(), link.parent.resolve())
    if link.is_symlink() and os.readlink(link) == wanted:  # noqa: PTH115 (compared as it stands there)
        return
    link.unlink(missing_ok=True)
    link.symlink_to(wanted)


def _reachable(image: Path, link: Path) -> str:
    """A name for the image in the descriptor, which has no way to quote: a link beside it, or on Windows a path."""
    folder = link.parent
    if os.name == "posix":
        _lay_link(image, link)
        return link.name
    try:
        name = os.path.relpath(image.resolve(), folder)
    except ValueError as error:
        raise BadImage(f"it is on another drive than the virtual machine ({folder})") from error
    if '"' in name or not name.isprintable():
        raise BadImage("its path cannot be written into a disk descriptor")
    return name
