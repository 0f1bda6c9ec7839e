"""Debian and Python packages for the guest: found, downloaded and unpacked without root and without installing them.

Owns a folder of downloads. What apt and pip offer is looked up once and written down (`Pins`); a build with the same
pins has the same packages. Maintainer scripts are never run.

    PackageError    str: which package, what failed, what to do
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

KERNEL_PACKAGE = "linux-image-amd64"
"""Depends on the package that has the newest kernel. (The cloud kernel has no AHCI, no LSI and no Intel e1000.)"""

GUEST_PYTHON = "3.11"
"""Debian 12's; its packages are named for it, and Python packages with compiled parts are chosen for it."""

DEBIAN_PACKAGES = (
    "busybox-static",
    "crun",
    "libbz2-1.0",
    "libc6",
    "libcap2",
    "libcrypt1",
    "libexpat1",
    "libffi8",
    "libgcc-s1",
    "libgcrypt20",
    "libgpg-error0",
    "liblz4-1",
    "liblzma5",
    f"libpython{GUEST_PYTHON}-minimal",
    f"libpython{GUEST_PYTHON}-stdlib",
    "libseccomp2",
    "libssl3",
    "libsystemd0",
    "libuuid1",
    "libyajl2",
    "libzstd1",
    f"python{GUEST_PYTHON}-minimal",
    "zlib1g",
)
"""The system: busybox, Python with what its standard library needs (without curses, readline, dbm and sqlite), and
crun, which runs containers, with what it is linked to."""

PYTHON_PACKAGES = (
    "attrs",
    "automat",
    "constantly",
    "hyperlink",
    "idna",
    "incremental",
    "netifaces-plus>=0.12",
    "packaging",
    "stomp.py>=8.2",
    "twisted>=24.7",
    "typing-extensions",
    "websocket-client",
    "zope.interface",
)
"""What the agent imports, with what that imports: named one by one, as pip would add more (stomp.py's docopt)."""

NOT_FOR_GUESTS = (
    *("debconf", "dpkg", "init-system-helpers", "initramfs-tools", "install-info", "kmod", "libc-bin", "linux-base"),
    *("media-types", "perl-base", "python3", "python3-minimal", "python3.11", "tzdata", "ucf"),
)
"""Dependencies of the kernel and of extra packages that only serve installation, or that the image has its own way."""


class PackageError(Exception):
    """A package cannot be had."""


@dataclass(frozen=True, slots=True)
class Pins:
    """Exactly which packages: what apt and pip chose, or what was chosen before."""

    kernel: str
    """Name of the package with the kernel, such as linux-image-6.1.0-NN-amd64."""
    debian: Mapping[str, str]
    """Name -> version, the kernel's included."""
    python: Mapping[str, str]
    """Wheel file name -> SHA-256."""

    def as_json(self) -> dict[str, object]:
        return {
            "kernel": self.kernel,
            "debian": dict(sorted(self.debian.items())),
            "python": dict(sorted(self.python.items())),
        }

    @classmethod
    def from_json(cls, content: str | bytes) -> Pins:
        """Of a manifest or a file of pins. Raises PackageError."""
        try:
            found = json.loads(content)
            pins = cls(str(found["kernel"]), dict(found["debian"]), dict(found["python"]))
        except (ValueError, KeyError, TypeError) as error:
            raise PackageError(f"no pins of packages in this file: {error!r}") from error
        if pins.kernel not in pins.debian:
            raise PackageError(f"pins without a version of their kernel {pins.kernel}")
        return pins


def _run(command: Sequence[str | Path], *, cwd: Path | None = None, limit_s: float = 1800) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise PackageError(f"{' '.join(map(str, command[:3]))}: no end within {limit_s:g} s") from error
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise PackageError(f"{' '.join(map(str, command[:4]))} ... failed with status {done.returncode}:\n{last}")
    return done.stdout


def available(names: Iterable[str]) -> dict[str, str]:
    """Name -> version of these packages, as apt would download them. Raises PackageError."""
    try:
        listed = _run(["apt-get", "-qq", "download", "--print-uris", *names])
    except PackageError as error:
        raise PackageError(
            f"{error}\nThe guest is made from Debian's packages for amd64: this needs a Debian 12 (bookworm) whose "
            "package lists are there (as root: apt-get update)."
        ) from error
    files = (line.split()[1].split("_") for line in listed.splitlines())  # 'URI' NAME_VERSION_amd64.deb SIZE HASH
    return {name: unquote(version) for name, version, _ in files}


def needed_by(names: Iterable[str], have: Mapping[str, str]) -> dict[str, str]:
    """Name -> version of `names` and what they depend on: what apt would add to a system of the packages `have`."""
    status = "".join(
        f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMulti-Arch: allowed\n"
        "Status: install ok installed\n\n"
        for name, version in have.items()
    )
    with tempfile.NamedTemporaryFile("w", prefix="vmwrapper-status-") as file:
        file.write(status)
        file.flush()
        settings = ("-o", f"Dir::State::status={file.name}", "-o", "Dir::Cache::pkgcache=")
        plan = _run(["apt-get", "-qq", *settings, "--no-install-recommends", "--simulate", "install", *names])
    return dict(re.findall(r"^Inst (\S+) \((\S+) ", plan, re.MULTILINE))


def look_up(extra_debian: Sequence[str] = (), extra_python: Sequence[str] = ()) -> Pins:
    """The newest of everything that apt and pip offer now. Raises PackageError."""
    there = available([*DEBIAN_PACKAGES, *NOT_FOR_GUESTS])
    added = needed_by([KERNEL_PACKAGE, *extra_debian], there)
    debian = {name: there[name] for name in DEBIAN_PACKAGES} | added
    del debian[KERNEL_PACKAGE]
    kernel = next(name for name in debian if name.startswith("linux-image-"))
    return Pins(kernel, debian, wheels(*PYTHON_PACKAGES, *extra_python))


def _pip(command: str, *arguments: str) -> str:
    """pip, choosing wheels for the guest's Python; nothing is installed and no dependency is added."""
    platforms = (f"--platform=manylinux{version}_x86_64" for version in ("_2_17", "_2_28", "_2_34", "2014"))
    quiet = ("--quiet", "--disable-pip-version-check", "--no-input")
    chosen = ("--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={GUEST_PYTHON}", *platforms)
    return _run([sys.executable, "-m", "pip", command, *quiet, *chosen, *arguments])


def wheels(*requirements: str) -> dict[str, str]:
    """File name -> SHA-256 of what pip would install now."""
    report = _pip("install", "--dry-run", "--ignore-installed", "--target=none", "--report=-", *requirements)
    offers = [offer["download_info"] for offer in json.loads(report)["install"]]
    return {unquote(offer["url"].rpartition("/")[2]): offer["archive_info"]["hashes"]["sha256"] for offer in offers}


def deb_path(downloads: Path, name: str, version: str) -> Path:
    """The package as apt-get download names it (an epoch's colon is %3a). Raises PackageError if it is not there."""
    for path in downloads.glob(f"{name}_{version.replace(':', '%3a')}_*.deb"):
        return path
    raise PackageError(f"{name} {version} was not downloaded")


def _is_there(downloads: Path, name: str, version: str) -> bool:
    with contextlib.suppress(PackageError):
        return deb_path(downloads, name, version).is_file()
    return False


def fetch(downloads: Path, pins: Pins) -> None:
    """Download what of `pins` is not there yet. apt checks what it downloads; wheels are checked by their SHA-256."""
    downloads.mkdir(parents=True, exist_ok=True)
    missing = [f"{name}={version}" for name, version in pins.debian.items() if not _is_there(downloads, name, version)]
    if missing:
        # As root apt would like to download as user _apt, who may not write into this folder.
        as_root = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
        _run(["apt-get", *as_root, "-qq", "download", *missing], cwd=downloads)
    folder = downloads / "wheels"
    folder.mkdir(exist_ok=True)
    if absent := [name for name in pins.python if not (folder / name).is_file()]:
        _pip("download", f"--dest={folder}", *("{}=={}".format(*name.split("-")[:2]) for name in absent))
    for name, digest in pins.python.items():
        if not (folder / name).is_file():
            raise PackageError(f"pip has no {name} any more")
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise PackageError(f"{name} is not what it was: its SHA-256 differs from the pinned one")


def unpack_deb(package: Path, target: Path) -> None:
    """A package's files below `target`, a new folder: of one archive GNU tar lets nothing lead out of that."""
    _run(["dpkg-deb", "--extract", package, target])


def unpack_wheel(wheel: Path, target: Path) -> None:
    """A wheel's modules below `target`. Scripts and headers (NAME.data/...) are left out."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            name = info.filename
            parts = Path(name).parts
            if parts[0].endswith(".data"):
                if len(parts) < 3 or parts[1] not in {"purelib", "platlib"}:
                    continue
                name = "/".join(parts[2:])
            if ".." in Path(name).parts or name.startswith("/") or info.is_dir():
                continue
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(archive.read(info))
