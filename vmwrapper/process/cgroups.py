"""A control group (version 2) for the host programs of a run, where the system allows to make one.

Owns the group `vmwrapper_<run>` below our own, and one below that for each program. With it a tree is stopped and
killed by the kernel, forks included, and CPU time counts every process that ever lived in it. Nobody else is ever
moved. Where there is no cgroup2, or where we may not write (the rule for a service without `Delegate=`), `open_group`
gives None and `vmwrapper.process.family` does what can be done without.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from vmcontrol.common import proctable
from vmcontrol.common.proctable import Entry
from vmwrapper.paths import is_folder
from vmwrapper.process.trackers import Tracker

PREFIX = "vmwrapper_"
OLD_S = 60.0
"""A group that is empty after that is nobody's any more; one is filled within a second of its making."""
_GONE_LIMIT_S = 1.0
_LOOK_S = 0.002
_STABLE_ROUNDS = 40
_LOOKS = 3

log = logging.getLogger(__name__)


class Group(Tracker):
    """One control group."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def child(self, name: str) -> Group | None:
        """A group below this one; None when the system refuses."""
        group = Group(self.folder / name)
        try:
            group.folder.mkdir()
        except OSError as error:
            log.debug("no control group for %s: %s", name, error)
            return None
        return group

    def take_in(self, members: Callable[[], list[int]]) -> bool:
        """Move a tree into the group, and what it forks meanwhile. False when the system refuses.

        Each move takes the kernel some 10 ms (it waits for all processors): for a thread, and not for short programs.
        members: the tree's pids, whenever it is called.
        """
        inside: set[int] = set()
        looks = 0
        for _ in range(_STABLE_ROUNDS):
            new = set(members()) - inside
            new -= set(self.pids())  # born in the group
            # One look is not enough: the system's list is no moment's, and of a chain of forks it can miss each member.
            looks = 0 if new else looks + 1
            if looks == _LOOKS:
                return bool(inside)
            for pid in new:
                try:
                    (self.folder / "cgroup.procs").write_text(str(pid))
                except ProcessLookupError:
                    pass
                except OSError as error:
                    log.debug("no control group: %s", error)
                    return False
            inside |= new
        return False

    def pids(self) -> list[int]:
        """Living processes of this group and those below it."""
        found: list[int] = []
        for folder, _, _ in os.walk(self.folder):
            with contextlib.suppress(OSError):
                found += [int(pid) for pid in (Path(folder) / "cgroup.procs").read_text().split()]
        return found

    def members(self) -> list[Entry]:
        found = [proctable.look_at(pid) for pid in self.pids()]
        return [entry for entry in found if entry is not None and entry.is_alive]

    def stop(self) -> bool:
        """Freeze everything, also what is being forked just now. False when the system refuses."""
        return self._write("cgroup.freeze", "1")

    def go_on(self) -> None:
        self._write("cgroup.freeze", "0")

    def _write(self, name: str, value: str) -> bool:
        """False when the system refuses."""
        try:
            (self.folder / name).write_text(value)
        except OSError as error:
            log.debug("control group: %s: %s", name, error)
            return False
        return True

    def cpu_time_s(self) -> float:
        """User and system time of every process that ever lived in it, groups below that are gone included."""
        with contextlib.suppress(OSError, ValueError):
            for line in (self.folder / "cpu.stat").read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "usage_usec":
                    return int(value) / 1e6
        return 0.0

    def kill(self) -> bool:
        """KILL everything in it (Linux 5.14). False when the system cannot do that."""
        return self._write("cgroup.kill", "1")

    def remove(self) -> None:
        """Remove the group and those below it; they have to be empty. Killed processes leave it within milliseconds."""
        end = time.monotonic() + _GONE_LIMIT_S
        for folder, _, _ in os.walk(self.folder, topdown=False):
            while True:
                try:
                    Path(folder).rmdir()
                except FileNotFoundError:
                    break
                except OSError as error:
                    if time.monotonic() > end:
                        log.warning("control group %s stays: %s", folder, error.strerror)
                        return
                    time.sleep(_LOOK_S)  # the kernel tells nobody; this is not waiting for a program
                else:
                    break


def open_group(run: str) -> Group | None:
    """A new group for this run; None where that is not possible."""
    parent = _own_folder()
    if parent is None:
        return None
    _remove_old(parent)
    group = Group(parent / f"{PREFIX}{run[:16]}")
    try:
        group.folder.mkdir()
    except OSError:
        return None
    if not (group.folder / "cgroup.freeze").exists() or not os.access(group.folder / "cgroup.procs", os.W_OK):
        group.remove()
        return None
    return group


def _remove_old(parent: Path) -> None:
    """Empty groups of runs that were killed and whose slots are gone: nobody else would ever remove them."""
    with contextlib.suppress(OSError):
        for folder in parent.glob(f"{PREFIX}*"):
            empty = "populated 0" in (folder / "cgroup.events").read_text()
            if empty and time.time() - folder.stat().st_ctime > OLD_S:
                Group(folder).remove()


def end_left(folder: str) -> int:
    """Kill what a killed run left in its group, and remove that; how many processes it were. Only a group of ours."""
    group = Group(Path(folder))
    if not group.folder.name.startswith(PREFIX) or not is_folder(group.folder):
        return 0
    left = group.members()
    if not group.kill():
        for entry in left:
            proctable.kill(entry)
    group.go_on()
    group.remove()
    return len(left)


def _own_folder() -> Path | None:
    """The folder of the cgroup2 group that we are in."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::/"))
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            if after.startswith("cgroup2 "):
                root, mounted = before.split()[3:5]
                relative = own.removeprefix(root.rstrip("/")) if root != "/" else own
                folder = Path(mounted) / relative.lstrip("/")
                return folder if (folder / "cgroup.procs").exists() else None
    except (OSError, StopIteration, ValueError):
        pass
    return None
