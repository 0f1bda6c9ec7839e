"""A container's disk for tests: busybox, to the format of container disks. No tests."""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

from guest.image import disk
from guest.image.cache import guest_image
from vmcontrol.common.containerdisk import FIRST_ID, HEADER_AT, VM_ID, ContainerConfig, ContainerDisk, encode

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "guest-image"
USER = 1001
PROGRAMS = "sh cat echo sleep ls id rm dd tail true kill"


def busybox_disk(folder: Path, cmd: Sequence[str], *, name: str = "app.vdi", **config: object) -> Path:
    """A VDI whose container runs `sh` with these words as the user USER in /app, which holds the file `own`."""
    guest_image(CACHE)
    root, squashfs, target = folder / "root", folder / "squashfs", folder / name
    for one in ("bin", "app", "etc", "proc", "dev", "sys", "tmp"):
        (root / one).mkdir(parents=True)
    shutil.copy(next(path for path in (CACHE / "stages").rglob("usr/bin/busybox") if path.is_file()), root / "bin")
    for one in PROGRAMS.split():
        (root / "bin" / one).symlink_to("busybox")
    (root / "app" / "own").write_text("of the image\n")
    owners = ["-force-uid", str(FIRST_ID), "-force-gid", str(FIRST_ID), "-p", f"/app m 755 {VM_ID} {VM_ID}"]
    words = ["mksquashfs", str(root), str(squashfs), "-noappend", "-quiet", "-no-progress", *owners]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    size = -(-squashfs.stat().st_size // disk.MIB) * disk.MIB
    partitions = [disk.Partition(squashfs, disk.MIB, size, disk.LINUX)]
    disk.write_vdi(target, disk.master_boot_record(b"", partitions, signature=0), partitions)
    values = {"entrypoint": ("sh",), "cmd": tuple(cmd), "workdir": "/app", "user": "app", "uid": USER, "gid": USER}
    id = hashlib.sha256(squashfs.read_bytes()).hexdigest()
    header = encode(ContainerDisk(id, "test:1", config=ContainerConfig(**(values | config))))  # type: ignore[arg-type]
    with target.open("r+b") as file:
        file.seek(0x158)
        (data_at,) = struct.unpack("<I", file.read(4))
        file.seek(data_at + HEADER_AT)
        file.write(header)
    shutil.rmtree(root)
    squashfs.unlink()
    return target
