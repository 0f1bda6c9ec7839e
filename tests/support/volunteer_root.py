"""A volunteer's computer for tests: a root folder of Debian packages with BOINC's client and QEMU, and no Python.

Debian 12's essential packages, boinc-client, qemu-system-x86 and qemu-utils, nothing else; made once below .cache by
mmdebstrap (a minute or two, 0.5 GB). Programs run there as the user `boinc` that Debian's package makes, in a private
mount namespace with /proc, /dev, and one folder of this computer under its own path.

Needs root, and Debian's mmdebstrap.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path

from tests.virtualbox.lab import _mirror

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "volunteer-root"
RELEASE = "bookworm"
PACKAGES = ("boinc-client", "qemu-system-x86", "qemu-utils")
WITHOUT = 'dpkg --purge --force-depends $(dpkg-query -W -f "\\${binary:Package} " "*python3*")'
"""Debian's boinc-client depends on Python; BOINC's own packages do not, and other systems' volunteers have none."""
BUILD_LIMIT_S = 1800
USER = "boinc"

ENTER = """\
#!/bin/sh
# {program} in the root folder, as {user}: one process, whose pid is ours
set -e
if [ "$1" != --inside ]; then exec unshare --mount --propagation private "$0" --inside "$@"; fi
shift
mount -t proc proc "{root}/proc"
mount --rbind /dev "{root}/dev"
mkdir -p "{root}{folder}"
mount --bind "{folder}" "{root}{folder}"
cd "{folder}"
exec chroot --userspec={user}:{user} "{root}" /usr/bin/env -i PATH=/usr/local/bin:/usr/bin:/bin HOME=/var/lib/boinc \\
  LANG=C.UTF-8 /bin/sh -c 'cd "$0" && exec "$@"' "$PWD" {program} "$@"
"""


def why_not() -> str:
    """Why there is none on this machine; "" when there can be."""
    if os.geteuid() != 0:
        return "a root folder with a BOINC client can be entered by root only"
    return "" if shutil.which("mmdebstrap") else "package mmdebstrap is not installed"


def volunteer_root() -> Path:
    """The root folder; made when it is not there."""
    root = CACHE / RELEASE
    if root.exists():
        return root
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = CACHE / f"{RELEASE}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    subprocess.run(
        [
            *("nice", "mmdebstrap", "--quiet", "--variant=essential", "--components=main"),
            "--aptopt=APT::Install-Recommends false",
            *("--aptopt=Acquire::Check-Valid-Until false", "--aptopt=Acquire::Check-Date false"),
            *("--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*"),
            f"--customize-hook=chroot \"$1\" sh -c '{WITHOUT}'",
            *(f"--include={','.join(PACKAGES)}", RELEASE, str(partial), _mirror()),
        ],
        check=True,
        timeout=BUILD_LIMIT_S,
    )
    partial.rename(root)
    return root


def user_of(root: Path) -> tuple[int, int]:
    """Uid and gid of the client's user there."""
    for line in (root / "etc" / "passwd").read_text().splitlines():
        name, _, uid, gid, *_ = line.split(":")
        if name == USER:
            return int(uid), int(gid)
    raise KeyError(USER)


def give_to_user(root: Path, folder: Path) -> None:
    """The user's own folder, reachable for it."""
    uid, gid = user_of(root)
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, uid, gid, follow_symlinks=False)
    for parent in folder.parents:
        if parent.owner() == pwd.getpwuid(os.geteuid()).pw_name and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)


def program_there(root: Path, program: str, folder: Path, name: Path) -> Path:
    """A script that runs a program of the root folder in it, with `folder` under its own path."""
    name.write_text(ENTER.format(root=root, program=program, user=USER, folder=folder))
    name.chmod(0o755)
    return name
