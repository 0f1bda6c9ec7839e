"""The disk of a VM over the project's image: neither copied, nor written, nor made known to VirtualBox.

VirtualBox knows media by UUID, for the whole user account, and keeps a base with all its children in the settings of
the VM that came first: two copies of one image, two slots at the same moment or a slot that vanished then break other
slots' VMs. So each VM has a base of its own: a VMDK descriptor of a few hundred bytes with a new UUID, whose read-only
extents say where in the image's file the disk's blocks are (VMware's "Virtual Disk Format 1.1"; VirtualBox reads it).
A differencing child of it is what the guest writes to. All of it lies in the VM's folder, and nothing is shared but the
image's bytes.

    image (VDI or raw) <- base-*.vmdk (text) <- disk-*.vdi (differences) <- Snapshots/{...}.vdi

For the `*` stands the beginning of the VM's UUID: VirtualBox's service does not let go of media after an interrupted
snapshot until it ends, and a VM that is made in the same folder meanwhile must not meet them.
"""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vmcontrol.hypervisors.common import diskimage
from vmcontrol.hypervisors.common.diskimage import SECTOR, BadImage

LINK = "image"
MOST_EXTENTS = 1000
"""VirtualBox reads at most 1100 lines of a descriptor (src/VBox/Storage/VMDK.cpp, VMDK_DESCRIPTOR_LINES_MAX)."""
_QCOW2_COMPRESSED, _QCOW2_ZERO = 1 << 62, 1
_OFFSET_MASK = 0x00FFFFFFFFFFFE00


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive bytes of the disk. offset: where they are in the image's file; None: they are zeros."""

    length: int
    offset: int | None


def runs(path: Path) -> list[Run]:
    """Where in the image's file the disk's bytes are, in the disk's order. Raises BadImage, or OSError."""
    image = diskimage.inspect(path)
    with path.open("rb") as file:
        length = file.seek(0, 2)
        if image.format == "raw":
            whole = length - length % SECTOR
            found: Iterable[Run] = [Run(whole, 0)]
        elif image.format == "vdi":
            file.seek(0)
            header = file.read(0x200)
            map_at, data_at = struct.unpack_from("<II", header, 0x154)
            size, block, extra, count = struct.unpack_from("<QIII", header, 0x170)
            if not block or block % SECTOR or (data_at + extra) % SECTOR or count * block < size or count > 1 << 24:
                raise BadImage("its VDI header makes no sense")
            file.seek(map_at)
            blocks = file.read(4 * count)
            found = _vdi(blocks, size=size, block=block, extra=extra, data_at=data_at, length=length)
        else:
            found = _qcow2(path, length)
        merged = list(_merged(found))
    if len(merged) > MOST_EXTENTS:
        raise BadImage(
            f"its blocks lie in {len(merged)} pieces, more than VirtualBox can be told of ({MOST_EXTENTS}); convert it"
            " with qemu-img convert, which puts them in order"
        )
    return merged


def _vdi(blocks: bytes, *, size: int, block: int, extra: int, data_at: int, length: int) -> Iterator[Run]:
    """Entries: the number of the block in the file; the two highest numbers: never written, and zeros."""
    left = size
    for (entry,) in struct.iter_unpack("<I", blocks[: len(blocks) // 4 * 4]):
        part = min(block, left)
        if part <= 0:
            return
        offset = data_at + entry * (block + extra) + extra
        if entry >= 0xFFFFFFFE:
            yield Run(part, None)
        elif offset + part > length:
            raise BadImage("it is a VDI file that was cut off")
        else:
            yield Run(part, offset)
        left -= part
    if left > 0:
        raise BadImage("it is a VDI file that was cut off")


def _qcow2(path: Path, length: int) -> Iterator[Run]:
    """QEMU docs/interop/qcow2.rst. Plain clusters only: compressed ones have no bytes that could be pointed at."""
    with path.open("rb") as file:
        header = file.read(72)
        cluster_bits, size, _, level1_count, level1_at = struct.unpack_from(">IQIIQ", header, 20)
        if not 9 <= cluster_bits <= 21 or level1_count > 1 << 20:
            raise BadImage("its qcow2 header makes no sense")
        cluster = 1 << cluster_bits
        file.seek(level1_at)
        level1 = struct.unpack(f">{level1_count}Q", file.read(8 * level1_count).ljust(8 * level1_count, b"\0"))
        left = size
        for entry in level1:
            if left <= 0:
                return
            at = entry & _OFFSET_MASK
            covered = min(left, cluster * (cluster // 8))
            left -= covered
            if not at:
                yield Run(covered, None)
                continue
            file.seek(at)
            for (two,) in struct.iter_unpack(">Q", file.read(cluster).ljust(cluster, b"\0")):
                part = min(cluster, covered)
                if part <= 0:
                    break
                covered -= part
                yield _cluster(two, part, length)


def _cluster(entry: int, size: int, length: int) -> Run:
    if entry & _QCOW2_COMPRESSED:
        raise BadImage("it is a compressed qcow2 file, which VirtualBox cannot use; convert it to VDI")
    offset = entry & _OFFSET_MASK
    if not offset or entry & _QCOW2_ZERO:
        return Run(size, None)
    if offset + size > length + SECTOR * 128:  # the last cluster of a file may be shorter than a whole one
        raise BadImage("it is a qcow2 file that was cut off")
    return Run(size, offset)


def _merged(found: Iterable[Run]) -> Iterator[Run]:
    last: Run | None = None
    for run in found:
        if last is None:
            last = run
        elif last.offset is None and run.offset is None:
            last = Run(last.length + run.length, None)
        elif last.offset is not None and run.offset == last.offset + last.length:
            last = Run(last.length + run.length, last.offset)
        else:
            yield last
            last = run
    if last is not None:
        yield last


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


def write_base(image: Path, folder: Path, vm: str) -> Path:
    """Make the base of a VM in its folder. vm: its UUID. Raises BadImage, or OSError."""
    found = runs(image)
    if any(first.length % SECTOR for first, _ in pairwise(found)):
        raise BadImage("its blocks do not end with a sector")
    if found and found[-1].length % SECTOR:
        raise BadImage("its size is no multiple of a sector")
    base = folder / base_name(vm)
    base.write_text(
        descriptor(found, _reachable(image, folder), uuid.uuid4(), uuid.uuid4()), encoding="utf-8", newline="\n"
    )
    base.chmod(0o444)
    return base


def lay_link(image: Path, folder: Path) -> None:
    """The link to the image in a VM's folder, relative, so that it holds where the data folder is moved to.

    Laid anew before each start: an older version laid an absolute one. Raises OSError.
    """
    if os.name != "posix":
        return
    link, wanted = folder / LINK, os.path.relpath(image.resolve(), folder.resolve())
    if link.is_symlink() and os.readlink(link) == wanted:  # noqa: PTH115 (compared as it stands there)
        return
    link.unlink(missing_ok=True)
    link.symlink_to(wanted)


def _reachable(image: Path, folder: Path) -> str:
    """A name for the image in the descriptor, which has no way to quote: a link beside it, or on Windows a path."""
    if os.name == "posix":
        lay_link(image, folder)
        return LINK
    try:
        name = os.path.relpath(image.resolve(), folder)
    except ValueError as error:
        raise BadImage(f"it is on another drive than the virtual machine ({folder})") from error
    if '"' in name or not name.isprintable():
        raise BadImage("its path cannot be written into a disk descriptor")
    return name
