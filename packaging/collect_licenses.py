"""Writes a module with the licences of everything in the frozen executables; run by the Python that is frozen.

    collect_licenses.py OUT.py [LIBRARY...]

Sources: the licence files of the installed distributions, and on Debian the copyright files of the packages that the
shared libraries come from. A part without a licence text fails the build.
"""

from __future__ import annotations

import base64
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_INSIDE = frozenset({"pip", "setuptools", "wheel", "altgraph", "pyinstaller-hooks-contrib", "packaging"})
"""Used while building only. PyInstaller is inside: its boot loader, under its exception."""
DEBIAN_LIBRARIES = (
    "libc.so.6", "libbz2.so.1.0", "libcrypto.so.3", "libexpat.so.1", "libffi.so.8", "libgcc_s.so.1", "liblzma.so.5",
    "libstdc++.so.6", "libuuid.so.1", "libz.so.1",
)  # fmt: skip
"""What PyInstaller takes along from the system; libc itself is not inside, but what programs link in of it is."""


def collect(libraries: list[Path]) -> Iterator[tuple[str, str]]:
    """Name and licence text of each part."""
    for name in ("COPYING.LESSER", "COPYING"):
        yield f"vmwrapper: {name}", (ROOT / name).read_text(encoding="utf-8")
    for distribution in sorted(metadata.distributions(), key=lambda one: one.metadata["Name"].lower()):
        name = distribution.metadata["Name"]
        if name.lower() in NOT_INSIDE:
            continue
        texts = [
            file.read_text(encoding="utf-8", errors="replace")
            for file in map(lambda found: Path(str(distribution.locate_file(found))), distribution.files or ())
            if ".dist-info" in str(file) and file.name.upper().startswith(("LICEN", "COPYING", "NOTICE", "AUTHORS"))
        ]
        declared = distribution.metadata["License-Expression"] or distribution.metadata["License"] or ""
        declared = declared or ", ".join(
            value for value in distribution.metadata.get_all("Classifier") or () if value.startswith("License")
        )
        if not texts and not declared:
            sys.exit(f"{name} says nothing about its licence")
        yield f"{name} {distribution.version}: {declared.splitlines()[0] if declared else ''}", "\n".join(texts)
    if sys.platform.startswith("linux"):
        yield from _of_debian(libraries)
    else:
        python_license = Path(sys.base_prefix) / "LICENSE.txt"
        yield "Python", python_license.read_text(encoding="utf-8") if python_license.exists() else sys.copyright


def _of_debian(libraries: list[Path]) -> Iterator[tuple[str, str]]:
    folder = Path("/usr/lib") / (sysconfig.get_config_var("MULTIARCH") or "")
    there = [folder / name for name in DEBIAN_LIBRARIES]
    python = Path(sysconfig.get_config_var("LIBDIR")) / sysconfig.get_config_var("INSTSONAME")
    if not python.exists():
        python = folder / sysconfig.get_config_var("INSTSONAME")
    if not python.is_relative_to("/usr/lib"):
        yield "Python", Path(sysconfig.get_path("stdlib"), "LICENSE.txt").read_text(encoding="utf-8")
        python = folder / "libc.so.6"
    packages = {_package(path) for path in [python, *there, *libraries] if path.exists()}
    for package in sorted(packages):
        text = Path("/usr/share/doc", package, "copyright").read_text(encoding="utf-8", errors="replace")
        yield f"Debian package {package}", text


def _package(path: Path) -> str:
    for candidate in (path, Path("/", *path.parts[2:]), path.resolve(), Path("/", *path.resolve().parts[2:])):
        done = subprocess.run(["dpkg-query", "-S", str(candidate)], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.splitlines()[0].split(":")[0]
    sys.exit(f"{path} belongs to no Debian package")


def main() -> None:
    """The program."""
    rule = "=" * 100
    text = "".join(
        f"{rule}\n{name}\n{rule}\n\n{body.strip()}\n\n" for name, body in collect([*map(Path, sys.argv[2:])])
    )
    packed = base64.b85encode(zlib.compress(text.encode(), 9)).decode()
    Path(sys.argv[1]).write_text(f'"""Licences of what is inside: zlib, base 85."""\n\nPACKED = "{packed}"\n')


if __name__ == "__main__":
    main()
