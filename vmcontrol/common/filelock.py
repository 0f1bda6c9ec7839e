"""Locks on files. The kernel releases a lock when its process ends, in whatever way.

Every account that can open a file can lock it, for reading is enough: so a lock file is made for its account alone
(0600), and one that belongs to another account is refused.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_BEYOND = 1 << 30
"""Windows: a byte beyond all that is written, for locked bytes cannot be read there."""


def open_lock_file(path: Path, *, mode: int = 0o600) -> int:
    """Open a lock file for reading and appending, made if it is missing; nobody beyond `mode` can open it from now on.

    Raises OSError, also for a link, and for a file of another account unless `mode` shares it with a group.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    fd = os.open(path, flags, mode)
    if sys.platform == "win32":
        return fd
    try:
        status, us = os.fstat(fd), os.geteuid()
        is_ours = us in (0, status.st_uid)
        if not is_ours and not mode & 0o070:
            raise PermissionError(errno.EPERM, "the lock file belongs to another account", str(path))
        if is_ours and status.st_mode & 0o777 & ~mode:  # an older version's
            os.fchmod(fd, mode)
    except BaseException:
        os.close(fd)
        raise
    return fd


def try_lock(fd: int, *, record: bool = False) -> bool:
    """Lock the file, or return False when another process holds the lock. It is held until the file is closed.

    record: by a POSIX record lock, which excludes no other descriptor of this process. Raises OSError where there are
    no locks (some network file systems; errno in NO_LOCKS), or for another reason.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(fd, 0 if record else _BEYOND, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            (fcntl.lockf if record else fcntl.flock)(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


def is_current(fd: int, path: Path) -> bool:
    """Whether this is still the file of that name: the holder of a lock may have removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
