"""The pure parts of the guest image's recipe."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest.image import build, disk, kernel, modules, packages, partitions, system, tools

VERSION = "6.1.0-test"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A kernel package, unpacked. Its modules have what depmod reads of one: .modinfo, and the symbols of others."""
    if shutil.which("depmod", path=tools.PATH_OF_TOOLS) is None or shutil.which("as") is None:
        pytest.skip("depmod or as is missing (Debian packages kmod and binutils)")
    folder = tmp_path / "unpacked/lib/modules" / VERSION
    folder.mkdir(parents=True)

    def add(name: str, modinfo: str = "", *, uses: Sequence[str] = ()) -> None:
        source = [f'.section .modinfo,"a"\n.asciz "{text}"' for text in modinfo.split("|")]
        source.append(f'.section __ksymtab_strings,"a"\n.asciz "{name}_symbol"')
        source += [".text", *(f".quad {used}_symbol" for used in uses), ""]
        tools.run(["as", "--64", "-o", folder / f"{name}.ko", "-"], text="\n".join(source))

    add("bus", "license=GPL|alias=pci:v00001AF4d*")
    add("disk-driver", "alias=virtio:d00000002v*", uses=("bus", "core"))
    add("core")
    add("sum", "alias=crypto-sum")
    add("filesystem", "softdep=pre: crypto-sum post: late", uses=("core",))
    add("late")
    (folder / "modules.builtin").write_text("kernel/lib/in-kernel.ko\n")
    modules.index(tmp_path / "unpacked", VERSION)
    return tmp_path / "unpacked"


def test_modules_bring_what_they_need(tree: Path) -> None:
    found = modules.closure(tree, VERSION, ["disk_driver", "filesystem", "in_kernel"])
    assert [path.stem for path in found] == ["bus", "core", "disk-driver", "filesystem", "late", "sum"]


def test_modprobe_finds_modules_by_alias_and_loads_what_they_need_first(tree: Path, tmp_path: Path) -> None:
    modules.install(modules.closure(tree, VERSION, ["disk-driver", "filesystem"]), tmp_path / "made", VERSION)
    made = tmp_path / "made/lib/modules" / VERSION
    needed = dict(line.split(":") for line in (made / "modules.dep").read_text().splitlines())
    assert set(needed["disk-driver.ko"].split()) == {"bus.ko", "core.ko"}
    assert "alias virtio:d00000002v* disk_driver\n" in (made / "modules.alias").read_text()
    assert (made / "sum.ko").read_bytes().startswith(b"\x7fELF")
    assert {path.suffix for path in made.iterdir()} == {".ko", ".dep", ".alias"}


def test_an_unknown_module_is_named(tree: Path) -> None:
    with pytest.raises(tools.BuildError, match="no-such"):
        modules.closure(tree, VERSION, ["core", "no-such"])


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is missing (Debian package cpio)")
def test_an_archive_for_the_kernel_has_neither_owner_nor_time_of_its_build(tmp_path: Path) -> None:
    archives: list[bytes] = []
    for name in ("one", "two"):
        tree = tmp_path / name
        (tree / "a").mkdir(parents=True)
        (tree / "a/text").write_text("hello")
        (tree / "a/link").symlink_to("text")
        os.utime(tree / "a/text", (len(archives), len(archives)))
        partitions.make_cpio(tree, tmp_path / f"{name}.cpio")
        archives.append((tmp_path / f"{name}.cpio").read_bytes())
    assert archives[0] == archives[1]
    listed = tools.run(["cpio", "--list", "--verbose", "--numeric-uid-gid", "--quiet", "--file", tmp_path / "one.cpio"])
    entries = [line.split() for line in listed.splitlines()]
    assert [(words[0], *words[2:4], *words[8:]) for words in entries] == [
        ("drwxr-xr-x", "0", "0", "a"),
        ("lrwxrwxrwx", "0", "0", "a/link", "->", "text"),
        ("-rw-r--r--", "0", "0", "a/text"),
    ]


def partition(start_mib: int, size_mib: int, *, content: Path = Path("none"), active: bool = False) -> disk.Partition:
    return disk.Partition(content, start_mib * disk.MIB, size_mib * disk.MIB, disk.LINUX, active)


def test_the_boot_record_lists_the_partitions() -> None:
    record = disk.master_boot_record(b"code", [partition(1, 1, active=True), partition(2, 3)], signature=0x11223344)
    assert len(record) == 512
    assert record[510:] == b"\x55\xaa"
    assert record[440:444] == b"\x44\x33\x22\x11"
    assert struct.unpack_from("<B3xB3xII", record, 446) == (0x80, disk.LINUX, 2048, 2048)
    assert struct.unpack_from("<B3xB3xII", record, 462) == (0, disk.LINUX, 4096, 3 * 2048)


@pytest.mark.parametrize(
    ("code", "partitions"),
    [
        (bytes(441), []),
        (b"", [partition(1, 2), partition(2, 1)]),
        (b"", [partition(0, 1)]),
        (b"", [partition(1, 0)]),
        (b"", [disk.Partition(Path("none"), 513, disk.MIB, disk.LINUX)]),
        (b"", [partition(1, 3 * 1024 * 1024)]),
        (b"", [partition(i, 1) for i in range(1, 6)]),
    ],
)
def test_a_boot_record_that_cannot_be_is_refused(code: bytes, partitions: list[disk.Partition]) -> None:
    with pytest.raises(disk.DiskError):
        disk.master_boot_record(code, partitions, signature=0)


def read_vdi(path: Path) -> bytes:
    content = path.read_bytes()
    assert struct.unpack_from("<I", content, 64)[0] == disk.VDI_SIGNATURE
    table_at, data_at = struct.unpack_from("<II", content, 0x154)
    size, block, _, count, _ = struct.unpack_from("<QIIII", content, 0x170)
    out = io.BytesIO(bytes(size))
    for number, place in enumerate(struct.unpack_from(f"<{count}I", content, table_at)):
        if place != disk.UNALLOCATED:
            out.seek(number * block)
            out.write(content[data_at + place * block : data_at + (place + 1) * block])
    return out.getvalue()


def test_a_vdi_holds_its_parts_and_no_holes(tmp_path: Path) -> None:
    sparse, small = tmp_path / "sparse", tmp_path / "small"
    with sparse.open("wb") as file:
        file.truncate(5 * disk.MIB)
        file.seek(3 * disk.MIB + 17)
        file.write(b"inside")
    small.write_bytes(bytes(disk.MIB + 3) + b"end")
    target = tmp_path / "x.vdi"
    parts = [partition(1, 5, content=sparse), partition(6, 2, content=small)]
    first = disk.write_vdi(target, b"boot", parts)
    wanted = bytearray(8 * disk.MIB)
    wanted[:4] = b"boot"
    wanted[4 * disk.MIB + 17 : 4 * disk.MIB + 23] = b"inside"
    wanted[7 * disk.MIB + 3 : 7 * disk.MIB + 6] = b"end"
    assert read_vdi(target) == wanted
    assert target.stat().st_size == 4 * disk.MIB  # header and three blocks
    content = target.read_bytes()
    assert disk.write_vdi(target, b"boot", parts) == first
    assert target.read_bytes() == content
    # VirtualBox knows media by UUID: another content must have another one.
    assert disk.write_vdi(target, b"Boot", parts) != first


def test_what_is_larger_than_its_partition_is_refused(tmp_path: Path) -> None:
    content = tmp_path / "content"
    content.write_bytes(bytes(disk.MIB + 1))
    with pytest.raises(disk.DiskError, match="larger than"):
        disk.write_vdi(tmp_path / "x.vdi", b"", [partition(1, 1, content=content)])


def unpack_lz4(blocks: bytes) -> bytes:
    """As the loader does it: the block format of LZ4, byte by byte."""
    out, at = bytearray(), 0
    while length := struct.unpack_from("<I", blocks, at)[0]:
        at += 4
        end = at + length
        while at < end:
            token = blocks[at]
            at += 1
            count, match = token >> 4, token & 15
            if count == 15:
                while True:
                    count += blocks[at]
                    at += 1
                    if blocks[at - 1] != 255:
                        break
            out += blocks[at : at + count]
            at += count
            if at >= end:
                break
            back = struct.unpack_from("<H", blocks, at)[0]
            at += 2
            if match == 15:
                while True:
                    match += blocks[at]
                    at += 1
                    if blocks[at - 1] != 255:
                        break
            for _ in range(match + 4):
                out.append(out[-back])
    return bytes(out)


@pytest.mark.skipif(shutil.which("lz4") is None, reason="lz4 is missing (Debian package lz4)")
@pytest.mark.parametrize("content", [b"", b"x", bytes(100_000), b"abcdefghij" * 5000, bytes(range(256)) * 70])
def test_the_loaders_blocks_hold_the_content(content: bytes) -> None:
    blocks = kernel.lz4_blocks(content)
    assert len(blocks) % 8 == 0
    assert unpack_lz4(blocks) == content


@given(st.binary(max_size=1200))
def test_what_is_no_kernel_is_refused(content: bytes) -> None:
    with pytest.raises(kernel.KernelError):
        kernel.packed_kernel(content)


def test_pins_survive_a_manifest_and_others_are_refused() -> None:
    pins = packages.Pins("linux-image-1", {"linux-image-1": "6.1", "libc6": "2"}, {"a-1-py3-none-any.whl": "00"})
    assert packages.Pins.from_json(json.dumps({"format": 1, **pins.as_json()})) == pins
    for text in ("", "[]", "{}", '{"kernel": "k", "debian": {}, "python": {}}'):
        with pytest.raises(packages.PackageError):
            packages.Pins.from_json(text)


def test_files_are_laid_over_the_tree_and_nowhere_else(tmp_path: Path) -> None:
    tree, files, outside = tmp_path / "tree", tmp_path / "files", tmp_path / "outside"
    for folder in (tree / "usr/bin", tree / "opt", outside, files / "bin", files / "etc/deep"):
        folder.mkdir(parents=True)
    (tree / "bin").symlink_to("usr/bin")
    (tree / "etc").symlink_to("opt")
    (tree / "opt/old").symlink_to(outside / "old")
    (files / "bin/program").write_text("#!/bin/sh\n")
    (files / "etc/deep/file").write_text("x")
    (files / "etc/old").write_text("new")
    (files / "link").symlink_to("/anywhere")
    system.overlay(tree, files)
    assert (tree / "usr/bin/program").is_file()
    assert (tree / "opt/deep/file").is_file()
    assert (tree / "opt/old").read_text() == "new"
    assert (tree / "link").readlink() == Path("/anywhere")
    (tree / "opt/app").symlink_to(outside)
    (tree / "opt/up").symlink_to("../../outside")
    for name in ("app", "up"):
        more = tmp_path / f"more-{name}"
        (more / "opt" / name).mkdir(parents=True)
        (more / "opt" / name / "file").write_text("x")
        with pytest.raises(packages.PackageError, match="leads out of"):
            system.overlay(tree, more)
    assert list(outside.iterdir()) == []


def archive(*members: tuple[str, bytes, str]) -> bytes:
    """A tar of (name, type, where a link leads) members; files have the content "new"."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, kind, link in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mode = kind, link, 0o6777
            member.size = 3 if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(b"new") if member.size else None)
    return made.getvalue()


def package(path: Path, data: bytes) -> Path:
    """A .deb with this archive of files: an ar archive (ar(5)) of three members."""
    made = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar", archive()), ("data.tar", data)):
        made += f"{name:16}{0:<12}{0:<6}{0:<6}{'100644':8}{len(content):<10}`\n".encode() + content
        made += b"\n" * (len(content) % 2)
    path.write_bytes(made)
    return path


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is missing (Debian package dpkg)")
def test_a_package_is_laid_over_the_tree_and_nowhere_else(tmp_path: Path) -> None:
    tree, outside, deb = tmp_path / "work/tree", tmp_path / "outside", tmp_path / "a.deb"
    (tree / "usr").mkdir(parents=True)
    (tree / "lib").symlink_to("usr")
    outside.mkdir()
    (outside / "file").write_text("old")
    out = str(outside)
    members = [
        ("./", tarfile.DIRTYPE, ""),
        ("./lib/", tarfile.DIRTYPE, ""),
        ("/lib/one", tarfile.REGTYPE, ""),
        ("./lib/two", tarfile.LNKTYPE, "./lib/one"),
        ("./link", tarfile.SYMTYPE, f"{out}/file"),
        ("./away", tarfile.SYMTYPE, out),
    ]
    system.add_package(tree, package(deb, archive(*members)))
    system.add_package(tree, package(deb, archive(("./link", tarfile.REGTYPE, ""))))
    assert (tree / "usr/one").read_text() == (tree / "usr/two").read_text() == (tree / "link").read_text() == "new"
    assert (tree / "usr/one").stat().st_mode & 0o7777 == 0o755
    assert (tree / "away").readlink() == outside
    for evil in (
        [("./away/evil", tarfile.REGTYPE, "")],
        [("./other", tarfile.SYMTYPE, "../.."), ("./other/evil", tarfile.REGTYPE, "")],
        [("./away/evil/", tarfile.DIRTYPE, "")],
        [("./away/evil", tarfile.SYMTYPE, "x")],
        [("./mine", tarfile.LNKTYPE, "./away/file")],
        [("./mine", tarfile.LNKTYPE, "../outside/file")],
        [("../../outside/evil", tarfile.REGTYPE, "")],
    ):
        with pytest.raises(packages.PackageError):
            system.add_package(tree, package(deb, archive(*evil)))
    with pytest.raises(packages.PackageError):
        system.add_package(tree, package(deb, b"no archive" * 100))
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "old"
    assert not (tree.parent / "evil").exists()
    assert [path.name for path in tree.parent.iterdir()] == ["tree"]


def test_the_agents_modules_are_found_by_what_they_import(tmp_path: Path) -> None:
    def write(path: str, text: str = "") -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    for package in ("guest", "guest/agent", "guest/image", "vmcontrol", "vmcontrol/common", "vmwrapper"):
        write(f"{package}/__init__.py")
    write(
        "guest/agent/main.py",
        "from vmcontrol.common import eventloop\ndef f():\n    import vmcontrol.common.handshake\n",
    )
    write("guest/image/build.py", "from vmcontrol import host_only")
    write("vmcontrol/common/eventloop.py", "import os, twisted")
    write("vmcontrol/common/handshake.py", "from . import lines")
    write("vmcontrol/common/lines.py")
    write("vmcontrol/host_only.py", "import vmwrapper")
    assert [str(path) for path in system.agent_sources(tmp_path)] == [
        "guest/__init__.py",
        "guest/agent/__init__.py",
        "guest/agent/main.py",
        "vmcontrol/__init__.py",
        "vmcontrol/common/__init__.py",
        "vmcontrol/common/eventloop.py",
        "vmcontrol/common/handshake.py",
        "vmcontrol/common/lines.py",
    ]


def test_the_agent_needs_nothing_of_the_host_side() -> None:
    sources = {str(path) for path in system.agent_sources()}
    assert "guest/agent/main.py" in sources
    assert not [path for path in sources if path.startswith(("vmwrapper", "vmcontrol/hypervisors", "guest/image"))]


def test_a_key_changes_with_every_input(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("1")
    before = build.digest_of("x", tmp_path)
    assert build.digest_of("x", tmp_path) == before
    file.chmod(0o755)
    executable = build.digest_of("x", tmp_path)
    file.write_text("2")
    assert len({before, executable, build.digest_of("x", tmp_path), build.digest_of("y", tmp_path)}) == 4


def test_missing_tools_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tools.TOOLS, "no-such-program", "its-package")
    with pytest.raises(tools.BuildError, match="its-package"):
        tools.check_tools()


@pytest.mark.parametrize("name", ["initramfs/init", "system/etc/init.d/boot", "system/etc/init.d/stop"])
def test_the_guests_scripts_are_shell(name: str) -> None:
    subprocess.run(["sh", "-n", tools.FILES / name], check=True)
