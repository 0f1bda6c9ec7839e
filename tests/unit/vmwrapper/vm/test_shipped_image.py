"""A compressed image is unpacked once, whole or not at all, whoever else wants it, is killed, or damages it."""

from __future__ import annotations

import errno
import fcntl
import functools
import gzip
import lzma
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vmwrapper.context.background import Gate, Stopped
from vmwrapper.vm import shipped_image
from vmwrapper.vm.shipped_image import BadShippedImage, Description

CONTENT = bytes(range(256)) * 1024 + bytes(4 << 20) + os.urandom(300_000)
"""Half a megabyte, with a hole of four."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Not compressed."""
    path = tmp_path / "made" / "guest.img"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


@functools.cache
def xz(data: bytes) -> bytes:
    return lzma.compress(data, preset=0)


@functools.cache
def gz(data: bytes) -> bytes:
    return gzip.compress(data, 1)


def pack(folder: Path, name: str = "guest_1.xz", compress: Callable[[bytes], bytes] = xz) -> Path:
    packed = folder / name
    packed.write_bytes(compress(CONTENT))
    return packed


def left(folder: Path, packed: Path) -> list[str]:
    """Everything but the compressed file and lock files, which hold no data."""
    return sorted(path.name for path in folder.iterdir() if path != packed and path.suffix != ".lock")


@pytest.mark.parametrize("compress", [xz, gz, lambda data: data])
def test_it_is_told_by_its_content_how_it_is_packed(folder: Path, compress: Callable[[bytes], bytes]) -> None:
    found = shipped_image.packing(pack(folder, compress=compress))
    assert found == ("xz" if compress is xz else "gzip" if compress is gz else None)


def test_a_description_survives_its_file(image: Path, tmp_path: Path) -> None:
    description = replace(shipped_image.describe(image), packed_size=17)
    path = tmp_path / "guest.json"
    path.write_bytes(description.to_json())
    assert shipped_image.read(path, "guest.json") == description
    assert description.size == len(CONTENT)
    assert len(CONTENT) - (4 << 20) <= description.stored < len(CONTENT) - (4 << 20) + 3 * shipped_image.BLOCK


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "1", '{"size": 3}', '{"size": -1, "sha256": "' + "0" * 64 + '"}', '{"size": 3, "sha256": "../x"}',
     '{"size": true, "sha256": "' + "0" * 64 + '"}', "[" * 100_000, "\xff"],
)  # fmt: skip
def test_a_description_that_says_nothing_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "guest.json"
    path.write_text(text, "latin-1")
    with pytest.raises(BadShippedImage, match=r"guest\.json"):
        shipped_image.read(path, "guest.json")
    with pytest.raises(BadShippedImage, match="is not there"):
        shipped_image.read(tmp_path / "no.json", "no.json")


@pytest.mark.parametrize("compress", [xz, gz])
def test_unpacked_once(image: Path, folder: Path, compress: Callable[[bytes], bytes]) -> None:
    packed, description = pack(folder, compress=compress), shipped_image.describe(image)
    told: list[float] = []
    unpacked = shipped_image.unpack(packed, description, folder, Gate(), told.append)
    assert unpacked.read_bytes() == CONTENT
    assert unpacked.stat().st_blocks * 512 < len(CONTENT) - (3 << 20), "zeros take no space"
    assert unpacked.stat().st_mode & 0o777 == 0o444
    assert told == sorted(told)
    assert told[-1] == 1
    before = unpacked.stat()
    told.clear()
    assert shipped_image.unpack(packed, description, folder, Gate(), told.append) == unpacked
    assert (unpacked.stat().st_ino, told) == (before.st_ino, [])
    assert left(folder, packed) == [description.name]


def test_what_somebody_wrote_into_is_made_again(image: Path, folder: Path) -> None:
    packed, description = pack(folder), shipped_image.describe(image)
    unpacked = shipped_image.unpack(packed, description, folder, Gate())
    unpacked.chmod(0o644)
    with unpacked.open("r+b") as file:
        file.write(b"x")
    assert shipped_image.unpack(packed, description, folder, Gate()).read_bytes() == CONTENT


def damaged_cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def damaged_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("compress", [xz, gz])
@pytest.mark.parametrize(
    "damage",
    [
        lambda compress: damaged_cut(compress(CONTENT)),
        lambda compress: damaged_bit(compress(CONTENT)),
        lambda compress: compress(CONTENT)[:20],
        lambda compress: compress(CONTENT[:-1]),
        lambda compress: compress(CONTENT + b"x"),
        lambda compress: compress(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])),
    ],
    ids=["cut", "bit", "head", "shorter", "longer", "other"],
)
def test_a_damaged_one_is_refused_and_nothing_is_left(
    image: Path, folder: Path, compress: Callable[[bytes], bytes], damage: Callable[[Callable[[bytes], bytes]], bytes]
) -> None:
    packed = folder / "guest_1"
    packed.write_bytes(damage(compress))
    with pytest.raises(BadShippedImage, match="guest_1 is damaged"):
        shipped_image.unpack(packed, shipped_image.describe(image), folder, Gate())
    assert left(folder, packed) == []


def test_a_file_of_the_wrong_size_is_refused_before_it_is_unpacked(image: Path, folder: Path) -> None:
    packed = pack(folder)
    description = replace(shipped_image.describe(image), packed_size=packed.stat().st_size + 1)
    with pytest.raises(BadShippedImage, match=f"it has {packed.stat().st_size} bytes"):
        shipped_image.unpack(packed, description, folder, Gate())


def test_two_at_the_same_moment_make_one(image: Path, folder: Path) -> None:
    """The second comes while the first is in the middle; it waits, and finds it done."""
    packed, description = pack(folder), shipped_image.describe(image)
    other, in_the_middle, go_on = folder / "guest_2.xz", threading.Event(), threading.Event()
    other.hardlink_to(packed)
    made: list[str] = []

    def one(name: str, source: Path, gate: Gate, told: Callable[[float], None]) -> None:
        shipped_image.unpack(source, description, folder, gate, told)
        made.append(name)

    def stop_in_the_middle(_: float) -> None:
        in_the_middle.set()
        assert go_on.wait(20)

    def never(_: float) -> None:
        raise AssertionError("it is unpacked twice")

    class Counted(Gate):
        def passing(self) -> None:
            super().passing()
            go_on.set()  # the second has found the lock taken

    first = threading.Thread(target=one, args=("first", packed, Gate(), stop_in_the_middle))
    second = threading.Thread(target=one, args=("second", other, Counted(), never))
    first.start()
    assert in_the_middle.wait(20)
    second.start()
    for thread in (first, second):
        thread.join(20)
    assert sorted(made) == ["first", "second"]
    packed.unlink()
    assert shipped_image.sweep(folder) == [], "the second one's file is there"
    assert (folder / description.name).read_bytes() == CONTENT


@pytest.fixture
def killed(folder: Path, image: Path) -> Path:
    """A process was killed with -9 in the middle of unpacking."""
    packed = pack(folder)
    code = (
        "import sys; from pathlib import Path\n"
        "from vmwrapper.vm import shipped_image as shippedimage; from vmwrapper.context.background import Gate\n"
        "def told(fraction):\n    print(fraction, flush=True)\n    sys.stdin.read()\n"
        f"shippedimage.unpack(Path({str(packed)!r}), shippedimage.describe(Path({str(image)!r})),"
        f" Path({str(folder)!r}), Gate(), told)"
    )
    root = str(Path(__file__).parents[4])
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    assert process.stdin is not None
    process.stdin.close()
    return packed


def test_a_lock_that_never_becomes_free_is_waited_for_with_a_limit(
    image: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped_image, "LOCK_LIMIT_S", 0.3)
    packed, described = pack(folder), shipped_image.describe(image)
    with (folder / f"{described.name}.lock").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another job has held it") as caught:
            shipped_image.unpack(packed, described, folder, Gate())
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_killed_one_leaves_no_lock_and_its_half_is_replaced(killed: Path, image: Path, folder: Path) -> None:
    description = shipped_image.describe(image)
    assert left(folder, killed) == [f"{description.name}.part"]
    assert shipped_image.unpack(killed, description, folder, Gate()).read_bytes() == CONTENT
    assert left(folder, killed) == [description.name]


def test_a_killed_ones_half_is_swept_with_its_file(killed: Path, folder: Path) -> None:
    killed.unlink()
    assert len(shipped_image.sweep(folder)) == 1
    assert list(folder.iterdir()) == []


def test_stopped_in_the_middle_nothing_is_left(image: Path, folder: Path) -> None:
    packed, gate = pack(folder), Gate()
    with pytest.raises(Stopped):
        shipped_image.unpack(packed, shipped_image.describe(image), folder, gate, lambda _: gate.stop())
    assert left(folder, packed) == []


def test_suspended_for_long_others_may_unpack(image: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped_image, "PATIENCE_S", 0.01)
    packed, gate, description = pack(folder), Gate(), shipped_image.describe(image)
    with pytest.raises(shipped_image.GivenUp):
        shipped_image.unpack(packed, description, folder, gate, lambda _: gate.suspend(True))
    assert left(folder, packed) == []
    assert shipped_image.unpack(packed, description, folder, Gate()).read_bytes() == CONTENT


def test_a_disk_without_room_is_not_filled(image: Path, folder: Path) -> None:
    packed = pack(folder)
    description = replace(shipped_image.describe(image), stored=1 << 60)
    with pytest.raises(OSError, match="No space") as caught:
        shipped_image.unpack(packed, description, folder, Gate())
    assert caught.value.errno == errno.ENOSPC
    assert left(folder, packed) == []


def test_a_disk_that_is_full_in_the_middle(image: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "small", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here (root only): {done.stderr.decode().strip()}")
    try:
        packed = pack(folder)
        description = replace(shipped_image.describe(image), stored=0)
        with pytest.raises(OSError, match="No space"):
            shipped_image.unpack(packed, description, folder, Gate())
        assert left(folder, packed) == []
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_swept_when_its_file_is_gone_and_not_before(image: Path, folder: Path) -> None:
    packed, description = pack(folder), shipped_image.describe(image)
    unpacked = shipped_image.unpack(packed, description, folder, Gate())
    renamed = packed.rename(folder / "guest_2.xz")  # another app version with the same image
    shipped_image.unpack(renamed, description, folder, Gate())
    assert shipped_image.sweep(folder) == []
    assert unpacked.exists()
    renamed.unlink()
    assert shipped_image.sweep(folder) == [unpacked.name]
    assert list(folder.iterdir()) == []


def test_what_is_being_unpacked_is_not_swept(image: Path, folder: Path) -> None:
    packed = pack(folder)
    swept: list[list[str]] = []
    shipped_image.unpack(
        packed, shipped_image.describe(image), folder, Gate(), lambda _: swept.append(shipped_image.sweep(folder))
    )
    assert swept
    assert not any(swept)


def test_the_names_are_those_of_the_description() -> None:
    assert Description(1, "ab" * 32, 1).name == "vmwrapper_image_" + "ab" * 16


class TestOtherVersions:
    """The project's folder is shared with versions of vmwrapper before and after this one."""

    def test_one_that_knows_no_formats_finds_its_names_and_ours(self, image: Path, folder: Path) -> None:
        packed, description = pack(folder), shipped_image.describe(image)
        lock = folder / f"{description.name}.lock"
        lock.write_bytes(b"\nguest_0.xz\n")
        unpacked = shipped_image.unpack(packed, description, folder, Gate())
        names = [line for line in lock.read_text("utf-8").splitlines() if line]  # as it reads them
        assert [name for name in names if (folder / name).exists()] == ["guest_1.xz"]
        assert "guest_0.xz" in names
        packed.unlink()
        assert not any((folder / name).exists() for name in names), "it sweeps what we made, as it should"
        assert shipped_image.sweep(folder) == [unpacked.name]

    def test_an_image_of_a_newer_format_is_neither_used_nor_changed_nor_removed(
        self, image: Path, folder: Path
    ) -> None:
        packed, description = pack(folder), shipped_image.describe(image)
        theirs, lock = folder / description.name, folder / f"{description.name}.lock"
        theirs.write_bytes(b"in another form")
        lock.write_bytes(b"\nvmwrapper-format 2\n\0\1\2")
        with pytest.raises(shipped_image.NotShared, match="another version"):
            shipped_image.unpack(packed, description, folder, Gate())
        packed.unlink()
        assert shipped_image.sweep(folder) == []
        assert theirs.read_bytes() == b"in another form"
        assert lock.read_bytes() == b"\nvmwrapper-format 2\n\0\1\2"

    @pytest.mark.parametrize("suffix", ["", ".part", ".lock"])
    @pytest.mark.parametrize("kind", ["pipe", "folder", "link", "huge"])
    def test_what_is_no_file_of_ours_stops_nobody(self, image: Path, folder: Path, suffix: str, kind: str) -> None:
        packed, description = pack(folder), shipped_image.describe(image)
        path, other = folder / f"{description.name}{suffix}", folder / "somebody's"
        other.write_bytes(b"file")
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(other)
        else:
            path.touch()
            os.truncate(path, 1 << 40)
        if kind == "huge" and suffix != ".lock":
            assert shipped_image.unpack(packed, description, folder, Gate()).read_bytes() == CONTENT
            return
        with pytest.raises(shipped_image.NotShared):
            shipped_image.unpack(packed, description, folder, Gate())
        shipped_image.sweep(folder)
        assert os.path.lexists(path)
        assert other.read_bytes() == b"file"

    def test_nobody_else_can_write_what_we_make_whatever_the_umask(self, image: Path, folder: Path) -> None:
        before = os.umask(0)
        modes: list[int] = []
        try:

            def look(_: float) -> None:
                modes.extend(path.stat().st_mode & 0o022 for path in folder.glob(f"{shipped_image.PREFIX}*"))

            packed = pack(folder)
            shipped_image.unpack(packed, shipped_image.describe(image), folder, Gate(), look)
            look(1.0)
        finally:
            os.umask(before)
        assert modes
        assert not any(modes)
