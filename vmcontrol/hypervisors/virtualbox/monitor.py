"""One VM watched: its process, its log, and the folder that the log is in (watch.py has the means).

Reports what happens and decides nothing: what a state in the log or the end of the process means is state.py's
business. Never asks VirtualBox. Owns the watches; the process is VirtualBox's, and is killed only by `kill` and `gone`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from vmcontrol.common.eventloop import Event, LimitReached, with_limit
from vmcontrol.hypervisors.common.problems import process_stuck
from vmcontrol.hypervisors.virtualbox import output
from vmcontrol.hypervisors.virtualbox.watch import FolderWatch, Follower, VmProcess, is_vm_process
from vmcontrol.protocol.vm import VmState

log = logging.getLogger(__name__)

END_LIMIT_S = 10.0
"""A VM process that was switched off ends within 0.4 s; after this it is killed."""
LOG_HEAD, LOG_TAIL = 64 * 1024, 1024 * 1024
"""Bytes. The process stands in the first lines; a VM that is switched off writes its statistics at the end."""
LOG_LIMIT = 512 * 1024
"""Bytes of VBox.log on disk beyond which only its head is kept. A start and an end write 120 KB."""


class VmMonitor:
    """Of one VM. `follow` begins to watch what there is; `close` ends it for ever."""

    def __init__(
        self,
        reactor: Any,
        folders: FolderWatch,
        name: str,
        uuid: str,
        log_file: Path | None,
        *,
        on_change: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        """log_file: of a VM of ours, whose folder is watched while it is off, too; None for another one.

        on_change: something in the folder changed. on_end: the process has ended, whoever ended it.
        """
        self.process: VmProcess | None = None
        """The one that runs the VM, as far as found."""
        self._reactor = reactor
        self._folders = folders
        self._name = name
        self._uuid = uuid
        self._ours = log_file is not None
        self._log = Follower(log_file) if log_file is not None else None
        self._on_change = on_change
        self._on_end = on_end
        self._watched: list[Path] = []
        self._wanted: VmState | None = None
        self._reached = Event()
        """Set when the log has the state `_wanted`."""
        self._closed = False

    @property
    def watches(self) -> bool:
        """Whether what happens to the VM is noticed at all."""
        return bool(self._watched)

    def follow(self, folder: Path, *, live: bool) -> bool:
        """Watch what there is to watch: the log folder of a VM of ours, log and process of a live one.

        Whether the process was found just now.
        """
        if self._closed:
            return False
        if self._ours or live:
            self._watch_folder(folder)
        if not live or self.process is not None:
            return False
        log_file = folder / "VBox.log"
        if not self.find_process(log_file):
            return False
        self._log = Follower(log_file)
        self._log.begin_at_end()
        return True

    def find_process(self, log_file: Path) -> bool:
        """Whether the process that writes this log is there and runs this VM; it is watched then."""
        try:
            pid = output.log_process(_head(log_file))
            if pid is not None and is_vm_process(pid, self._uuid):
                self.process = VmProcess(self._reactor, pid, self._process_ended)
        except (OSError, psutil.NoSuchProcess):
            return False
        return self.process is not None

    def _watch_folder(self, folder: Path) -> None:
        if folder not in self._watched and folder.is_dir():
            self._watched.append(folder)
            self._folders.add(folder, self._on_change)

    # The log --------------------------------------------------------------------------------------------------------

    def read_log(self) -> VmState | None:
        """The last state in the log since it was last read; None when there is none."""
        if self._log is None:
            return None
        state = output.log_state(self._log.read().decode("utf-8", "replace"))
        self._bound_log(self._log.path)
        if state is not None and state is self._wanted:
            self._wanted = None
            self._reached.set()
        return state

    def _bound_log(self, path: Path) -> None:
        """A guest can make VirtualBox write without end, by restarting itself; three older logs are kept as well.

        VirtualBox goes on at its own offset, so what is cut off becomes a hole.
        """
        if self._ours:
            with contextlib.suppress(OSError):
                if path.stat().st_blocks * 512 > LOG_LIMIT:  # stat(2): always units of 512
                    os.truncate(path, LOG_HEAD)

    def reached(self, wanted: VmState) -> Event:
        """Set when the log has this state, from now on."""
        self.read_log()
        self._wanted, self._reached = wanted, Event()
        return self._reached

    def log_text(self) -> str:
        """The end of the log; empty when there is none."""
        if self._log is None:
            return ""
        try:
            with self._log.path.open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - LOG_TAIL))
                return file.read().replace(b"\0", b"").decode("utf-8", "replace")
        except OSError:
            return ""

    # The process ----------------------------------------------------------------------------------------------------

    def end(self) -> Event | None:
        """Set when the VM's process has ended."""
        return self.process.ended if self.process is not None else None

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()

    async def gone(self) -> None:
        """Wait for the end of the VM's process; kill it when that takes long. Raises HostProblem `process-stuck`."""
        process = self.process
        if process is None:
            return
        try:
            await with_limit(self._reactor, END_LIMIT_S, "the VM process", process.ended.wait())
        except LimitReached:
            log.warning("%s: process %d does not end; killing it", self._name, process.pid)
            process.kill()
            try:
                await with_limit(self._reactor, END_LIMIT_S, "the VM process", process.ended.wait())
            except LimitReached as error:
                raise process_stuck(
                    f"{self._name}: its process {process.pid} does not end although it was killed"
                ) from error
        self._release_process()

    def _process_ended(self) -> None:
        self._release_process()
        self._on_end()

    def _release_process(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.close()

    def close(self) -> None:
        """Watch nothing any more."""
        self._closed = True
        for folder in self._watched:
            self._folders.remove(folder)
        self._watched.clear()
        self._release_process()


def _head(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(LOG_HEAD).decode("utf-8", "replace")
