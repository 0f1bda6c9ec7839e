"""`vmwrapper package`: what is in the folder, that it is the same each time, and what it refuses."""

from __future__ import annotations

import hashlib
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from lxml import etree

from vmwrapper.cli import package
from vmwrapper.cli.main import main
from vmwrapper.vm import shipped_image

PLATFORM = "x86_64-pc-linux-gnu"
JOB = """<job_desc>
<VMmanage_task><application>HostMain</application><command_line>./HostConfig.cfg</command_line></VMmanage_task>
<task><virtualmachine>v</virtualmachine><image>guest.img</image><application>./work.py</application>
<copy_app_to_VM>1</copy_app_to_VM><copy_file_to_VM>in</copy_file_to_VM><stdin_filename>words</stdin_filename>
<stdout_filename>first</stdout_filename></task>
<task><virtualmachine>v</virtualmachine><application>/bin/cat</application><stdin_filename>first</stdin_filename></task>
</job_desc>
"""
IMAGE = bytes(510) + b"\x55\xaa" + bytes(200_000) + bytes(range(256))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "job.xml").write_text(JOB)
    (folder / "HostConfig.cfg").write_text("[Broker]\n")
    (folder / "work.py").write_text("print()\n")
    (folder / "guest.img").write_bytes(IMAGE)
    (folder / "program").write_text("#!/bin/sh\n")
    (folder / "program").chmod(0o755)
    return folder


def words(folder: Path, *more: str, version: str = "1.00", inputs: tuple[str, ...] = ("in", "words")) -> list[str]:
    return [
        *("--app", "worker", "--app-version", version, "--output", str(folder.parent / "apps")),
        *("--executable", f"{PLATFORM}={folder / 'program'}"),
        *(word for name in inputs for word in ("--input", name)),
        *(*more, str(folder / "job.xml")),
    ]


def made(folder: Path, *more: str, version: str = "1.00") -> dict[str, tuple[Path, set[str]]]:
    """By logical name ("" for the main program): file and flags, as update_versions would read them."""
    assert main(["package", *words(folder, *more, version=version)]) == 0
    target = folder.parent / "apps" / "worker" / version / PLATFORM
    root = etree.parse(target / "version.xml").getroot()
    assert root.findtext("api_version") == "7.20.5"
    files = {
        file.findtext("logical_name") or "": (
            target / (file.findtext("physical_name") or "?"),
            {str(child.tag) for child in file} - {"logical_name", "physical_name"},
        )
        for file in root.iter("file")
    }
    names = {path.name for path, _ in files.values()}
    assert names | {"version.xml"} == {path.name for path in target.iterdir()}
    assert all(package._NAME.fullmatch(name) for name in names)
    return files


def test_the_folder(folder: Path) -> None:
    files = made(folder)
    assert {name: flags for name, (_, flags) in files.items()} == {
        "": {"main_program"},
        "job.xml": set(),
        "HostConfig.cfg": {"copy_file"},
        "work.py": set(),
        "guest.img": set(),
        "guest.img.json": set(),
    }
    assert os.access(files[""][0], os.X_OK)
    assert not os.access(files["job.xml"][0], os.X_OK)
    for name in ("job.xml", "work.py", "HostConfig.cfg"):
        assert files[name][0].read_bytes() == (folder / name).read_bytes()
        assert "1.00" in files[name][0].name
    packed = files["guest.img"][0].read_bytes()
    assert lzma.decompress(packed) == IMAGE
    description = shipped_image.read(files["guest.img.json"][0], "guest.img.json")
    assert (description.size, description.sha256) == (len(IMAGE), hashlib.sha256(IMAGE).hexdigest())
    assert description.packed_size == len(packed)


def test_the_same_bytes_each_time_and_no_new_name_for_what_is_large(folder: Path) -> None:
    first = made(folder)
    other = folder.with_name("elsewhere")
    folder.rename(other)
    second = made(other, version="2.00")
    for name, (path, _) in first.items():
        assert second[name][0].read_bytes() == path.read_bytes()
        is_large = name in ("", "guest.img")
        assert (second[name][0].name == path.name) == is_large, "other files carry the version"


@pytest.mark.parametrize(("compression", "flags"), [("none", set()), ("gzip", {"gzip"})])
def test_an_image_as_it_is(folder: Path, compression: str, flags: set[str]) -> None:
    files = made(folder, "--image-compression", compression)
    assert files["guest.img"][0].read_bytes() == IMAGE
    assert files["guest.img"][1] == flags
    assert "guest.img.json" not in files


def test_files_from_elsewhere_and_copied_ones(folder: Path) -> None:
    elsewhere = (folder / "guest.img").rename(folder.parent / "other.img")
    (folder / "table").write_text("1 2 3\n")
    files = made(folder, "--file", f"guest.img={elsewhere}", "--file", "table", "--copy", "table")
    assert files["table"][1] == {"copy_file"}
    assert lzma.decompress(files["guest.img"][0].read_bytes()) == IMAGE


def test_several_platforms(folder: Path) -> None:
    made(folder, "--executable", f"windows_x86_64__vbox64={folder / 'program'}")
    versions = folder.parent / "apps" / "worker" / "1.00"
    assert sorted(path.name for path in versions.iterdir()) == ["windows_x86_64__vbox64", PLATFORM]
    assert sorted(path.name for path in (folder.parent / "apps").iterdir()) == ["worker"], "no scratch folder is left"


@pytest.mark.parametrize(
    ("change", "more", "said"),
    [
        (lambda folder: (folder / "work.py").unlink(), [], "job.xml:3: <application>: work.py is not at"),
        (lambda folder: (folder / "guest.img").unlink(), [], "<image>: guest.img is not at"),
        (lambda folder: (folder / "HostConfig.cfg").unlink(), [], "<command_line>: HostConfig.cfg is not at"),
        (lambda folder: (folder / "guest.img").write_bytes(b"no disk"), [], "neither VDI nor qcow2"),
        (lambda folder: (folder / "guest.img").write_bytes(lzma.compress(IMAGE)), [], "xz compressed"),
        (lambda folder: (folder / "program").chmod(0o644), [], "is no executable file"),
        (lambda folder: (folder / "job.xml").write_text(JOB.replace("<image>", "<imago>")), [], "imago"),
        (lambda folder: (folder / "job.xml").unlink(), [], "job.xml"),
        (lambda folder: (folder / "in").write_text("x"), ["--file", "in"], "in cannot be both"),
        (lambda folder: None, ["--copy", "nothing"], "--copy: nothing is no file"),
        (lambda folder: None, ["--input", "work.py"], ""),
        (lambda folder: None, ["--app", "a/b"], "no name of an application"),
        (lambda folder: None, ["--app-version", "1.234"], "MAJOR.MINOR"),
        (lambda folder: None, ["--executable", "x"], "PLATFORM=FILE"),
        (lambda folder: None, ["--executable", "../x=y"], "no name of a platform"),
        (lambda folder: None, ["--wrong"], "--wrong"),
    ],
)  # fmt: skip
def test_what_is_refused(
    folder: Path, change: Callable[[Path], object], more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder)
    status = main(["package", *words(folder, *more)])
    text = capsys.readouterr().err
    assert (status == 0) == (not said), text
    assert said in text
    assert "Traceback" not in text
    assert status == 0 or not (folder.parent / "apps" / "worker").exists()


def test_inputs_that_nobody_brings_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["package", *words(folder, inputs=())]) == 206
    said = capsys.readouterr().err
    assert "<copy_file_to_VM>: in is not at" in said
    assert "<stdin_filename>: words is not at" in said
    assert "first" not in said, "the first task makes it"


def test_an_app_version_that_is_there_is_not_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(folder)
    assert main(["package", *words(folder)]) == 206
    assert "never changes" in capsys.readouterr().err


def test_commands_of_the_volunteers_computer_are_noted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "job.xml").write_text(
        "<job_desc><unzip_task><application>tar</application><command_line>-xf ./a.tar</command_line></unzip_task>"
        "<task><application>./out/of/it</application></task></job_desc>"
    )
    assert main(["package", *words(folder, inputs=())]) == 206
    assert "a.tar is not at" in capsys.readouterr().err
    (folder / "a.tar").write_bytes(b"")
    assert main(["package", *words(folder, inputs=())]) == 0
    assert "tar is no file of the app version" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["package", "--help"])
    assert left.value.code == 0
    assert "--image-compression" in capsys.readouterr().out
