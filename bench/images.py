"""The image on its way to the volunteer: sizes and times of packing, and unpacked once against copied for each task.

    python -m bench.images IMAGE... [--tasks 8] [--packers NAME,...] [--folder FOLDER]

IMAGE: not compressed, VDI or raw. Everything is written into a new folder in FOLDER (default: the current one) and
synced, so the times are those of its disk; the image itself is in the file cache.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vmwrapper.context.background import Gate
from vmwrapper.vm import shipped_image


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.images", description="Sizes and times of shipping an image.")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--packers", default=",".join(PACKERS), help="some of: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path())
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}")
    for image in options.images:
        with tempfile.TemporaryDirectory(prefix="bench-images-", dir=options.folder) as folder:
            measure(image, Path(folder), options.tasks, options.packers.split(","))


def measure(image: Path, folder: Path, tasks: int, packers: list[str]) -> None:
    print(f"{image.name}: {image.stat().st_size / 1e6:.1f} MB")
    copy = folder / "image"
    shutil.copyfile(image, copy)
    description = shipped_image.describe(copy)
    for name, pack in PACKERS.items():
        if shutil.which(pack[0]) is None or name not in packers:
            continue
        packed = folder / f"packed.{name}"
        line = f"  {name:<12} packed in {timed(lambda: run(pack, copy, packed))}"  # noqa: B023
        line += f", {packed.stat().st_size / 1e6:.1f} MB"
        if name.startswith(("xz", "gzip")):
            target = folder / name
            target.mkdir()
            line += f", unpacked, checked and synced in {timed(lambda: unpack(packed, description, target))}"  # noqa: B023
            again = timed(lambda: unpack(packed, description, target))  # noqa: B023
            line += f", the next job: {again}, {disk(target) / 1e6:.1f} MB on disk"
            shutil.rmtree(target)
        elif name.startswith("zstd"):
            line += f", unpacked into a pipe in {timed(lambda: run(['zstd', '-dc'], packed, folder / 'out'))}"  # noqa: B023
        print(line, flush=True)
    copies, overlays = folder / "copies", folder / "overlays"
    for sub in (copies, overlays):
        sub.mkdir()
    time_of_copies = timed(lambda: synced_copies(copy, copies, tasks))
    print(f"  {tasks} tasks, a copy each: {time_of_copies}, {disk(copies) / 1e6:.1f} MB")
    if shutil.which("qemu-img"):
        kind = "vdi" if image.suffix == ".vdi" else "raw"
        words = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", kind, "-b", str(copy.resolve())]
        spent = timed(lambda: [subprocess.run([*words, overlays / f"{one}"], check=True) for one in range(tasks)])
        print(f"  {tasks} tasks, an overlay each: {spent}, {disk(overlays) / 1e6:.1f} MB")


PACKERS = {
    "xz -6": ["xz", "-6", "-T1", "-c"],
    "gzip -6": ["gzip", "-6", "-c"],
    "zstd -9": ["zstd", "-9", "-T1", "-q", "-c"],
    "zstd -19": ["zstd", "-19", "-T1", "-q", "-c"],
    "qcow2 zlib": ["qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type=zlib"],
    "qcow2 zstd": ["qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd"],
}


def run(words: list[str], source: Path, target: Path) -> None:
    if words[0] == "qemu-img":
        subprocess.run([*words, source, target], check=True)
        return
    with source.open("rb") as given, target.open("wb") as out:
        subprocess.run(words, stdin=given, stdout=out, check=True)


def unpack(packed: Path, description: shipped_image.Description, folder: Path) -> None:
    shipped_image.unpack(packed, description, folder, Gate())


def synced_copies(source: Path, folder: Path, count: int) -> None:
    for number in range(count):
        shutil.copyfile(source, folder / str(number))
        with (folder / str(number)).open("rb") as file:
            os.fsync(file.fileno())


def disk(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def timed(work: Callable[[], object]) -> str:
    """Seconds, and those of a processor."""
    before, began = cpu_time(), time.monotonic()
    work()
    return f"{time.monotonic() - began:.3f} s ({cpu_time() - before:.3f} s CPU)"


def cpu_time() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    main()
