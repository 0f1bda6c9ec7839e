"""Makes the disk image of the guest: `python -m guest.image.build OUT [options]`. See docs/projects/guest-image.md.

Works as any user: nothing is mounted, nobody's root folder is changed, no maintainer script is run. What takes long is
cached in stages, each under a key over all it is made from; the same inputs give the same bytes.

    FAILURES        what may go wrong: str says what is missing or failed
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from guest.image import disk, kernel, modules, packages, partitions, system
from guest.image.partitions import COMPRESSIONS
from guest.image.tools import FILES, BuildError, check_tools
from vmcontrol.common import imagenote
from vmcontrol.common.atomicfile import write_atomically
from vmcontrol.common.filelock import open_lock_file, try_lock

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a project. Part of every key."""

    packages: tuple[str, ...] = ()
    """Further Debian packages; what they depend on comes along."""
    python_packages: tuple[str, ...] = ()
    """Further Python packages (pip requirements; wheels only; name also what they need)."""
    files: Path | None = None
    """Folder of files that are laid over the system's."""
    modules: tuple[str, ...] = ()
    """Further kernel modules."""
    data_mib: int = 8704
    """Size of the writable disk in MiB; it takes space only as it fills. Default 8.5 GiB."""
    compression: str = "zstd"
    """Of the system: zstd, lz4, gzip, xz."""


def digest_of(*things: object) -> str:
    """A key over JSON values and the contents of files (Path; a folder with all in it)."""
    digest = hashlib.sha256()

    def add(kind: str, content: bytes) -> None:
        digest.update(f"{kind} {len(content)}\n".encode() + content)

    for thing in things:
        if not isinstance(thing, Path):
            add("value", json.dumps(thing, sort_keys=True, default=str).encode())
        elif thing.is_dir():
            for path in sorted(path for path in thing.rglob("*") if "__pycache__" not in path.parts):
                if path.is_symlink():
                    add(f"link {path.relative_to(thing)}", os.readlink(path).encode())  # noqa: PTH115
                elif path.is_file():
                    add(f"file {path.relative_to(thing)} {os.access(path, os.X_OK)}", path.read_bytes())
        else:
            add(f"file {thing.name}", thing.read_bytes())
    return digest.hexdigest()


def recipe(*names: str) -> list[Path]:
    """Modules of this recipe, for keys."""
    return [Path(__file__).parent / f"{name}.py" for name in names]


def image_key(pins: packages.Pins, options: Options) -> str:
    """Over everything that the image is made from."""
    agent = [[str(path), digest_of(system.PROJECT / path)] for path in system.agent_sources()]
    parts = recipe("build", "disk", "kernel", "modules", "packages", "partitions", "system", "tools")
    extra = [options.files] if options.files else []
    settings = asdict(options) | {"files": None}
    return digest_of(pins.as_json(), settings, agent, *parts, Path(imagenote.__file__), FILES, *extra)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One builder at a time in this cache; the others wait. Released by the kernel if its holder is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    fd = open_lock_file(folder / "lock")
    try:
        if not try_lock(fd):
            log.info("another process builds in %s: waiting for it", folder)
            while not try_lock(fd):
                time.sleep(1)
        yield
    finally:
        os.close(fd)


class Builder:
    """The stages, in a cache folder that this process has locked."""

    def __init__(self, cache: Path, pins: packages.Pins, options: Options) -> None:
        self.downloads = cache / "downloads"
        self._stages = cache / "stages"
        self._pins = pins
        self._options = options
        self._started = time.monotonic()

    def _say(self, what: str) -> None:
        log.info("%5.1f s  %s", time.monotonic() - self._started, what)

    def _stage(self, name: str, key: str, make: Callable[[Path], None]) -> Path:
        """The folder of this stage; what `make` makes appears under its name only when it is complete."""
        target = self._stages / f"{name}-{key[:20]}"
        if target.exists():
            os.utime(target)
            return target
        self._say(f"making {name}")
        self._stages.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=self._stages))
        try:
            make(work)
            work.rename(target)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        remove_oldest(self._stages.glob(f"{name}-*"), keep=3)
        return target

    def kernel_files(self) -> Path:
        """Folder with vmlinuz (repacked), initrd, version and lib/modules/ (for the system)."""
        version = self._pins.debian[self._pins.kernel]
        busybox = self._pins.debian["busybox-static"]
        own = [*recipe("kernel", "modules"), kernel.LOADER_SOURCE, FILES / "initramfs"]
        key = digest_of(self._pins.kernel, version, busybox, self._options.modules, *own)
        return self._stage("kernel", key, self._make_kernel)

    def _deb(self, name: str) -> Path:
        return packages.deb_path(self.downloads, name, self._pins.debian[name])

    def _make_kernel(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="kernel-", dir=self._stages) as unpacked_name:
            unpacked = Path(unpacked_name)
            packages.unpack_deb(self._deb(self._pins.kernel), unpacked / "kernel")
            packages.unpack_deb(self._deb("busybox-static"), unpacked / "busybox")
            (version,) = (path.name for path in (unpacked / "kernel/lib/modules").iterdir())
            (folder / "version").write_text(version, encoding="ascii")
            (folder / "vmlinuz").write_bytes(kernel.repack((unpacked / f"kernel/boot/vmlinuz-{version}").read_bytes()))
            modules.index(unpacked / "kernel", version)
            boot = modules.closure(unpacked / "kernel", version, modules.BOOT_MODULES)
            later = (*modules.LATER_MODULES, *self._options.modules)
            modules.install({*boot, *modules.closure(unpacked / "kernel", version, later)}, folder, version)
            root = unpacked / "initramfs"
            modules.install(boot, root, version)
            system.make_initramfs_tree(root, unpacked / "busybox/bin/busybox")
            partitions.make_cpio(root, unpacked / "initramfs.cpio")
            (folder / "initrd").write_bytes(kernel.lz4_file((unpacked / "initramfs.cpio").read_bytes()))

    def base_tree(self) -> Path:
        """Folder of the system without kernel modules, agent and own files."""
        pins = {key: value for key, value in self._pins.as_json().items() if key != "kernel"}
        key = digest_of(pins, *recipe("packages", "system"))
        made = self._stage("base", key, lambda work: system.base_tree(work / "tree", self.downloads, self._pins))
        return made / "tree"

    def build(self, target: Path, key: str) -> None:
        """The image, and `target`.json beside it, which says what is in it."""
        packages.fetch(self.downloads, self._pins)
        kernel_files, base = self.kernel_files(), self.base_tree()
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".guest-image-", dir=target.parent) as name:
            work = Path(name)
            manifest = {
                "format": 1,
                "key": key,
                **self._pins.as_json(),
                "kernel_version": (kernel_files / "version").read_text(encoding="ascii"),
                "options": asdict(self._options) | {"files": bool(self._options.files)},
                "memory_mb": partitions.MEMORY_MB,
            }
            self._say("putting the system together")
            tree = work / "tree"
            # Hard links where the cache is on the same disk: a tree of 2000 files in a moment.
            shutil.copytree(base, tree, symlinks=True, copy_function=link_or_copy)
            shutil.copytree(kernel_files / "lib", tree / "usr/lib", copy_function=link_or_copy, dirs_exist_ok=True)
            system.overlay(tree, FILES / "system")
            system.add_agent(tree)
            if self._options.files:
                system.overlay(tree, self._options.files)
            (tree / "etc/vmwrapper/image.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="ascii")
            system.set_modes(tree)
            self._say("packing")
            partitions.make_squashfs(tree, work / "system", self._options.compression)
            partitions.make_boot_partition(kernel_files, work / "boot")
            partitions.make_data_partition(work / "data", self._options.data_mib)
            image_id = partitions.make_disk(work, work / "guest.vdi")
            sizes = {part: (work / part).stat().st_size for part in ("boot", "system", "guest.vdi")}
            with (work / "guest.vdi").open("rb") as image:
                checksum = hashlib.file_digest(image, "sha256").hexdigest()
            beside = manifest | {"uuid": str(image_id), "sha256": checksum, "sizes": sizes}
            (work / "manifest").write_text(json.dumps(beside, indent=1) + "\n", encoding="ascii")
            (work / "manifest").replace(target.with_name(target.name + ".json"))
            (work / "guest.vdi").replace(target)
        self._say(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


def remove_oldest(folders: Iterable[Path], *, keep: int) -> None:
    """Remove those that were used longest ago: a folder's time is that of its last use."""
    for old in sorted(folders, key=lambda path: path.stat().st_mtime)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        return str(shutil.copy2(source, target, follow_symlinks=False))
    return target


def choose_pins(cache: Path, options: Options, *, update: bool = False, pins_file: Path | None = None) -> packages.Pins:
    """Given ones, else those of the last such build in this cache, else what apt and pip offer now."""
    if pins_file is not None:
        return packages.Pins.from_json(pins_file.read_bytes())
    wanted = digest_of(options.packages, options.python_packages, packages.DEBIAN_PACKAGES, packages.PYTHON_PACKAGES)
    pinned = cache / f"pins-{wanted[:20]}.json"
    if pinned.exists() and not update:
        with contextlib.suppress(packages.PackageError):
            return packages.Pins.from_json(pinned.read_bytes())
    log.info("asking apt and pip for the newest packages")
    pins = packages.look_up(options.packages, options.python_packages)
    write_atomically(pinned, (json.dumps(pins.as_json(), indent=1) + "\n").encode("ascii"))
    return pins


def build(target: Path, cache: Path, options: Options, *, update: bool = False, pins_file: Path | None = None) -> None:
    """Make the image `target`. Raises BuildError, PackageError, KernelError, DiskError, OSError."""
    check_tools()
    with locked(cache):
        pins = choose_pins(cache, options, update=update, pins_file=pins_file)
        Builder(cache, pins, options).build(target, image_key(pins, options))


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmwrapper" / "guest-image"


FAILURES = (
    BuildError,
    packages.PackageError,
    kernel.KernelError,
    disk.DiskError,
    subprocess.CalledProcessError,
    OSError,
)
"""What a build may raise."""


def names(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m guest.image.build", description="Make the guest's disk image (VDI)."
    )
    parser.add_argument("out", type=Path, help="the image; its manifest goes beside it as OUT.json")
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="folder for downloads and stages (%(default)s)"
    )
    parser.add_argument("--packages", type=names, default=(), help="further Debian packages, separated by commas")
    parser.add_argument("--python-packages", type=names, default=(), help="further Python packages (wheels)")
    parser.add_argument("--modules", type=names, default=(), help="further kernel modules")
    parser.add_argument("--files", type=Path, help="folder of files that are laid over the system's")
    parser.add_argument(
        "--data-mib", type=int, default=Options().data_mib, help="size of the writable disk (%(default)s)"
    )
    parser.add_argument(
        "--compression", choices=sorted(COMPRESSIONS), default="zstd", help="of the system (%(default)s)"
    )
    parser.add_argument("--update", action="store_true", help="take the newest packages, not those of the last build")
    parser.add_argument("--pins", type=Path, help="take exactly the packages of this manifest")
    given = parser.parse_args(None if arguments is None else list(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if given.files and not given.files.is_dir():
        parser.error(f"{given.files} is no folder")
    options = Options(
        given.packages, given.python_packages, given.files, given.modules, given.data_mib, given.compression
    )
    try:
        build(given.out.resolve(), given.cache.resolve(), options, update=given.update, pins_file=given.pins)
    except FAILURES as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
