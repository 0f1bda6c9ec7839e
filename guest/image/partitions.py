"""The guest's disk and its three partitions, from finished contents; files in, files out. What is in them: build.py.

disk:  boot record | 1 FAT: syslinux, kernel, initramfs | 2 squashfs: the system | 3 ext4: 8.5 GiB to write
"""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path

from guest.image import disk
from guest.image.tools import DATE, FILES, MBR_CODE, run

DISK_SIGNATURE = 0x564D5752
FAT_ID = "564D5752"
DATA_UUID = uuid.UUID("6f1c7f0e-3a5b-4b53-9f1e-2f8b6c1d7a10")
DATA_HASH_SEED = uuid.UUID("6f1c7f0e-3a5b-4b53-9f1e-2f8b6c1d7a11")

MEMORY_MB = 128
"""MiB that the guest needs to boot: files/loader.s unpacks the kernel below that. The image says so in its header."""

COMMAND_LINE = (
    "console=tty0 console=ttyS0,115200",
    "loglevel=5 printk.devkmsg=on",  # our lines are level 4: on the console, without the kernel's chatter
    "panic=10",
    # 0.4 of 6.5 s of an emulated boot: the kernel's tests of its own ciphers, and rewriting itself against speculation.
    # This machine has one user and one job; what guards the host and other machines is the host's own kernel.
    "cryptomgr.notests mitigations=off",
    "nokaslr",  # the loader puts the kernel where it was linked for
    "random.trust_bootloader=on",
)

COMPRESSIONS = {
    "zstd": ("-comp", "zstd", "-Xcompression-level", "10"),
    "lz4": ("-comp", "lz4", "-Xhc"),
    "gzip": ("-comp", "gzip"),
    "xz": ("-comp", "xz"),
}


def make_squashfs(tree: Path, target: Path, compression: str) -> None:
    options = ["-noappend", "-quiet", "-no-progress", "-all-root", "-no-xattrs", "-no-exports", "-b", "128K"]
    options += ["-mkfs-time", str(DATE), "-all-time", str(DATE)]
    # mksquashfs refuses SOURCE_DATE_EPOCH beside these options; alone it would only cut times that are later.
    run(["env", "-u", "SOURCE_DATE_EPOCH", "mksquashfs", tree, target, *options, *COMPRESSIONS[compression]])


def make_cpio(tree: Path, target: Path) -> None:
    """A tree as the kernel unpacks it into memory: all belongs to root, has DATE and comes after its folder."""
    for path in (paths := sorted(tree.rglob("*"))):
        os.utime(path, (DATE, DATE), follow_symlinks=False)
    names = "".join(f"{path.relative_to(tree)}\n" for path in paths)
    options = ("--create", "--format=newc", "--reproducible", "--owner=0:0", "--quiet")
    run(["cpio", *options, "--directory", tree, "--file", target], text=names)


def make_boot_partition(kernel_files: Path, target: Path) -> None:
    """A FAT file system with syslinux, kernel and initramfs."""
    with tempfile.TemporaryDirectory(prefix="boot-", dir=target.parent) as name:
        configuration = Path(name) / "syslinux.cfg"
        text = (FILES / "syslinux.cfg").read_text(encoding="ascii")
        configuration.write_text(text.replace("@COMMAND_LINE@", " ".join(COMMAND_LINE)), encoding="ascii")
        os.utime(configuration, (DATE, DATE))
        contents = [kernel_files / "vmlinuz", kernel_files / "initrd", configuration]
        for path in contents:
            os.utime(path, (DATE, DATE))
        size = sum(path.stat().st_size for path in contents) + disk.MIB
        kilobytes = -(-size // disk.MIB) * 1024
        hidden = str(disk.MIB // disk.SECTOR)
        with target.open("wb") as file:
            file.truncate(kilobytes * 1024)
        run(["mkfs.fat", "-F", "16", "-s", "8", "--invariant", "-i", FAT_ID, "-h", hidden, "-n", "VMWRAPPER", target])
        run(["syslinux", "--install", target])
        run(["mcopy", "-m", "-i", target, *contents, "::/"])


def make_data_partition(target: Path, mebibytes: int) -> None:
    """An ext4 file system, almost all of it a hole, with the folders that the guest may write."""
    with target.open("wb") as file:
        file.truncate(mebibytes * disk.MIB)
    extended = (
        f"hash_seed={DATA_HASH_SEED},lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0,nodiscard,num_backup_sb=0"
    )
    # No copies of the superblock all over the disk: each would cost 1 MiB of the image. 64 KiB per inode: the tables
    # of an 8 GiB disk stay small.
    features = "sparse_super2,^resize_inode"
    options = ("-q", "-F", "-U", str(DATA_UUID), "-L", "data", "-m", "0", "-i", "65536", "-J", "size=16")
    run(["mkfs.ext4", *options, "-O", features, "-E", extended, target])
    commands = []
    for folder, mode, owner in (
        ("/home", 0o755, 0),
        ("/home/vm", 0o755, 1000),
        ("/tmp", 0o1777, 0),  # noqa: S108 (a folder of the image)
        ("/vartmp", 0o1777, 0),
    ):
        commands.append(f"mkdir {folder}")
        commands.append(f"set_inode_field {folder} mode 0{0o40000 | mode:o}")
        commands += [f"set_inode_field {folder} {field} {owner}" for field in ("uid", "gid")]
    run(["debugfs", "-w", "-f", "/dev/stdin", target], text="\n".join(commands) + "\n")


def make_disk(parts: Path, target: Path) -> uuid.UUID:
    """boot, system and data, one after the other, on a disk with a boot record."""

    def aligned(size: int) -> int:
        return -(-size // disk.MIB) * disk.MIB

    code = next(path for path in MBR_CODE if path.exists()).read_bytes()
    position = disk.MIB
    partitions = []
    for name, kind, active in (
        ("boot", disk.FAT16_LBA, True),
        ("system", disk.LINUX, False),
        ("data", disk.LINUX, False),
    ):
        content = parts / name
        partitions.append(disk.Partition(content, position, aligned(content.stat().st_size), kind, active))
        position += partitions[-1].size
    record = disk.master_boot_record(code, partitions, signature=DISK_SIGNATURE)
    return disk.write_vdi(target, record, partitions, memory_mb=MEMORY_MB)
