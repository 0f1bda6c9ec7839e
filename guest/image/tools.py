"""The programs that the build of the guest image calls: which they are, whether they are there, and one call.

BuildError      str: what is missing or failed
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

FILES = Path(__file__).parent / "files"
DATE = 1_704_067_200
"""Time stamp of every file in the image (2024-01-01 UTC), so that the day of the build is not in it."""
MBR_CODE = (Path("/usr/lib/syslinux/mbr/mbr.bin"), Path("/usr/lib/SYSLINUX/mbr.bin"))

TOOLS = {
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "lz4": "lz4",
    "depmod": "kmod",
    "modprobe": "kmod",
    "cpio": "cpio",
    "as": "binutils",
    "ld": "binutils",
    "objcopy": "binutils",
    "mksquashfs": "squashfs-tools",
    "mkfs.ext4": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "mkfs.fat": "dosfstools",
    "mcopy": "mtools",
    "syslinux": "syslinux",
}
"""Programs of the build -> Debian packages (and syslinux-common for the boot record)."""
PATH_OF_TOOLS = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
"""mkfs, debugfs and depmod are in sbin, which users do not have on their PATH."""


class BuildError(Exception):
    """The image cannot be made."""


def check_tools() -> None:
    """Raises BuildError with the Debian packages that are missing."""
    missing = {package for tool, package in TOOLS.items() if shutil.which(tool, path=PATH_OF_TOOLS) is None}
    if not any(path.exists() for path in MBR_CODE):
        missing.add("syslinux-common")
    if missing:
        raise BuildError(
            f"the guest image needs these Debian packages on this computer: {' '.join(sorted(missing))} "
            f"(as root: apt-get install --no-install-recommends {' '.join(sorted(missing))})"
        )


def run(command: Sequence[str | Path], *, text: str | None = None) -> str:
    """A tool of the build, in an environment that makes the same of the same. Raises BuildError."""
    environment = {
        "PATH": PATH_OF_TOOLS,
        "LC_ALL": "C",
        "TZ": "UTC",
        "SOURCE_DATE_EPOCH": str(DATE),
        "E2FSPROGS_FAKE_TIME": str(DATE),
        "MTOOLSRC": os.devnull,
        "MTOOLS_SKIP_CHECK": "1",
        "TMPDIR": tempfile.gettempdir(),
    }
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, input=text)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-1000:]
        raise BuildError(f"{' '.join(map(str, command[:6]))} ... failed with status {done.returncode}: {said}")
    return done.stdout
