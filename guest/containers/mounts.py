"""File systems of a container: its disk, found and mounted, and the overlays over it. For root in the guest.

Folders come as descriptors and are given to the kernel as such: no name that somebody else could change meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import stat
from pathlib import Path

from vmcontrol.protocol.text import BadMessage, bounded_json

MS_RDONLY, MS_NODEV, MS_REC, MS_PRIVATE = 1, 4, 0x4000, 0x40000
MNT_DETACH = 2
CLONE_NEWNS = 0x00020000
_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x02, 0x10

HEADER_AT = 4096
HEADER_LIMIT = 512 * 1024
_MAGIC = re.compile(rb"vmwrapper container 1 (\d{1,6})\n")
PLACES = {"/home": "/data/home", "/tmp": "/data/tmp", "/var/tmp": "/data/vartmp"}  # noqa: S108 (of the guest)
"""Where the folders that the agent may write really are: an overlay wants both of its folders in one mount."""

_libc = ctypes.CDLL(None, use_errno=True)


class ContainerError(Exception):
    """The container cannot run; `str` is the sentence."""


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def private_mounts() -> None:
    """Give this process a mount namespace of its own: nobody else sees what it mounts, and it goes with it."""
    _check(_libc.unshare(CLONE_NEWNS), "a mount namespace")
    _check(_libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "private mounts")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Raises OSError."""
    _check(_libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()), f"mounting {kind}")


def unmount(target: str) -> None:
    """Detach what is mounted there; harmless where nothing is."""
    _libc.umount2(target.encode(), MNT_DETACH)


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_inside(root: int, name: str) -> int | None:
    """The folder `name` as a process whose root is `root` sees it, links included; None: it is not there."""
    how = _How(os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    fd = _libc.syscall(_OPENAT2, root, name.encode(), ctypes.byref(how), ctypes.sizeof(how))
    return None if fd < 0 else int(fd)


def find_disk(id: str) -> str:
    """The partition with the container `id`. Raises ContainerError."""
    for disk in sorted(Path("/sys/class/block").iterdir()):
        if (disk / "partition").exists():
            continue
        with contextlib.suppress(OSError, BadMessage, ValueError):
            with Path("/dev", disk.name).open("rb", buffering=0) as device:
                device.seek(HEADER_AT)
                found = disk_id(device.read(HEADER_LIMIT + 64))
            if found == id:
                return _first_partition(disk)
    raise ContainerError(f"no disk of this virtual machine holds the container {id[:12]}")


def disk_id(raw: bytes) -> str | None:
    """The id in a disk's header, from byte HEADER_AT on; None: it is no container's. Raises BadMessage, ValueError."""
    line = _MAGIC.match(raw)
    if line is None:
        return None
    length = int(line[1])
    if not 0 < length <= HEADER_LIMIT or len(raw) < line.end() + length:
        return None
    value = bounded_json(raw[line.end() : line.end() + length])
    id = value.get("id") if isinstance(value, dict) else None
    return id if isinstance(id, str) else None


def _first_partition(disk: Path) -> str:
    for one in disk.iterdir():
        with contextlib.suppress(OSError):
            if (one / "partition").read_text() == "1\n":
                return f"/dev/{one.name}"
    raise ContainerError(f"the container's disk {disk.name} has no partition")


def same_folder_below_data(folder: int) -> int:
    """The agent's folder `folder` once more, opened where the guest's disk is mounted. Raises ContainerError.

    Its name is only a hint: what is opened by it, without following a link, must be the very same folder.
    """
    status = os.fstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != VM_UID:
        raise ContainerError("the task's folder is no folder of the agent's user")
    name = os.readlink(f"/proc/self/fd/{folder}")  # noqa: PTH115
    for shown, real in PLACES.items():
        if name.startswith(shown + "/"):
            here = os.open(real, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                for part in name[len(shown) + 1 :].split("/"):
                    below = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
                    os.close(here)
                    here = below
            except OSError as error:
                os.close(here)
                raise ContainerError(f"the task's folder {name}: {error.strerror}") from error
            there = os.fstat(here)
            if (there.st_dev, there.st_ino) == (status.st_dev, status.st_ino):
                return here
            os.close(here)
    raise ContainerError(f"the task's folder {name[:200]} is not on the guest's disk")


VM_UID = 1000


def overlay(target: str, lower: int | str, upper: int | str, work: str) -> None:
    """Mount one folder over another. Descriptors or our own names. Raises OSError."""
    below, above = (f"/proc/self/fd/{one}" if isinstance(one, int) else one for one in (lower, upper))
    mount("overlay", target, "overlay", MS_NODEV, f"lowerdir={below},upperdir={above},workdir={work}")


def give_back(folder: int, uid: int, gid: int, ids: range) -> int:
    """Make what users of a container (`ids`, in the guest) left below `folder` belong to `uid` and `gid`; how many.

    Each is opened without following a link, looked at, and given by that descriptor. Files with further names stay.
    """
    given, todo = 0, [os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)]
    device = os.fstat(folder).st_dev
    while todo:
        here = todo.pop()
        try:
            for name in os.listdir(here):  # noqa: PTH208 (of a descriptor)
                with contextlib.suppress(OSError):
                    one = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
                    try:
                        status = os.fstat(one)
                        if status.st_dev != device:
                            continue
                        is_folder = stat.S_ISDIR(status.st_mode)
                        if status.st_uid in ids or status.st_gid in ids:
                            if not is_folder and status.st_nlink > 1:
                                continue
                            os.chown(f"/proc/self/fd/{one}", uid, gid)
                            given += 1
                        if is_folder and len(todo) < MOST_OPEN:
                            todo.append(os.open(f"/proc/self/fd/{one}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
                    finally:
                        os.close(one)
        finally:
            os.close(here)
    return given


MOST_OPEN = 900
"""Folders that are open at once while they are given back: descriptors are few."""
