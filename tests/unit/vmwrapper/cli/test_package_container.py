"""`vmwrapper package` of a job in a container: the disk is a file named by its content, packed as images are."""

from __future__ import annotations

import lzma
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.vmwrapper.cli.test_package import made, words
from vmcontrol.common.containerdisk import HEADER_AT, ContainerConfig, ContainerDisk, encode
from vmwrapper.cli.main import main
from vmwrapper.vm import shipped_image

JOB = """<job_desc>
<VMmanage_task><application>HostMain</application><command_line>./HostConfig.cfg</command_line></VMmanage_task>
<task><image>guest.img</image><container>app.vdi</container><copy_file_to_VM>in</copy_file_to_VM></task>
</job_desc>
"""
DISK = ContainerDisk("ab" * 32, "myapp:1.0", config=ContainerConfig(("run",)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "job.xml").write_text(JOB)
    (folder / "HostConfig.cfg").write_text("[Broker]\n")
    (folder / "guest.img").write_bytes(bytes(510) + b"\x55\xaa" + bytes(200_000))
    (folder / "program").write_text("#!/bin/sh\n")
    (folder / "program").chmod(0o755)
    write(folder, DISK)
    return folder


def write(folder: Path, disk: ContainerDisk) -> None:
    (folder / "app.vdi").write_bytes((bytes(HEADER_AT) + encode(disk)).ljust(1 << 20, b"\0"))


def test_the_disk_is_packed_and_described(folder: Path) -> None:
    files = made(folder)
    packed = files["app.vdi"][0].read_bytes()
    assert lzma.decompress(packed) == (folder / "app.vdi").read_bytes()
    assert shipped_image.read(files["app.vdi.json"][0], "app.vdi.json").packed_size == len(packed)
    again = made(folder, version="2.00")
    assert again["app.vdi"][0].name == files["app.vdi"][0].name, "the same disk is no new download"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (ContainerConfig(), "nothing to run"),
        (ContainerConfig(("run",), user="ghost", uid=None), "USER 'ghost' does not exist"),
    ],
)
def test_a_container_that_cannot_run_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], config: ContainerConfig, why: str
) -> None:
    write(folder, replace(DISK, config=config))
    assert main(["package", *words(folder)]) == 206
    assert why in capsys.readouterr().err


def test_a_disk_that_is_none_or_missing_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "app.vdi").write_bytes(b"an image")
    assert main(["package", *words(folder)]) == 206
    assert "it is no container's disk" in capsys.readouterr().err
    (folder / "app.vdi").unlink()
    assert main(["package", *words(folder)]) == 206
    assert "<container>: app.vdi is not at" in capsys.readouterr().err
