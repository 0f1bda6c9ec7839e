"""What happens to a VM, seen instead of asked of VirtualBox: its process's end, its log, its serial port.

VBoxManage costs 30 to 100 ms of processor time a call, so nothing here calls it. A process's end comes from a pidfd, or
where the system has none from looking twice a second, as what grows in files does. What is seen is a hint: whoever
needs the state asks VirtualBox then.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from twisted.internet.task import LoopingCall

from vmcontrol.common.eventloop import Event

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
"""A change has to be noticed within 2 s."""
PROCESS_NAMES = ("VBoxHeadless", "VirtualBoxVM", "VirtualBox")
COPY_BYTES = 1024 * 1024


class VmProcess:
    """A process that is not our child, and its end."""

    def __init__(self, reactor: Any, pid: int, on_end: Callable[[], None]) -> None:
        """Raises psutil.NoSuchProcess when there is none."""
        self.pid = pid
        self.ended = Event()
        self._reactor = reactor
        self._on_end = on_end
        self._fd = -1
        self._process = psutil.Process(pid)
        self._look: LoopingCall | None = None
        try:
            self._fd = os.pidfd_open(pid)
        except (AttributeError, OSError):
            self._look = LoopingCall(self._is_there)
            self._look.clock = reactor
            self._look.start(LOOK_EVERY_S, now=False)
        else:
            if not self._process.is_running():  # the pid was another's when the descriptor was opened
                os.close(self._fd)
                raise psutil.NoSuchProcess(pid)
            reactor.addReader(self)

    # IReadDescriptor: a pidfd is readable when the process has ended (pidfd_open(2))

    def fileno(self) -> int:
        return self._fd

    def logPrefix(self) -> str:  # noqa: N802
        return "VM process"

    def doRead(self) -> None:  # noqa: N802
        self._over()

    def connectionLost(self, reason: object) -> None:  # noqa: N802, ARG002 (the reactor ends)
        self.close()

    def _is_there(self) -> None:
        if not self._process.is_running() or self._process.status() == psutil.STATUS_ZOMBIE:
            self._over()

    def _over(self) -> None:
        self.close()
        if not self.ended.is_set():
            self.ended.set()
            self._on_end()

    def close(self) -> None:
        """Watch no longer."""
        if self._fd >= 0:
            self._reactor.removeReader(self)
            os.close(self._fd)
            self._fd = -1
        if self._look is not None and self._look.running:
            self._look.stop()

    def kill(self) -> None:
        """KILL it: for a VM process that VirtualBox cannot end any more."""
        with contextlib.suppress(psutil.Error):
            self._process.kill()


def is_vm_process(pid: int, uuid: str) -> bool:
    """Whether this process runs that VM: a pid in a log may be another program's by now."""
    try:
        process = psutil.Process(pid)
        if not process.name().startswith(PROCESS_NAMES):
            return False
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        argv = process.cmdline()
    except psutil.Error:
        return False
    return any(uuid in word.lower() for word in argv)


class Follower:
    """What is added to a file, also when another takes its place (VirtualBox renames its old log)."""

    def __init__(self, path: Path, *, offset: int = 0) -> None:
        self.path = path
        self.offset = offset
        self._inode = self._now()

    def _now(self) -> int | None:
        try:
            return self.path.stat().st_ino
        except OSError:
            return None

    def _is_there(self) -> bool:
        """Whether there is a file; another one than before is new from its beginning."""
        inode = self._now()
        if inode is not None and inode != self._inode:
            self._inode, self.offset = inode, 0
        return inode is not None

    def begin_at_end(self) -> None:
        """What is there already is no news."""
        try:
            self.offset = self.path.stat().st_size
        except OSError:
            self.offset = 0
        self._inode = self._now()

    def skip(self, most: int, kept: int) -> int:
        """Pass by what is new, but for its last `kept` bytes, when it is more than `most`. How many bytes that were."""
        try:
            end = self.path.stat().st_size
        except OSError:
            return 0
        self._is_there()
        if end - self.offset <= most:
            return 0
        passed = end - kept - self.offset
        self.offset = end - kept
        return passed

    def read(self) -> bytes:
        """What is new, at most a MiB of it."""
        if not self._is_there():
            return b""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(COPY_BYTES)
        except OSError:
            return b""
        self.offset += len(data)
        return data


class FolderWatch:
    """Has VMs look at what is written into their folders, twice a second: one for all VMs of a driver.

    A guest that prints without end makes nobody look more often.
    """

    def __init__(self, reactor: Any) -> None:
        self._callbacks: dict[Path, Callable[[], None]] = {}
        self._look = LoopingCall(self._look_at_all)
        self._look.clock = reactor

    def add(self, folder: Path, look: Callable[[], None]) -> None:
        """Call `look` again and again for what may be new in `folder`."""
        self._callbacks[folder] = look
        if not self._look.running:
            self._look.start(LOOK_EVERY_S, now=False)

    def remove(self, folder: Path) -> None:
        self._callbacks.pop(folder, None)
        if not self._callbacks:
            self.close()

    def _look_at_all(self) -> None:
        for look in list(self._callbacks.values()):
            try:
                look()
            except Exception:
                log.exception("what VirtualBox wrote cannot be looked at")

    def close(self) -> None:
        self._callbacks.clear()
        if self._look.running:
            self._look.stop()
