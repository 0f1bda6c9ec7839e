"""Fuzzed: what is read from files and from programs, by functions that refuse in their own words or come back.

job         job.xml, in both forms in which it is judged
initdata    init_data.xml
checkpoint  vmwrapper_checkpoint.json; what can be read is written and read as the same
links       the list of a slot's links; likewise
kept        small JSON files: caches, what the drivers remember of a VM, the description of a shipped image
image       headers of disk images, with the snapshots inside
archive     a zip with input files, unpacked into a folder: nothing appears beside it
vbox        what VBoxManage prints and VirtualBox logs
smbios      what the agent finds in its guest's SMBIOS
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from guest.agent import smbios
from tools.wrapper_cases import CASES
from vmcontrol.common import imagenote, jsonfile
from vmcontrol.hypervisors.common import diskimage, trial
from vmcontrol.hypervisors.common.diskimage import BadImage
from vmcontrol.hypervisors.qemu import files as qemu_files
from vmcontrol.hypervisors.virtualbox import files as vbox_files
from vmcontrol.hypervisors.virtualbox import output
from vmwrapper.boinc import initdata
from vmwrapper.host import unpacking
from vmwrapper.job import commandline, meaning, parse
from vmwrapper.state import checkpoint, links
from vmwrapper.vm import shipped_image

_FOLDER = tempfile.TemporaryDirectory(prefix="vmwrapper-fuzz-")
"""Goes with the process."""


def _file(data: bytes) -> Path:
    path = Path(_FOLDER.name, "input")
    path.write_bytes(data)
    return path


def job(data: bytes) -> None:
    findings = parse.examine(data, "job.xml")
    assert (findings.job is None) == bool(findings.errors)
    size, position = len(data) % 7 + 1, 0

    def read(_: int) -> bytes:
        nonlocal position
        position += size
        return data[position - size : position]

    again = parse._examine(read, "job.xml")  # that a text is no UTF-8 is seen by one of the two ways of reading only
    assert again.errors == findings.errors
    assert (again.job is None) == (findings.job is None)
    if again.job is not None and findings.job is not None:
        assert replace(again.job, warnings=()) == replace(findings.job, warnings=())
    if findings.job is not None:
        for task in findings.job.tasks:
            meaning.digest(task)
            commandline.split(task.command_line)


def init_data(data: bytes) -> None:
    for content in (data, b"<app_init_data>" + data + b"</app_init_data>"):
        with contextlib.suppress(initdata.InitDataError):
            found = initdata.parse(content)
            assert found.checkpoint_period >= 1
            assert found.ncpus > 0


def checkpoint_(data: bytes) -> None:
    try:
        read = checkpoint.from_bytes(data)
    except jsonfile.Damaged:
        return
    assert checkpoint.from_bytes(checkpoint.to_bytes(read)) == read


def links_(data: bytes) -> None:
    try:
        read = links.from_bytes(data)
    except jsonfile.Damaged:
        return
    assert links.from_bytes(links.to_bytes(read)) == read


_KINDS: tuple[type, ...] = (trial._Kept,)


def kept(data: bytes) -> None:
    path = _file(data)
    for kind in _KINDS:
        jsonfile.load_kept(path, kind, 1)
    with contextlib.suppress(ValueError):
        jsonfile.parse(data)
    for definition in (qemu_files.Definition, vbox_files.Definition):
        with contextlib.suppress(ValueError):
            jsonfile.typed(definition, jsonfile.load(path))
    with contextlib.suppress(shipped_image.BadShippedImage):
        shipped_image.Description.to_json(shipped_image.read(path, "input"))


def image(data: bytes) -> None:
    path = _file(data)
    for read in (diskimage.inspect, diskimage.check_overlay, diskimage.snapshots):
        with contextlib.suppress(BadImage):
            read(path)
    imagenote.read(path)
    shipped_image.packing(path)


def archive(data: bytes) -> None:
    with tempfile.TemporaryDirectory(dir=_FOLDER.name) as outer:
        folder = Path(outer, "slot")
        folder.mkdir()
        with contextlib.suppress(unpacking.BadArchive):
            unpacking.unpack(_file(data), folder, lambda: None, lambda _name: None, limit=1 << 20)
        assert [path.name for path in Path(outer).iterdir()] == ["slot"], "something lies beside the folder"
        for path in folder.rglob("*"):
            assert path.resolve().is_relative_to(folder.resolve()), path


def vbox(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    readers: tuple[Callable[[str], object], ...] = (
        output.without_warnings, output.version, output.vm_list, output.pairs, output.state,
        output.facts, output.log_state, output.log_process, output.log_ends_in_order,
        output.log_trouble, output.runtime_error, output.max_cpus, output.media,
        output.host_only_adapters,
    )  # fmt: skip
    for read in readers:
        read(text)


def smbios_(data: bytes) -> None:
    smbios.settings_in(data)
    smbios.texts_of_table(data)


_JOB = b"""<job_desc>
  <unzip_input><zipfilename>in.zip</zipfilename></unzip_input>
  <VMmanage_task><application>HostMain</application><command_line>./HostConfig.cfg</command_line></VMmanage_task>
  <task><application>p</application><weight>2</weight><setenv>A=b</setenv><daemon/><priority>3</priority>
    <command_line>$PWD boinc_resolve(in)</command_line><stdin_filename>in</stdin_filename></task>
  <task><virtualmachine>one</virtualmachine><image>i.vdi</image><application>./w</application><cpus>ncpus</cpus>
    <copy_app_to_VM>1</copy_app_to_VM><copy_file_from_VM>out</copy_file_from_VM><memory_size_mb>256</memory_size_mb>
    <port_forward><host_port>0</host_port><guest_port>80</guest_port></port_forward></task>
  <zip_output><zipfilename>o.zip</zipfilename><filename>out.*</filename></zip_output>
</job_desc>
"""
_INIT = b"""<app_init_data>
<major_version>8</major_version><project_preferences><b>x<p></project_preferences>
<project_dir>/var/lib/R&D/projects/p</project_dir><ncpus>4</ncpus><checkpoint_period>300</checkpoint_period>
<host_info><p_ncpus>8</p_ncpus></host_info><global_preferences><cpu_usage_limit>80</cpu_usage_limit></global_preferences>
</app_init_data>
"""
_INFO = b"""name="vm"
UUID="7f6fa9b8-0d70-4a71-9e5e-d1cbd8c0d2c5"
VMState="running"
VMStateChangeTime="2026-11-30T10:00:00.000000000"
Forwarding(0)="agent,tcp,127.0.0.1,40001,,4616"
SnapshotName="vmwrapper_1"
SnapshotUUID="7f6fa9b8-0d70-4a71-9e5e-d1cbd8c0d2c6"
CurrentSnapshotName="vmwrapper_1"
CurrentSnapshotNode="SnapshotName"
"""
_LOG = b"""00:00:01.0 Process ID: 4711
00:00:02.5 Changing the VM state from 'POWERING_ON' to 'RUNNING'
00:00:03.0 Console: VM runtime error: fatal=false, errorID=DevATA_DISKFULL message="full"
Oracle VM VirtualBox Command Line Management Interface Version 7.2.22
"a" {7f6fa9b8-0d70-4a71-9e5e-d1cbd8c0d2c5}
Maximum guest CPU count:         64
"""


def _jobs() -> list[bytes]:
    jobs = [case.job.encode() if isinstance(case.job, str) else case.job for case in CASES.values()]
    whole = [b"<job_desc>" + one + b"</job_desc>" for one in jobs if len(one) < 10_000]
    return [_JOB, b"\xef\xbb\xbf" + _JOB.replace(b"\n", b"\r\n"), _CONTAINER_JOB, *whole]


_CONTAINER_JOB = b"""<job_desc>
<task>
 <container>app.vdi</container> <command_line>--fast</command_line> <stdout_filename>app.vdi</stdout_filename>
 <copy_file_from_VM>out</copy_file_from_VM>
</task>
<intermediate_upload_file>app.vdi</intermediate_upload_file>
<zip_output> <zipfilename>app.vdi</zipfilename> <filename>o.*</filename> </zip_output>
</job_desc>
"""
"""Without HostMain, and with outputs in the place of the container's disk."""


def _zips() -> list[bytes]:
    given = [case.files["i.zip"] for case in CASES.values() if "i.zip" in case.files]
    return [_zip(), *(one for one in given if one.startswith(b"PK"))]


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("lib/a", b"a" * 100)
        opened.writestr("lib/../lib/b", b"b")
        opened.writestr("../c", b"c")
        opened.writestr("job.xml", b"<soft_link>/etc/passwd</soft_link>")
        link = zipfile.ZipInfo("l")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        opened.writestr(link, b"/etc")
        opened.writestr("l/d", b"d")
    return out.getvalue()


def _images() -> list[bytes]:
    qcow2 = bytearray(b"QFI\xfb\x00\x00\x00\x03".ljust(512, b"\0"))
    qcow2[20:24], qcow2[24:32] = (16).to_bytes(4, "big"), (1 << 20).to_bytes(8, "big")
    qcow2[60:64], qcow2[64:72] = (1).to_bytes(4, "big"), (104).to_bytes(8, "big")
    vdi = bytearray(imagenote.write(256).rjust(imagenote.COMMENT_AT + imagenote.COMMENT_BYTES, b"<").ljust(1024, b"\0"))
    vdi[0x40:0x48] = b"\x7f\x10\xda\xbe\x01\x00\x01\x00"
    return [bytes(qcow2), bytes(vdi), bytes(510) + b"\x55\xaa", b"\x1f\x8b\x08", b"\xfd7zXZ\0"]


def _snapshot() -> checkpoint.SnapshotRecord:
    return checkpoint.SnapshotRecord("vmwrapper_1", True, 1, checkpoint.GuestProgress(1, "c1"))


def _checkpoints() -> list[bytes]:
    one = checkpoint.Checkpoint(
        "a" * 64,
        "r_0",
        tasks_done=1,
        current=checkpoint.GuestProgress(1, "c1", 2, checkpoint.Phase.SENT),
        vms=(checkpoint.VmRecord("one", "vmwrapper_one", snapshots=(_snapshot(),)),),
        temporary_exits={"vm-trouble": 2},
    )
    return [checkpoint.to_bytes(one), checkpoint.to_bytes(checkpoint.Checkpoint("b" * 64))]


def _links() -> bytes:
    known = (
        links.Link("in", links.Kind.SOFT_LINK, "../../projects/p/in", 1, 2),
        links.Link("d/o", links.Kind.SYMLINK, "/x", 1, 3),
    )
    return links.to_bytes(links.SlotLinks(True, known, ("a",)))


def _kept() -> list[bytes]:
    probe = {"format": 1, "computer": "c", "version": "7", "detail": "d", "hardware": True, "time": 1.5}
    description = {"size": 1 << 20, "sha256": "a" * 64, "stored": 5, "memory_mb": 256}
    return [json.dumps(probe).encode(), json.dumps(description).encode(), b"[1e999, NaN]", b'{"a":1,"a":2}']


def _dmi() -> bytes:
    text = b"vmwrapper secret=" + b"ab" * 32 + b" interface=eth1\0"
    return b"\x0b\x05\x00\x00\x01" + text + b"\0" + b"\x7f\x04\x01\x00\0\0"


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]], tuple[str, ...]]] = {
    "job": (
        job,
        _jobs,
        ("vmwrapper.job.elements", "vmwrapper.job.parse"),
    ),
    "initdata": (init_data, lambda: [_INIT, b"<slot>0x2</slot>"], ("vmwrapper.boinc.initdata",)),
    "checkpoint": (checkpoint_, _checkpoints, ("vmwrapper.state.checkpoint", "vmcontrol.common.jsonfile")),
    "links": (links_, lambda: [_links()], ("vmwrapper.state.links", "vmcontrol.common.jsonfile")),
    "kept": (kept, _kept, ("vmcontrol.common.jsonfile",)),
    "image": (image, _images, ("vmcontrol.hypervisors.common.diskimage", "vmcontrol.common.imagenote")),
    "archive": (archive, _zips, ("vmwrapper.host.unpacking", "vmwrapper.host.zip_names")),
    "vbox": (vbox, lambda: [_INFO, _LOG], ("vmcontrol.hypervisors.virtualbox.output",)),
    "smbios": (smbios_, lambda: [_dmi(), b"secret=abc"], ("guest.agent.smbios",)),
}  # fmt: skip
