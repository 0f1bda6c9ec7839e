"""Where in an image's file the bytes of its disk are: VDI, plain qcow2 and raw. Reads only."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vmcontrol.hypervisors.common import diskimage
from vmcontrol.hypervisors.common.diskimage import SECTOR, BadImage

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
        return list(_merged(found))


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
