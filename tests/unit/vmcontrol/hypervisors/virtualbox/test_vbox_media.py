"""Where the disk's bytes are in an image's file, and the descriptor that tells VirtualBox."""

from __future__ import annotations

import shutil
import struct
import subprocess
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcontrol.hypervisors.common import diskruns
from vmcontrol.hypervisors.common.diskimage import BadImage
from vmcontrol.hypervisors.common.diskruns import Run
from vmcontrol.hypervisors.virtualbox import media

MIB = 1024 * 1024


def vdi(path: Path, blocks: list[int], *, size: int | None = None, block: int = MIB) -> Path:
    """A dynamic VDI whose blocks lie where `blocks` says (-1: never written); each begins with its place."""
    used = max(blocks) + 1
    header = bytearray(2 * MIB)
    struct.pack_into("<IIII", header, 0x40, 0xBEDA107F, 0x10001, 0x190, 1)
    struct.pack_into("<II", header, 0x154, 0x200, 2 * MIB)
    disk = len(blocks) * block if size is None else size
    struct.pack_into("<QIIII", header, 0x170, disk, block, 0, len(blocks), used)
    struct.pack_into(f"<{len(blocks)}I", header, 0x200, *(0xFFFFFFFF if b < 0 else b for b in blocks))
    path.write_bytes(bytes(header) + b"".join(b"%08d" % n + bytes(block - 8) for n in range(used)))
    return path


def content(path: Path, runs: list[Run]) -> bytes:
    data = path.read_bytes()
    return b"".join(
        bytes(run.length) if run.offset is None else data[run.offset : run.offset + run.length] for run in runs
    )


def test_neighbours_become_one_piece(tmp_path: Path) -> None:
    found = media.runs(vdi(tmp_path / "i", [0, 1, 2, -1, -1, 4, 3]))
    at = 2 * MIB
    assert found == [
        Run(3 * MIB, at),
        Run(2 * MIB, None),
        Run(MIB, at + 4 * MIB),
        Run(MIB, at + 3 * MIB),
    ]


def test_a_disk_that_ends_within_its_last_block(tmp_path: Path) -> None:
    found = media.runs(vdi(tmp_path / "i", [0, 1], size=MIB + 512))
    assert sum(run.length for run in found) == MIB + 512


@pytest.mark.parametrize("kind", ["raw", "vdi", "qcow2"])
def test_what_qemu_writes_is_understood(tmp_path: Path, kind: str) -> None:
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    pattern = b"".join(struct.pack("<Q", n) * 64 for n in range(4 * 2048))
    disk = bytearray(16 * MIB)
    disk[: 2 * MIB] = pattern[: 2 * MIB]
    disk[9 * MIB + 512 * 7 : 10 * MIB] = pattern[: MIB - 512 * 7]
    disk[510:512] = b"\x55\xaa"
    raw, image = tmp_path / "raw", tmp_path / "image"
    raw.write_bytes(disk)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", kind, raw, image], check=True, timeout=60)
    found = media.runs(image)
    assert content(image, found).ljust(len(disk), b"\0") == bytes(disk)
    assert kind == "raw" or any(run.offset is None for run in found)


def test_a_compressed_qcow2_is_refused(tmp_path: Path) -> None:
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    raw, image = tmp_path / "raw", tmp_path / "image"
    raw.write_bytes(bytes(range(256)) * 8192)
    subprocess.run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, image], check=True, timeout=60)
    with pytest.raises(BadImage, match="compressed"):
        media.runs(image)


def test_too_many_pieces_are_refused_with_what_to_do(tmp_path: Path) -> None:
    scattered = [n * 2 % 1500 + (n * 2 // 1500) for n in range(1500)]
    with pytest.raises(BadImage, match="qemu-img convert"):
        media.runs(vdi(tmp_path / "i", scattered, block=4096))


@pytest.mark.parametrize("cut", [MIB, 2 * MIB + 100])
def test_an_image_that_was_cut_off(tmp_path: Path, cut: int) -> None:
    path = vdi(tmp_path / "i", [1, 0])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(BadImage, match="cut off"):
        media.runs(path)


@given(st.lists(st.tuples(st.integers(1, 9), st.none() | st.integers(0, 50)), max_size=40))
def test_merging_changes_no_byte(parts: list[tuple[int, int | None]]) -> None:
    runs = [Run(length * 512, None if at is None else at * 512) for length, at in parts]
    merged = list(diskruns._merged(runs))

    def sectors(some: list[Run]) -> list[int | None]:
        return [None if r.offset is None else r.offset // 512 + i for r in some for i in range(r.length // 512)]

    assert sectors(merged) == sectors(runs)
    assert len(merged) <= len(runs)


def test_the_descriptor_says_where_everything_is() -> None:
    identity, modification = uuid.uuid4(), uuid.uuid4()
    text = media.descriptor([Run(1024, 2048), Run(512, None)], "image", identity, modification)
    assert 'RDONLY 2 FLAT "image" 4\nRDONLY 1 ZERO\n' in text
    assert f'ddb.uuid.image="{identity}"' in text
    assert f'ddb.uuid.modification="{modification}"' in text


def test_each_base_has_an_identity_of_its_own_and_names_the_image_by_a_link(tmp_path: Path) -> None:
    image = vdi(tmp_path / 'an "image", é', [0])
    texts = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        texts.append(media.write_base(image, folder, "0a1b2c3d-0000").read_text())
        assert (folder / "image").resolve() == image
    assert texts[0] != texts[1]
    assert 'FLAT "image"' in texts[0]
