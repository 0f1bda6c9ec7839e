"""A disk from its parts: the partition table, and VirtualBox's VDI format, which QEMU reads as well.

Pure but for reading the parts and writing the one file. The same parts give the same bytes: the VDI's UUIDs, by which
VirtualBox knows a medium, are made from the content, so different images never share one.
"""

from __future__ import annotations

import hashlib
import os
import struct
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmcontrol.common import imagenote

SECTOR = 512
MIB = 1024 * 1024
BLOCK = MIB
"""VDI's unit of allocation; the only one that both VirtualBox and QEMU write."""
UNALLOCATED = 0xFFFFFFFF
VDI_SIGNATURE = 0xBEDA107F
VDI_VERSION = 0x00010001
VDI_HEADER_SIZE = 0x190
VDI_DYNAMIC = 1
FAT16_LBA, LINUX = 0x0E, 0x83
NAMESPACE = uuid.UUID("0c2ae0f8-6b7f-4f6a-9b41-5a6f0d7c2f10")


class DiskError(Exception):
    """The parts do not make a disk. str: which does not fit."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A primary partition with what `content`, a file, holds; `start` and `size` in bytes, multiples of BLOCK."""

    content: Path
    start: int
    size: int
    kind: int
    active: bool = False


def master_boot_record(code: bytes, partitions: Sequence[Partition], *, signature: int) -> bytes:
    """The first sector: boot code (at most 440 bytes), disk signature, up to four partitions. Addresses by LBA only."""
    if len(code) > 440:
        raise DiskError(f"the boot code has {len(code)} bytes; a master boot record has place for 440")
    if len(partitions) > 4:
        raise DiskError("a master boot record has place for four partitions")
    table = b""
    used_to = BLOCK
    for partition in partitions:
        if partition.start % BLOCK or partition.size % BLOCK or partition.size <= 0:
            raise DiskError(f"{partition} does not begin and end with a block of {BLOCK} bytes")
        if partition.start < used_to:
            raise DiskError(f"{partition} overlaps what is before it")
        used_to = partition.start + partition.size
        first, count = partition.start // SECTOR, partition.size // SECTOR
        if first + count > 2**32:
            raise DiskError(f"{partition} is beyond the 2 TiB of a master boot record")
        # FE FF FF: "too far for cylinders, heads and sectors", so that everybody uses the LBA fields.
        beyond = b"\xfe\xff\xff"
        flag = 0x80 if partition.active else 0
        table += struct.pack("<B3sB3sII", flag, beyond, partition.kind, beyond, first, count)
    return code.ljust(440, b"\0") + struct.pack("<IH", signature, 0) + table.ljust(64, b"\0") + b"\x55\xaa"


def _data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(from, to) of what a file really holds."""
    position = 0
    while position < size:
        try:
            position = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        end = os.lseek(fd, position, os.SEEK_HOLE)
        yield position, end
        position = end


def _blocks(record: bytes, partitions: Sequence[Partition]) -> Iterator[tuple[int, bytes]]:
    """(number, content) of every block of the disk that is not all zeros, in order. Holes of files are not read."""
    yield 0, record.ljust(BLOCK, b"\0")
    for partition in partitions:
        with partition.content.open("rb") as source:
            ranges = _data_ranges(source.fileno(), partition.size)
            numbers = dict.fromkeys(
                number for begin, end in ranges for number in range(begin // BLOCK, -(-end // BLOCK))
            )
            for number in numbers:
                source.seek(number * BLOCK)
                content = source.read(BLOCK)
                if content.strip(b"\0"):
                    yield partition.start // BLOCK + number, content.ljust(BLOCK, b"\0")


def write_vdi(
    target: Path, record: bytes, partitions: Sequence[Partition], *, memory_mb: int | None = None
) -> uuid.UUID:
    """Write a disk of a boot record and its partitions as a growing VDI; only blocks with content take space.

    memory_mb: what the guest needs to boot; the image says so (vmcontrol/common/imagenote.py).

    Returns the image's UUID. Layout: VirtualBox src/VBox/Storage/VDI.cpp, QEMU block/vdi.c.
    """
    for partition in partitions:
        if partition.content.stat().st_size > partition.size:
            raise DiskError(f"{partition.content.name} is larger than its partition's {partition.size} bytes")
    size = max((partition.start + partition.size for partition in partitions), default=BLOCK)
    count = size // BLOCK
    table_at = SECTOR
    # Blocks begin at a multiple of 1 MiB of the file: aligned reads on the host.
    data_at = -(-(table_at + 4 * count) // MIB) * MIB
    table = [UNALLOCATED] * count
    digest = hashlib.sha256()
    allocated = 0
    with target.open("wb") as out:
        out.seek(data_at)
        for number, content in _blocks(record, partitions):
            table[number] = allocated
            digest.update(struct.pack("<I", number) + content)
            out.write(content)
            allocated += 1
        image_id = uuid.uuid5(NAMESPACE, f"image {size} {digest.hexdigest()}")
        change_id = uuid.uuid5(NAMESPACE, f"change {size} {digest.hexdigest()}")
        header = b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0")
        header += struct.pack("<IIIII", VDI_SIGNATURE, VDI_VERSION, VDI_HEADER_SIZE, VDI_DYNAMIC, 0)
        header += imagenote.write(memory_mb) if memory_mb is not None else bytes(imagenote.COMMENT_BYTES)
        header += struct.pack("<II", table_at, data_at)
        header += struct.pack("<IIII", 0, 0, 0, SECTOR)  # no legacy geometry
        header += struct.pack("<IQIIII", 0, size, BLOCK, 0, count, allocated)
        header += image_id.bytes_le + change_id.bytes_le + bytes(32)  # no parent
        header += struct.pack("<IIII", 0, 0, 0, SECTOR)  # no geometry: the BIOS chooses
        out.seek(0)
        out.write(header.ljust(SECTOR, b"\0"))
        out.write(struct.pack(f"<{count}I", *table))
    return image_id
