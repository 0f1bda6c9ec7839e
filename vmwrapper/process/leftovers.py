"""What a killed run left in the slot: the list of its processes, and their end.

Owns `vmwrapper_processes.json`: a token that every process of the run carries in its environment, and pid and birth
of those that were started directly. Exactly those are waited for or killed, nothing that only looks like them.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from vmcontrol.common import birth, jsonfile, proctable
from vmcontrol.common.atomicfile import write_atomically
from vmcontrol.common.birth import Birth
from vmcontrol.common.slotfiles import PROCESSES
from vmwrapper.process import cgroups
from vmwrapper.process.ending import gone, kill_trees
from vmwrapper.process.orphans import marked
from vmwrapper.slot import Slot

VERSION = 1
SAVING_LIMIT_S = 50.0
"""A HostMain whose wrapper was killed saves its VMs; below the minute after which the client kills what it listed."""
SUPERVISOR_LIMIT_S = 10.0
SIZE_LIMIT = 1 << 20
"""Bytes. A list has a few hundred; what is cut off here is no list."""
_TOKEN = re.compile("[0-9a-f]{32}")

log = logging.getLogger(__name__)


class Role(StrEnum):
    """What a process is for; decides how its end is waited for."""

    HOST_MAIN = "hostmain"
    SUPERVISOR = "keeper"
    """Its name in the list since the first version."""
    TASK = "task"
    VM = "vm"
    """A VM process that descends from us; one that the hypervisor owns is never listed."""


_PATIENCE_S = {Role.HOST_MAIN: SAVING_LIMIT_S, Role.SUPERVISOR: SUPERVISOR_LIMIT_S}


@dataclass(frozen=True, slots=True)
class Recorded:
    role: Role
    pid: int
    began: Birth


class ProcessList:
    """The processes of this run, on record in the slot from before the first of them starts."""

    def __init__(self, slot: Slot) -> None:
        self._path = slot.file(PROCESSES)
        self.token = os.urandom(16).hex()
        self._group = ""
        self._recorded: list[Recorded] = []

    def begin(self) -> None:
        """Write the token down; from then on processes may be started. Raises OSError."""
        self._write()

    def note_group(self, folder: str) -> None:
        """The control group that host programs are about to get. Raises OSError."""
        self._group = folder
        self._write()

    def add(self, role: Role, pid: int, began: Birth) -> None:
        """Raises OSError."""
        self._recorded.append(Recorded(role, pid, began))
        self._write()

    def drop(self, pid: int) -> None:
        self._recorded = [one for one in self._recorded if one.pid != pid]

    def end(self) -> None:
        """Nothing of this run is left."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:  # the next start finds nothing of what it says
            log.warning("%s cannot be removed: %s", self._path.name, error.strerror)

    def _write(self) -> None:
        value = {
            "version": VERSION,
            "run": self.token,
            "group": self._group,
            "processes": [{"role": one.role.value, "pid": one.pid, **one.began.to_json()} for one in self._recorded],
        }
        write_atomically(self._path, (json.dumps(value, indent=1) + "\n").encode(), mode=0o600)


@dataclass(frozen=True, slots=True)
class Found:
    """The list of a run that was killed."""

    token: str = ""
    """Empty: there is no list, or none that can be read."""
    group: str = ""
    recorded: tuple[Recorded, ...] = ()


def read(path: Path) -> Found:
    """What the run that wrote the list has started. Read strictly: by what it says processes are killed."""
    try:
        return _found(jsonfile.load(path, SIZE_LIMIT))
    except FileNotFoundError:
        return Found()
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s): processes that a killed run left are not looked for", path.name, error)
        return Found()


def _found(value: Any) -> Found:
    """Raises ValueError, KeyError, TypeError."""
    if type(value["version"]) is not int or value["version"] != VERSION:
        raise ValueError(f"version {str(value['version'])[:40]}")
    token, group = value["run"], value.get("group", "")
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise ValueError("run is no token")
    if not isinstance(group, str) or "\0" in group:
        raise ValueError("group is no folder")
    recorded = tuple(
        Recorded(Role(one["role"]), birth.pid_of(one["pid"]), Birth.from_json(one)) for one in value["processes"]
    )
    return Found(token, group, recorded)


async def clear(reactor: Any, slot: Slot) -> int:
    """End what a killed run left in this slot; how many processes that were. Some are given time to save first."""
    left = read(slot.file(PROCESSES))
    if not left.token:
        return 0
    count = cgroups.end_left(left.group) if left.group else 0
    if count:
        log.warning("killed %d host processes that a killed run left", count)
    for one in sorted(left.recorded, key=lambda one: _PATIENCE_S.get(one.role, 0.0), reverse=True):
        found = proctable.look_at(one.pid) if birth.find(one.pid, one.began) is not None else None
        if found is None:
            continue
        count += 1
        members = [found, *proctable.descendants(found.pid)]
        patience, role = _PATIENCE_S.get(one.role, 0.0), one.role.name.replace("_", "").lower()
        if patience and await gone(reactor, [found], patience):
            log.info("waited for the %s that a killed run left (pid %d)", role, one.pid)
        else:
            log.warning("killing the %s that a killed run left (pid %d)", role, one.pid)
        await kill_trees(reactor, members)
    rest = marked(left.token)
    if rest:
        log.warning("killing %s that a killed run left", ", ".join(f"pid {member.pid}" for member in rest))
        await kill_trees(reactor, rest)
    return count + len(rest)
