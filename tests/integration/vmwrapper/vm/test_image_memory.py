"""Less memory than the guest in an image needs: the image says so, and job file and start are held to it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest.image import disk
from tests.integration.vmwrapper.vm.test_worker_exactly_once import guest
from tests.support.slots import HOST_MAIN_TASK, TestSlot
from vmcontrol.common import imagenote
from vmcontrol.hypervisors.common import diskimage
from vmwrapper.vm import shipped_image


def vdi(path: Path, memory_mb: int | None = 128) -> Path:
    disk.write_vdi(path, b"boot", [], memory_mb=memory_mb)
    return path


def test_an_image_says_what_its_guest_needs_and_is_what_it_was(tmp_path: Path) -> None:
    with_note, without = vdi(tmp_path / "a.vdi"), vdi(tmp_path / "b.vdi", None)
    assert imagenote.read(with_note) == 128
    assert imagenote.read(without) is None
    assert diskimage.inspect(with_note) == diskimage.inspect(without)
    first, second = with_note.read_bytes(), without.read_bytes()
    comment = slice(imagenote.COMMENT_AT, imagenote.COMMENT_AT + imagenote.COMMENT_BYTES)
    assert second[comment] == bytes(256)
    assert first[comment].endswith(b"\0")
    assert first[: comment.start] + first[comment.stop :] == second[: comment.start] + second[comment.stop :]


@given(st.binary(max_size=400))
def test_other_files_say_nothing(content: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        assert imagenote.read(Path(file.name)) is None


def test_a_note_that_is_none_says_nothing(tmp_path: Path) -> None:
    image = vdi(tmp_path / "a.vdi")
    content = bytearray(image.read_bytes())
    content[imagenote.COMMENT_AT : imagenote.COMMENT_AT + 40] = b"vmwrapper: needs 99999999999999 MiB".ljust(40)
    image.write_bytes(content)
    assert imagenote.read(image) is None


def test_the_words() -> None:
    assert imagenote.too_little(None, 16, "guest.vdi") == ""
    assert imagenote.too_little(128, 128, "guest.vdi") == ""
    assert imagenote.too_little(128, 96, "guest.vdi") == "the guest in guest.vdi needs 128 MiB of memory, not 96"


def test_the_description_of_a_compressed_image_says_it_too(tmp_path: Path) -> None:
    described = shipped_image.describe(vdi(tmp_path / "a.vdi"))
    (tmp_path / "d").write_bytes(described.to_json())
    assert shipped_image.read(tmp_path / "d", "d").memory_mb == 128
    other = shipped_image.describe(vdi(tmp_path / "b.vdi", None))
    assert b"memory_mb" not in other.to_json()
    assert other.memory_mb is None


@pytest.mark.parametrize("how", ["check", "check of the description", "run"])
def test_a_job_that_gives_too_little_is_told_at_once(tmp_path: Path, how: str) -> None:
    slot = TestSlot(tmp_path)
    try:
        slot.write("HostConfig.cfg", "[Broker]\ntype = embedded\n")
        slot.write("worker", "the application", executable=True)
        vdi(tmp_path / "guest.vdi")
        if how == "check of the description":
            (tmp_path / "guest.vdi.json").write_bytes(shipped_image.describe(tmp_path / "guest.vdi").to_json())
            (tmp_path / "guest.vdi").write_bytes(b"\x1f\x8b compressed")
        slot.job(HOST_MAIN_TASK, guest("", more="<memory_size_mb>96</memory_size_mb>"))
        words = "job.xml:3: <memory_size_mb>: the guest in guest.vdi needs 128 MiB of memory, not 96"
        if how == "run":
            assert slot.run("job.xml") == 206
            assert words in slot.text("stderr.txt")
            calls = tmp_path / "fake_calls.txt"
            assert not calls.exists() or "defineVM" not in calls.read_text()
            return
        process = slot.start("check", "job.xml", program=[sys.executable, "-m", "vmwrapper"], stderr=subprocess.PIPE)
        assert words in process.communicate(timeout=30)[1].decode()
        assert process.returncode == 206
    finally:
        slot.clean()
