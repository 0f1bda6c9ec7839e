"""What is said of an image, and of a container's disk, while it is made ready."""

from __future__ import annotations

import lzma
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytest_twisted

from vmwrapper.errors import BadInput
from vmwrapper.job.model import GuestOptions, Task
from vmwrapper.vm.images import SharedImages


@pytest.fixture
def images(tmp_path: Path) -> SharedImages:
    guest = GuestOptions(virtualmachine="vm", image="guest.vdi", container="myapp.disk")
    context = SimpleNamespace(
        source="job.xml",
        job=SimpleNamespace(
            tasks=[Task(application="a", line=1, guest=None), Task(application="b", line=2, guest=guest)]
        ),
        names=SimpleNamespace(source=lambda name: tmp_path / name),
        slot_folder=tmp_path,
    )
    return SharedImages(cast("Any", context))


@pytest.mark.parametrize(
    ("logical", "said"),
    [
        ("guest.vdi", "unpacking the image of the virtual machine, 42%"),
        ("myapp.disk", "unpacking the container's disk myapp.disk, 42%"),
    ],
)
def test_progress_names_what_is_unpacked(images: SharedImages, logical: str, said: str) -> None:
    assert images.progress == ""
    images._unpacking = logical, 0.42
    assert images.progress == said


@pytest_twisted.ensureDeferred
async def test_a_disk_that_is_not_compressed_is_used_where_it_lies(images: SharedImages, tmp_path: Path) -> None:
    disk = tmp_path / "myapp.disk"
    disk.write_bytes(b"a disk")
    assert await images.ready("myapp.disk") == disk
    assert list(tmp_path.iterdir()) == [disk]


@pytest.mark.parametrize(("logical", "element"), [("guest.vdi", "image"), ("myapp.disk", "container")])
@pytest_twisted.ensureDeferred
async def test_a_complaint_names_the_element(images: SharedImages, tmp_path: Path, logical: str, element: str) -> None:
    (tmp_path / logical).write_bytes(lzma.compress(b"a disk"))
    with pytest.raises(BadInput, match=rf"job\.xml: <{element}>: {logical}: {logical}\.json, which has to say"):
        await images.ready(logical)
