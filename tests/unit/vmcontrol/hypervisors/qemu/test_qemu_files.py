"""A VM's files: definition, the state that follows from what is there, bounded logs, images as they are."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcontrol.common import birth
from vmcontrol.common.birth import Birth
from vmcontrol.hypervisors.common import diskimage
from vmcontrol.hypervisors.common.folder import sweep
from vmcontrol.hypervisors.interface import HypervisorError
from vmcontrol.hypervisors.qemu.files import Definition, VmFiles
from vmcontrol.protocol.vm import PortForward, VmState

DEFINITION = Definition(
    name="vm",
    image="/i.vdi",
    image_format="vdi",
    memory_mb=256,
    cpus=1,
    mac="52:54:00:00:00:02",
    agent_port=4616,
    secret_file=None,
    console_log="/c",
    network=True,
    port_forwards=(PortForward(80, 0, True),),
    accelerator="tcg",
    cpu="max",
)


@pytest.fixture
def files(tmp_path: Path) -> VmFiles:
    files = VmFiles(tmp_path / "vm")
    files.folder.mkdir()
    files.store(DEFINITION)
    return files


def test_a_definition_comes_back_as_it_was(files: VmFiles) -> None:
    definition = replace(DEFINITION, machine="pc-q35-7.2", snapshot_hardware={"1:ü": ("tcg", "max")})
    files.store(definition)
    assert files.load() == definition
    assert files.definition_file.stat().st_mode & 0o777 == 0o600


@given(st.binary(max_size=80) | st.sampled_from([b"{}", b"[]", b'{"format":1}', b'{"format":1,"name":1,"x":2}']))
def test_a_damaged_definition_is_one_error(text: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.raises(HypervisorError, match=r"vm\.json"):
        read(VmFiles(Path(folder)), text)


def read(files: VmFiles, text: bytes) -> Definition | None:
    files.definition_file.write_bytes(text)
    return files.load()


@pytest.mark.parametrize(
    "change",
    [
        {"memory_mb": "lots"},
        {"memory_mb": True},
        {"cpus": 1.5},
        {"image": 5},
        {"mac": None},
        {"network": 1},
        {"secret_file": 1},
        {"port_forwards": {}},
        {"port_forwards": [{"guest_port": "x"}]},
        {"port_forwards": [{"host_port": 1}]},
        {"current_snapshot": 7},
        {"snapshot_hardware": {"a": "kv"}},
        {"snapshot_hardware": ["a"]},
    ],
)
def test_a_field_of_another_type_is_the_same_error(files: VmFiles, change: dict[str, object]) -> None:
    text = json.dumps(json.loads(files.definition_file.read_text()) | change).encode()
    with pytest.raises(HypervisorError, match=next(iter(change))):
        read(files, text)


def test_fields_of_another_version_are_ignored_and_missing_ones_are_an_error(files: VmFiles) -> None:
    text = files.definition_file.read_bytes()
    assert read(files, text.replace(b'"format"', b'"colour": "red",\n "format"')) == DEFINITION
    with pytest.raises(HypervisorError, match="cpus"):
        read(files, text.replace(b'"cpus"', b'"cpvs"'))


def test_a_definition_of_another_vm_is_none_of_this_one(files: VmFiles) -> None:
    files.store(replace(DEFINITION, name="another"))
    with pytest.raises(HypervisorError, match="another"):
        files.load()


def test_the_state_follows_from_the_files(files: VmFiles) -> None:
    assert files.state(DEFINITION) is VmState.POWERED_OFF
    files.write_running(2**22 - 3, Birth(time_s=1.0))
    assert files.state(DEFINITION) is VmState.ABORTED
    assert files.stale_process() is None
    files.overlay.touch()
    files.partial.write_bytes(b"state")
    assert files.state(DEFINITION) is VmState.ABORTED, "half a state is none"
    files.complete_saved()
    assert files.state(DEFINITION) is VmState.SAVED
    files.use_saved()
    assert files.state(DEFINITION) is VmState.ABORTED, "a used state is none"
    assert files.state(replace(DEFINITION, resume_snapshot="1:a")) is VmState.SAVED
    files.ended_orderly()
    files.remove_leftovers()
    assert files.state(DEFINITION) is VmState.POWERED_OFF
    assert sorted(path.name for path in files.folder.iterdir()) == ["disk.qcow2", "vm.json"]


def test_our_own_process_is_found_by_pid_and_birth(files: VmFiles) -> None:
    import psutil

    me = psutil.Process()
    files.write_running(me.pid, birth.of(me.pid))
    assert files.stale_process() == me
    files.write_running(me.pid, Birth(time_s=me.create_time() - 1))
    assert files.stale_process() is None
    files.running.write_text('{"pid": "many"}')
    assert files.stale_process() is None


def test_a_process_that_an_older_version_wrote_down_is_found(files: VmFiles) -> None:
    import psutil

    me = psutil.Process()
    files.running.write_text(json.dumps({"pid": me.pid, "started": me.create_time()}))
    assert files.stale_process() == me


def test_an_interrupted_deletion_is_finished_later(files: VmFiles) -> None:
    parent = files.folder.parent
    files.folder.rename(parent / ".deleting-vm")
    sweep(parent)
    assert list(parent.iterdir()) == []
    files.remove()


def test_a_deletion_that_others_finish_is_done(files: VmFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, rename = files.folder.parent, Path.rename

    def and_swept(path: Path, target: Path) -> Path:
        renamed = rename(path, target)
        sweep(parent)
        return renamed

    monkeypatch.setattr(Path, "rename", and_swept)
    files.remove()
    assert list(parent.iterdir()) == []


def test_without_a_definition_there_is_no_vm(tmp_path: Path) -> None:
    assert VmFiles(tmp_path).load() is None


# Images -------------------------------------------------------------------------------------------------------------


def raw(path: Path) -> Path:
    path.write_bytes(b"\xfa".ljust(510, b"\0") + b"\x55\xaa" + b"\0" * 1024)
    return path


def test_images_are_what_they_contain_whatever_their_name(tmp_path: Path) -> None:
    assert diskimage.inspect(raw(tmp_path / "image.vdi")) == diskimage.DiskImage("raw", 1536)


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
def test_images_made_by_qemu_img(tmp_path: Path) -> None:
    source = raw(tmp_path / "raw")
    for kind in ("qcow2", "vdi"):
        made = tmp_path / kind
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", kind, source, made], check=True, timeout=60)
        assert diskimage.inspect(made).format == kind
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", source, "-F", "raw", tmp_path / "o"], check=True)
    with pytest.raises(diskimage.BadImage, match="another file"):
        diskimage.inspect(tmp_path / "o")
    assert diskimage.snapshots(tmp_path / "o") == []
    for tag in ("1:a", "2:ü b"):
        subprocess.run(["qemu-img", "snapshot", "-c", tag, tmp_path / "o"], check=True, timeout=60)
    found = diskimage.snapshots(tmp_path / "o")
    assert [(one.tag, one.memory_bytes) for one in found] == [("1:a", 0), ("2:ü b", 0)]
    os.truncate(tmp_path / "vdi", tmp_path.joinpath("vdi").stat().st_size - 4096)
    with pytest.raises(diskimage.BadImage, match="cut off"):
        diskimage.inspect(tmp_path / "vdi")


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (b"", "empty"),
        (b"KDMV", "VMware"),
        (b"\x1f\x8b", "gzip"),
        (b"<soft_link>", "link file"),
        (b"QFI\xfb", "cut off"),
        (b"QFI\xfb" + struct.pack(">I", 9) + bytes(200), "version 9"),
        (bytes(600), "neither"),
    ],
)
def test_what_is_no_image_is_named(tmp_path: Path, head: bytes, why: str) -> None:
    (tmp_path / "x").write_bytes(head)
    with pytest.raises(diskimage.BadImage, match=why):
        diskimage.inspect(tmp_path / "x")


@given(data=st.binary(max_size=1200))
def test_any_bytes_are_an_image_or_the_documented_error(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    for prefix in (b"", b"QFI\xfb", b"\0" * 64 + b"\x7f\x10\xda\xbe"):
        path.write_bytes(prefix + data)
        for read in (diskimage.inspect, diskimage.snapshots):
            with contextlib.suppress(diskimage.BadImage, OSError):
                read(path)
