"""The files of a guest task: into the guest before its command, out of it after that, durable before the task counts.

A copy that broke off is made again. What cannot be copied is the job's end where the job is to blame (BadInput,
TaskFailed), and a temporary exit where the computer is.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmcontrol.common.atomicfile import fsync_folder, write_atomically
from vmcontrol.common.beneath import held_folder, open_file
from vmcontrol.common.eventloop import sleep
from vmwrapper.context.context import JobContext
from vmwrapper.errors import TaskFailed, TemporaryExit
from vmwrapper.job.model import Task
from vmwrapper.paths import make_folder_for
from vmwrapper.vm import decisions
from vmwrapper.vm.decisions import Copy
from vmwrapper.vm.machine import Machine
from vmwrapper.vm.recovery import TROUBLE_DELAY_S, Recovery
from vmwrapper.vm.trouble import HostMainError, HypervisorTrouble, MissingFile

if TYPE_CHECKING:
    from vmwrapper.vm.hostmain import HostMainClient

COPY_TRIES = 3
_AGAIN_S = 1.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)

log = logging.getLogger(__name__)


class GuestFiles:
    """Of one guest task."""

    def __init__(self, context: JobContext, machine: Machine, task: Task, recovery: Recovery) -> None:
        self._context = context
        self._machine = machine
        self._task = task
        self._recovery = recovery

    # --- in

    async def copy_in(self) -> None:
        """Copy the application and its input into the guest. Raises BadInput, HostMainErrors."""
        for copy in decisions.files_in(self._task):
            await self._copy_in(copy)

    async def _copy_in(self, copy: Copy) -> None:
        if fault := self._context.fault_of_input(copy.logical):
            raise decisions.bad_input(self._context.source, self._task, copy.logical, copy.what, fault)
        local = self._context.names.source(copy.logical)
        try:
            await self._transfer(lambda hostmain: hostmain.put_file(self._machine.name, str(local), copy.remote))
        except MissingFile as missing:  # it went, or its disk has let us down, after the look above
            fault = f"cannot be copied into the guest: {missing.reason or 'it cannot be read'}"
            raise decisions.bad_input(self._context.source, self._task, copy.logical, copy.what, fault) from missing

    async def _transfer(self, move: Callable[[HostMainClient], Coroutine[Any, Any, object]]) -> None:
        """Copy a file; again when it broke off, for a suspension can do that."""
        for left in reversed(range(COPY_TRIES)):
            await self._context.control.may_work()
            hostmain = await self._machine.hostmain()
            try:
                await move(hostmain)
            except (MissingFile, HypervisorTrouble):
                raise
            except HostMainError as error:
                if not left or not await self._recovery.still_up():
                    raise
                log.warning("%s; trying again", error)
                await sleep(self._context.reactor, _AGAIN_S)
            else:
                return

    # --- out

    async def copy_streams_out(self, result: Mapping[str, Any]) -> list[Path]:
        """stdout and stderr, as far as the job wants them; where they are. Raises MissingFile, HostMainErrors."""
        written: list[Path] = []
        for element, path in (("stdout", self._task.stdout_filename), ("stderr", self._task.stderr_filename)):
            source = str(result.get(f"{element}_path") or "")
            if path and source:
                written.append(await self._copy_out(source, path))
            elif path:  # an agent of protocol 1 keeps no files
                written.append(self._write_out(str(result.get(element.removeprefix("std")) or ""), path))
        return written

    async def copy_out(self) -> list[Path]:
        """The other outputs; where they are. Raises MissingFile, HostMainErrors."""
        return [await self._copy_out(copy.remote, copy.logical) for copy in decisions.files_out(self._task)]

    async def _copy_out(self, remote: str, logical: str) -> Path:
        local = self._place_for(logical)
        await self._transfer(lambda hostmain: hostmain.get_file(self._machine.name, remote, str(local)))
        return local

    def _write_out(self, content: str, logical: str) -> Path:
        local = self._place_for(logical)
        try:
            with held_folder(local.parent, self._context.names.base) as folder:
                write_atomically(folder / local.name, content.encode(errors="replace"))
        except OSError as error:
            raise _cannot_write(local, error) from error
        return local

    def _place_for(self, logical: str) -> Path:
        """Where an output goes: the project's file is meant, not the client's link to it. Its folders are made."""
        try:
            local = self._context.names.target(logical)
            make_folder_for(local, self._context.slot_folder)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise TaskFailed(
                    f"{self._context.source}:{self._task.line}: {logical} cannot be written: it {error.strerror}"
                ) from error
            raise _cannot_write(Path(logical), error) from error
        return local

    def make_durable(self, written: Sequence[Path]) -> None:
        """On return a power loss does not take them away. Raises OSError."""
        for path in written:
            fd = open_file(path, self._context.names.base, os.O_RDWR)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            fsync_folder(path.parent)


def _cannot_write(local: Path, error: OSError) -> TemporaryExit:
    if error.errno in _NO_ROOM:  # waited for while the VM is up (vmwrapper.vm.held_up)
        reason = f"{local} cannot be written ({error.strerror}): free some space on BOINC's disk"
        return TemporaryExit(reason, fault="output-file", delay_s=TROUBLE_DELAY_S)
    reason = f"{local} cannot be written: {error.strerror}"
    return TemporaryExit(reason, fault="output-place", delay_s=TROUBLE_DELAY_S)
