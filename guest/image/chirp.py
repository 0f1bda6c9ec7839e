"""Chirp's server for a guest image, alone: `python -m guest.image.chirp FOLDER`, then build with `--files FOLDER`.

Debian's package coop-computing-tools with all that it depends on (OpenMPI, Perl) would make a guest larger by 137 MB;
its server and the libraries that it really loads are 5 MB, 1 MB more in the image. They are taken from this computer,
which must be the Debian that the guest is made of, with the package installed. The agent starts what it finds on PATH.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from guest.image.packages import DEBIAN_PACKAGES, PackageError

PROGRAM = "/usr/bin/chirp_server"


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise PackageError(f"{' '.join(command)}: {error}") from error


def _package(path: str) -> str:
    """The package that a file belongs to. dpkg knows /lib by the name that it had before it became a link."""
    for name in (path, path.removeprefix("/usr"), f"/usr{path}"):
        done = subprocess.run(["dpkg-query", "--search", name], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return re.split(r"[:,]", done.stdout)[0]
    raise PackageError(f"{path} belongs to no Debian package")


def collect(folder: Path) -> int:
    """Put everything below `folder`, as it lies in the guest; the size in bytes. Raises PackageError."""
    if not Path(PROGRAM).exists():
        raise PackageError(f"{PROGRAM} is not there: install Debian's package coop-computing-tools")
    wanted = {PROGRAM: _package(PROGRAM)}
    for library in re.findall(r"=> (/\S+) \(", _said("ldd", PROGRAM)):
        package = _package(library)
        if package not in DEBIAN_PACKAGES:  # else the guest has it
            wanted[library] = package
    size = 0
    for path, package in wanted.items():
        inside = path if path.startswith("/usr") else f"/usr{path}"
        target = folder / inside.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)  # what a link stands for, under the link's name: that is what is looked for
        size += target.stat().st_size
        licence = folder / "usr/share/doc" / package / "copyright"
        licence.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f"/usr/share/doc/{package}/copyright", licence)
    return size


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m guest.image.chirp", description="Chirp's server for a guest.")
    parser.add_argument(
        "folder", type=Path, help="where the files go; then: python -m guest.image.build --files FOLDER"
    )
    given = parser.parse_args()
    try:
        size = collect(given.folder)
    except PackageError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stderr.write(f"{size / 1e6:.1f} MB in {given.folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
