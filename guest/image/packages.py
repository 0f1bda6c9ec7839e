"""Debian and Python packages for the guest: found, downloaded and unpacked without root and without installing them.

Owns a folder of downloads. What apt and pip offer is looked up once and written down (`Pins`); a build with the same
pins has the same packages. Maintainer scripts are never run.

    PackageError    str: which package, what failed, what to do
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import quote

KERNEL_PACKAGE = "linux-image-amd64"
"""Depends on the package that has the newest kernel. (The cloud kernel has no AHCI, no LSI and no Intel e1000.)"""

GUEST_PYTHON = "3.11"
"""Debian 12's; its packages are named for it, and Python packages with compiled parts are chosen for it."""

DEBIAN_PACKAGES = (
    "busybox-static",
    "libbz2-1.0",
    "libc6",
    "libcrypt1",
    "libexpat1",
    "libffi8",
    "libgcc-s1",
    "liblzma5",
    f"libpython{GUEST_PYTHON}-minimal",
    f"libpython{GUEST_PYTHON}-stdlib",
    "libssl3",
    "libuuid1",
    f"python{GUEST_PYTHON}-minimal",
    "zlib1g",
)
"""The system: busybox, and Python with what its standard library needs (without curses, readline, dbm and sqlite)."""

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

NOT_FOR_GUESTS = frozenset(
    {"debconf", "debconf-2.0", "dpkg", "install-info", "perl-base", "init-system-helpers", "libc-bin", "mime-support",
     "media-types", "python3", "python3-minimal", "python3.11", "python3:any", "ucf", "tzdata"}
)  # fmt: skip
"""Dependencies of extra packages that only serve installation, or that the image has in its own way."""


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


def _run(command: Sequence[str], *, cwd: Path | None = None, limit_s: float = 1800) -> str:
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
        raise PackageError(f"{' '.join(command[:3])}: no end within {limit_s:g} s") from error
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise PackageError(f"{' '.join(command[:4])} ... failed with status {done.returncode}:\n{last}")
    return done.stdout


def parse_stanzas(text: str) -> list[dict[str, str]]:
    """Debian control data: paragraphs of "Field: value"; continued lines are joined by newlines."""
    stanzas: list[dict[str, str]] = []
    for paragraph in re.split(r"\n[ \t]*\n", text.strip()):
        fields: dict[str, str] = {}
        key = ""
        for line in paragraph.splitlines():
            if line[:1] in " \t":
                if key:
                    fields[key] += "\n" + line.strip()
            else:
                key, colon, value = line.partition(":")
                if colon:
                    fields[key] = value.strip()
        if fields:
            stanzas.append(fields)
    return stanzas


def parse_dependencies(field: str) -> list[list[str]]:
    """A Depends field: for each wanted thing the names that satisfy it, versions and architectures dropped."""
    groups = []
    for group in field.split(","):
        names = [re.split(r"[\s:(\[]", option.strip(), maxsplit=1)[0] for option in group.split("|")]
        if names := [name for name in names if name]:
            groups.append(names)
    return groups


def candidates(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """What apt would install of each name. Names that it does not know are missing in the answer."""
    names = sorted(set(names))
    if not names:
        return {}
    command = ["apt-cache", "show", "--no-all-versions", "--", *names]
    # Status 100 when some name is unknown: the others are answered all the same.
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    return {stanza["Package"]: stanza for stanza in parse_stanzas(answer.stdout) if "Package" in stanza}


def needed_by(names: Iterable[str], have: Iterable[str]) -> list[str]:
    """`names` and what they depend on, without what is in `have` already or serves installation only."""
    chosen: dict[str, None] = {}
    known = set(have) | NOT_FOR_GUESTS
    todo = [[name] for name in names]
    while todo:
        offers = candidates(name for options in todo for name in options if name not in known)
        following: list[list[str]] = []
        for options in todo:
            if any(name in known for name in options):
                continue
            for name in options:
                if name in offers:
                    known.add(name)
                    chosen[name] = None
                    for field in ("Pre-Depends", "Depends"):
                        following += parse_dependencies(offers[name].get(field, ""))
                    break
            else:
                raise PackageError(
                    f"apt knows no package {' or '.join(options)} (a virtual one? name one that provides it yourself)"
                )
        todo = following
    return list(chosen)


def look_up(downloads: Path, extra_debian: Sequence[str] = (), extra_python: Sequence[str] = ()) -> Pins:
    """The newest of everything that apt and pip offer now; wheels are downloaded on the way. Raises PackageError."""
    kernel_offer = candidates([KERNEL_PACKAGE]).get(KERNEL_PACKAGE)
    if kernel_offer is None:
        raise PackageError(
            f"apt does not know {KERNEL_PACKAGE}. The guest is made from Debian's packages for amd64: this needs a "
            "Debian whose package lists are there (as root: apt-get update)."
        )
    kernel = next(names[0] for names in parse_dependencies(kernel_offer.get("Depends", "")))
    names = [*DEBIAN_PACKAGES, kernel, *needed_by(extra_debian, DEBIAN_PACKAGES)]
    offers = candidates(names)
    for name in names:
        if name not in offers:
            raise PackageError(f"apt does not know {name}: the guest needs Debian 12 (bookworm) package lists")
    python = fetch_wheels(downloads / "look-up", [*PYTHON_PACKAGES, *extra_python])
    (downloads / "wheels").mkdir(parents=True, exist_ok=True)
    for name in python:
        (downloads / "look-up" / name).replace(downloads / "wheels" / name)
    shutil.rmtree(downloads / "look-up")
    return Pins(kernel, {name: offers[name]["Version"] for name in names}, python)


def fetch_wheels(folder: Path, requirements: Sequence[str]) -> dict[str, str]:
    """Download wheels for the guest's Python into the empty folder `folder`: file name -> SHA-256."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 28, 34)] + [
        "--platform=manylinux2014_x86_64"
    ]
    _run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"),
            *("--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={GUEST_PYTHON}"),
            *platforms,
            f"--dest={folder}",
            *requirements,
        ]
    )
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def deb_path(downloads: Path, name: str, version: str) -> Path | None:
    """Where apt-get download puts a package: the colon of an epoch is written %3a."""
    found = sorted(downloads.glob(f"{name}_{quote(version, safe='+~').lower()}_*.deb"))
    found += sorted(downloads.glob(f"{name}_{version.replace(':', '%3a')}_*.deb"))
    return found[0] if found else None


def fetch(downloads: Path, pins: Pins) -> None:
    """Download what of `pins` is not there yet. apt checks what it downloads; wheels are checked by their SHA-256."""
    downloads.mkdir(parents=True, exist_ok=True)
    missing = [
        f"{name}={version}" for name, version in pins.debian.items() if deb_path(downloads, name, version) is None
    ]
    if missing:
        # As root apt would like to download as user _apt, who may not write into this folder.
        as_root = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
        _run(["apt-get", *as_root, "-qq", "download", *missing], cwd=downloads)
    wheels = downloads / "wheels"
    wheels.mkdir(exist_ok=True)
    absent = {name: digest for name, digest in pins.python.items() if not (wheels / name).is_file()}
    if absent:
        wanted = ["{}=={}".format(*name.split("-")[:2]) for name in absent]
        got = fetch_wheels(downloads / "again", wanted)
        for name in absent:
            if name not in got:
                raise PackageError(f"pip has no {name} any more")
            (downloads / "again" / name).replace(wheels / name)
    for name, digest in pins.python.items():
        if hashlib.sha256((wheels / name).read_bytes()).hexdigest() != digest:
            raise PackageError(f"{name} is not what it was: its SHA-256 differs from the pinned one")


def unpack_deb(package: Path, target: Path) -> None:
    """A package's files below `target`; owners are dropped (all belong to root in the image)."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None  # noqa: S101 (for mypy; PIPE was asked for)
        unpack_tar(process.stdout, target)
    if process.returncode:
        raise PackageError(f"{package.name} cannot be unpacked: delete it and try again")


def unpack_tar(stream: IO[bytes], target: Path) -> None:
    """Everything in an archive below `target`, and nothing elsewhere, whatever links it has. Raises PackageError."""
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            # Debian 12's Python 3.11.2 does not have it. _tame does the same, but for what a link of this archive does.
            archive.extraction_filter = getattr(tarfile, "tar_filter", None)
            archive.extractall(target, members=_tame(archive, target))  # noqa: S202 (see _tame)
    except tarfile.TarError as error:
        raise PackageError(f"a package cannot be unpacked: {error}") from error


def _tame(archive: tarfile.TarFile, target: Path) -> Iterator[tarfile.TarInfo]:
    """The members without ways out of the target, set-user bits and write permission for others.

    Each is asked for when the one before it has been unpacked, so links of the archive itself are seen.
    """
    for member in archive:
        member.name = member.name.lstrip("/")
        if member.islnk():
            member.linkname = member.linkname.lstrip("/")
        for name in (member.name, member.linkname if member.islnk() else ""):
            if ".." in Path(name).parts:
                raise PackageError(f"{name}: a path that leads out of the package")
            check_inside(target, target / name)
        place = target / member.name
        if place.is_symlink() and not member.isdir():
            place.unlink()  # a file would be written where it leads
        member.mode &= 0o755
        yield member


def check_inside(tree: Path, path: Path) -> None:
    """PackageError if `path`, below `tree`, would be made elsewhere: absolute links lead to this computer's folders."""
    if path != tree and not Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(tree)):
        raise PackageError(f"{path.relative_to(tree)}: a link on the way leads out of the guest's tree")


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
