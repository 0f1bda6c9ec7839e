"""A real VirtualBox for tests, on a machine without its kernel driver.

Debian unstable's VirtualBox is put into a root folder of its own below the checkout's .cache (about a minute, 0.7 GB,
once), with a launcher that uses the driverless mode of VirtualBox's own libraries: guests are interpreted, so this is
for guests that do next to nothing. `VBoxManage` in the lab's folder is the real one and sees /tmp and the checkout
under their own paths (enter.c). VMs really start, pause, save, snapshot and crash.

Needs root (for the root folder's mounts), and Debian's mmdebstrap, gcc, libc6-dev and binutils. By hand:

    python -m tests.virtualbox.lab              build it, print where it is
    python -m tests.virtualbox.lab WORDS...     VBoxManage WORDS, in a VirtualBox home below the lab
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
CACHE = CHECKOUT / ".cache" / "virtualbox-lab"
RELEASE = "sid"
"""Debian 12 has no VirtualBox; unstable has the newest one that Debian ships."""
BUILD_LIMIT_S = 900
NEEDED = {"mmdebstrap": "mmdebstrap", "gcc": "gcc", "ld": "binutils", "dpkg-deb": "dpkg"}
"""Program -> Debian package."""
HEADLESS = "usr/lib/virtualbox/VBoxHeadless"


class LabMissing(Exception):  # noqa: N818
    """Why there is no lab on this machine."""


@dataclass(frozen=True)
class Lab:
    """A VirtualBox that is there. folder: holds root/, VBoxManage and enter."""

    folder: Path

    @property
    def vboxmanage(self) -> Path:
        return self.folder / "VBoxManage"

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @contextlib.contextmanager
    def home(self, folder: Path, base: Mapping[str, str] = os.environ) -> Iterator[dict[str, str]]:
        """The environment of one VirtualBox home, with services of its own that end with the block.

        Raises AssertionError when a virtual machine was left running.
        """
        end_stale()
        folder.mkdir(parents=True, exist_ok=True)
        mark = f"vmwrapper{os.getpid()}t{_start_ticks(os.getpid())}n{uuid.uuid4().hex[:6]}"
        environment = {
            **base,
            "VBOX_USER_HOME": str(folder),
            "VBOX_IPC_SOCKETID": mark,
            "HOME": "/root",
            "LOGNAME": "root",
            "USER": "root",
        }
        try:
            # Without this VirtualBox refuses to run a guest by its interpreter.
            subprocess.run(
                [self.vboxmanage, "setextradata", "global", "VBoxInternal/HM/FallbackToIEM", "1"],
                env=environment, check=True, capture_output=True, timeout=60,
            )  # fmt: skip
            yield environment
        finally:
            left = end_marked(mark)
        assert not left, f"virtual machines left running: {left}"


def end_stale() -> None:
    """What test runs have left that were killed: services and VMs of homes whose process is gone, and their sockets."""
    marks = {place.name.removeprefix(".vbox-").removesuffix("-ipc") for place in Path("/tmp").glob(".vbox-*-ipc")}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("VBox"):
                marks.add(process.environ().get("VBOX_IPC_SOCKETID", ""))
    for mark in marks:
        owner = re.fullmatch(r"vmwrapper(\d+)t(\d+)n[0-9a-f]{6}", mark)
        if owner and _start_ticks(int(owner[1])) != int(owner[2]):
            end_marked(mark)


def _start_ticks(pid: int) -> int | None:
    """When a process was started (proc(5), field 22): with it the pid means one process. None: there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None


def end_marked(mark: str) -> list[str]:
    """End VirtualBox's services of one home, and VMs; the command lines of VMs that were there."""
    found, vms = [], []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("VBox") and process.environ().get("VBOX_IPC_SOCKETID") == mark:
                found.append(process)
                if process.name().startswith("VBoxHeadless"):
                    vms.append(" ".join(process.cmdline()))
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.kill()
    deadline = time.monotonic() + 10
    while any(_runs(process) for process in found) and time.monotonic() < deadline:
        time.sleep(0.01)  # they are not our children; init takes their status when it likes
    shutil.rmtree(f"/tmp/.vbox-{mark}-ipc", ignore_errors=True)
    return vms


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def lab() -> Lab:
    """The lab, built if it is not there yet. Raises LabMissing with what to do."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise LabMissing("the VirtualBox lab is for Linux on x86-64")
    if os.geteuid() != 0:
        raise LabMissing("the VirtualBox lab needs root: run ./check as root to have VirtualBox tested")
    digest = hashlib.sha256(RELEASE.encode())
    for name in ("enter.c", "headless.c", "lab.py"):
        digest.update((HERE / name).read_bytes())
    folder = CACHE / digest.hexdigest()[:16]
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test runs at the same time build it once
        if not (folder / "complete").exists():
            _build(folder)
    _write_binds(folder)
    return Lab(folder)


def _write_binds(folder: Path) -> None:
    """Folders that are seen inside. Another checkout or temporary folder may have been used last time."""
    wanted = "".join(f"{path}\n" for path in dict.fromkeys((tempfile.gettempdir(), str(CHECKOUT))))
    if not (folder / "binds").exists() or (folder / "binds").read_text() != wanted:
        temporary = folder / f"binds.{os.getpid()}"
        temporary.write_text(wanted)
        temporary.rename(folder / "binds")


def _build(folder: Path) -> None:
    missing = [package for program, package in NEEDED.items() if shutil.which(program) is None]
    if missing:
        raise LabMissing(f"the VirtualBox lab needs Debian's packages {', '.join(missing)}")
    root = _root_folder()
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _compile(HERE / "enter.c", partial / "enter")
        (partial / "VBoxManage").symlink_to("enter")
        launcher = root / HEADLESS
        if not (root / f"{HEADLESS}.packaged").exists():
            launcher.rename(root / f"{HEADLESS}.packaged")
        _compile(HERE / "headless.c", launcher, "-ldl")
        (partial / "root").symlink_to(os.path.relpath(root, folder))
        (partial / "complete").touch()
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _root_folder() -> Path:
    """Debian with VirtualBox; kept over changes of our own files."""
    root = CACHE / f"root-{RELEASE}"
    if root.exists():
        return root
    partial = CACHE / f"root-{RELEASE}.partial"
    _remove_tree(partial)
    with tempfile.TemporaryDirectory() as work:
        package = _stand_in(Path(work))
        command = [
            *("nice", "mmdebstrap", "--quiet", "--variant=minbase", "--components=main,contrib"),
            "--aptopt=APT::Install-Recommends false",
            *("--aptopt=Acquire::Check-Valid-Until false", "--aptopt=Acquire::Check-Date false"),
            *("--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*"),
            *("--dpkgopt=path-exclude=/usr/share/doc/*", "--include=ca-certificates,systemd-standalone-sysusers"),
            f"--customize-hook=copy-in {package} /var/tmp/",
            f'--customize-hook=chroot "$1" dpkg -i /var/tmp/{package.name}',
            '--customize-hook=chroot "$1" apt-get install -y -qq --no-install-recommends virtualbox',
            '--customize-hook=rm -rf "$1"/var/cache/apt/archives/*.deb',
            *(RELEASE, str(partial), _mirror()),
        ]
        try:
            subprocess.run(
                command, check=True, timeout=BUILD_LIMIT_S, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        except subprocess.TimeoutExpired as error:
            _remove_tree(partial)
            raise LabMissing(f"VirtualBox could not be installed within {BUILD_LIMIT_S} s") from error
        except subprocess.CalledProcessError as error:
            _remove_tree(partial)
            raise LabMissing(f"VirtualBox could not be installed: {error.stdout[-1500:]}") from error
    partial.rename(root)
    return root


def _mirror() -> str:
    """Where this machine gets Debian from."""
    said = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages"],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    sites = [line for line in said.splitlines() if line.rstrip("/").endswith("/debian")]
    if not sites:
        raise LabMissing("apt's configuration names no Debian mirror")
    return sites[0]


def _stand_in(work: Path) -> Path:
    """A package that says it is VirtualBox's kernel module, which VirtualBox's package depends on."""
    control = work / "modules" / "DEBIAN" / "control"
    control.parent.mkdir(parents=True)
    control.write_text(
        "Package: vmwrapper-no-virtualbox-modules\nVersion: 1\nArchitecture: all\nProvides: virtualbox-modules\n"
        "Maintainer: vmwrapper <root@localhost>\nDescription: stands in for VirtualBox's kernel modules in a test\n"
    )
    package = work / "modules.deb"
    subprocess.run(
        ["dpkg-deb", "--build", "--root-owner-group", str(work / "modules"), str(package)],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return package


def _compile(source: Path, program: Path, *more: str) -> None:
    subprocess.run(["gcc", "-O1", "-Wall", "-o", program, source, *more], check=True, timeout=60)


def _remove_tree(folder: Path) -> None:
    """Refuses while anything is mounted below it: what is mounted is not ours."""
    if any(line.split()[4].startswith(f"{folder}/") for line in Path("/proc/self/mountinfo").read_text().splitlines()):
        raise LabMissing(f"something is mounted below {folder}")
    shutil.rmtree(folder, ignore_errors=True)


def main(words: list[str]) -> int:
    try:
        here = lab()
    except LabMissing as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if not words:
        sys.stdout.write(f"{here.folder}\n")
        return 0
    home = CACHE / "home"
    home.mkdir(exist_ok=True)
    environment = {**os.environ, "VBOX_USER_HOME": str(home), "VBOX_IPC_SOCKETID": "lab", "HOME": "/root"}
    return subprocess.run([here.vboxmanage, *words], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
