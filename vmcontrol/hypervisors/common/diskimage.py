"""What a disk image file is, read from its first bytes; and the snapshots inside a qcow2 file. Reads only.

Sources: QEMU docs/interop/qcow2.rst (header, snapshot table); VirtualBox src/VBox/Storage/VDICore.h (VDI header).
Names are never trusted: a project may call its image anything.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

SECTOR = 512
"""Bytes."""
_HEADER_BYTES = 1024
_SNAPSHOT_LIMIT = 4096
"""Snapshots read of one file; QEMU itself stops at 65536."""
_EXTRA_LIMIT = 1024
"""Bytes of extra data of a snapshot, as in QEMU (block/qcow2.h, QCOW_MAX_SNAPSHOT_EXTRA_DATA)."""

_VDI_SIGNATURE = b"\x7f\x10\xda\xbe"
_QCOW2_MAGIC = b"QFI\xfb"
_OTHERS = {
    b"KDMV": "VMDK (VMware)",
    b"COWD": "VMDK (VMware)",
    b"# Disk DescriptorFile": "VMDK (VMware)",
    b"conectix": "VHD (Hyper-V)",
    b"vhdxfile": "VHDX (Hyper-V)",
    b"PK\x03\x04": "a zip file",
    b"\x1f\x8b": "gzip compressed",
    b"\xfd7zXZ": "xz compressed",
    b"(\xb5/\xfd": "zstd compressed",
    b"<soft_link>": "a BOINC link file that nobody resolved",
}


class BadImage(Exception):  # noqa: N818
    """The file is no disk image that can be used. str: why, as the end of a sentence about the file."""


@dataclass(frozen=True, slots=True)
class DiskImage:
    """format: qcow2, vdi or raw, QEMU's names. size: bytes that the guest sees."""

    format: str
    size: int


@dataclass(frozen=True, slots=True)
class InternalSnapshot:
    """A snapshot in a qcow2 file. memory_bytes: size of the machine's state in it; 0: disk only."""

    id: str
    tag: str
    date: int
    memory_bytes: int


def inspect(path: Path) -> DiskImage:
    """What the image at `path` is. Raises BadImage, or OSError when it cannot be read."""
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
        length = file.seek(0, 2)
    if not header:
        raise BadImage("it is empty")
    if header.startswith(_QCOW2_MAGIC):
        return _qcow2(header)
    if header[0x40:0x44] == _VDI_SIGNATURE:
        return _vdi(header, length)
    for magic, name in _OTHERS.items():
        if header.startswith(magic):
            raise BadImage(f"it is {name}; images may be VDI, qcow2 or raw")
    if header[510:512] != b"\x55\xaa":  # a raw disk is bootable, so its first sector is a boot sector
        raise BadImage("it is neither VDI nor qcow2 nor a raw disk with a boot sector")
    return DiskImage("raw", -(-length // SECTOR) * SECTOR)


def _qcow2(header: bytes) -> DiskImage:
    if len(header) < 104:
        raise BadImage("it is a qcow2 file that was cut off")
    version, backing = struct.unpack_from(">IQ", header, 4)
    (size,) = struct.unpack_from(">Q", header, 24)
    if version not in (2, 3):
        raise BadImage(f"it is a qcow2 file of the unknown version {version}")
    (features,) = struct.unpack_from(">Q", header, 72) if version == 3 else (0,)
    if backing or features & 4:  # bit 2: external data file
        raise BadImage("it is a qcow2 file that needs another file; convert it to one that stands alone")
    if features & 2:
        raise BadImage("it is a qcow2 file that is marked as corrupt")
    return DiskImage("qcow2", size)


def check_overlay(path: Path) -> None:
    """Raises BadImage when a VM's own qcow2 file is none that we made, as one that keeps its data in another file.

    A file below it that it names is no error: such a name is never followed. Raises OSError.
    """
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if not header.startswith(_QCOW2_MAGIC) or len(header) < 104:
        raise BadImage("it is no qcow2 file")
    (version,) = struct.unpack_from(">I", header, 4)
    (encryption,) = struct.unpack_from(">I", header, 32)
    (features,) = struct.unpack_from(">Q", header, 72)
    if version != 3 or encryption or features & ~0b11001:  # dirty, compression type, extended L2; 0b10: corrupt
        raise BadImage("its header is not one that we made")


def _vdi(header: bytes, length: int) -> DiskImage:
    if len(header) < 0x188:
        raise BadImage("it is a VDI file that was cut off")
    (kind,) = struct.unpack_from("<I", header, 0x4C)
    (data,) = struct.unpack_from("<I", header, 0x158)
    size, block = struct.unpack_from("<QI", header, 0x170)
    (allocated,) = struct.unpack_from("<I", header, 0x184)
    if kind not in (1, 2):  # 1 dynamic, 2 fixed; 3 and 4 are differences to another file
        raise BadImage("it is a VDI file that needs another file; convert it to one that stands alone")
    if length < data + allocated * block:
        raise BadImage(f"it is a VDI file that was cut off: {length} of {data + allocated * block} bytes are there")
    return DiskImage("vdi", size)


def snapshots(path: Path) -> list[InternalSnapshot]:
    """The snapshots inside a qcow2 file, oldest first; also while a VM uses it (QEMU writes the table before the
    number of its entries). Raises BadImage or OSError."""
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
        if not header.startswith(_QCOW2_MAGIC) or len(header) < 72:
            raise BadImage("it is no qcow2 file")
        count, offset = struct.unpack_from(">IQ", header, 60)
        if count > _SNAPSHOT_LIMIT:
            raise BadImage(f"its header says {count} snapshots")
        if count and offset > file.seek(0, 2):
            raise BadImage("its table of snapshots is cut off")
        file.seek(offset if count else 0)
        return [_snapshot(file) for _ in range(count)]


def _snapshot(file: BinaryIO) -> InternalSnapshot:
    def take(length: int) -> bytes:
        data = file.read(length)
        if len(data) != length:
            raise BadImage("its table of snapshots is cut off")
        return data

    fixed = struct.Struct(">QIHHIIQII")
    _, _, id_bytes, name_bytes, date, _, _, memory, extra_bytes = fixed.unpack(take(fixed.size))
    if extra_bytes > _EXTRA_LIMIT:
        raise BadImage(f"a snapshot in it has {extra_bytes} bytes of extra data")
    extra = take(extra_bytes)
    if extra_bytes >= 8:
        (memory,) = struct.unpack_from(">Q", extra)  # 64 bits wide in newer files
    identifier, name = take(id_bytes), take(name_bytes)
    # Entries are padded to 8 bytes; the last one in a file may lack that.
    file.seek(-(fixed.size + extra_bytes + id_bytes + name_bytes) % 8, 1)
    return InternalSnapshot(identifier.decode("utf-8", "replace"), name.decode("utf-8", "replace"), date, memory)
