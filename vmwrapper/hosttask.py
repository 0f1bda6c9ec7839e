"""Programs on the host: unzip tasks and host tasks. Started, suspended, resumed, limited, ended with their whole tree.

Event-driven: the end of a program is seen when it happens. BOINC wrapper's further elements (exec_dir, daemon,
priority, multi_process, macros) belong in `command` and `HostTask` when the parser takes them.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twisted.internet.task import LoopingCall

from vmcontrol.eventloop import sleep, start_logged
from vmwrapper import processes
from vmwrapper.accounts import task_fraction
from vmwrapper.errors import TaskFailed, TemporaryExit
from vmwrapper.job import commandline
from vmwrapper.job.model import Program, Task
from vmwrapper.log import quote
from vmwrapper.processes import CannotStart, Ended, Running, StreamError, Streams
from vmwrapper.surroundings import Surroundings
from vmwrapper.vmmanage import find_program, tail_of_file

STOP_SIGNALS = frozenset({1, 2, 15})
"""HUP, INT, TERM: who sends them to a task often sends them to us too."""
STOP_SIGNAL_WAIT_S = 0.5
"""A terminal's Ctrl-C and systemd's TERM reach task and wrapper at once: then it is a quit and no failure."""
LOOK_S = 1.0
"""Between looks at the files by which a program tells its progress."""
NUMBER_LIMIT = 4096
"""Bytes at the end of a progress file that are read."""

_NUMBER = re.compile(rb"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")

log = logging.getLogger(__name__)


class HostProgram:
    """One program of the job on the host, until it has ended."""

    def __init__(self, around: Surroundings, program: Program, arguments: Sequence[str] = ()) -> None:
        self._around = around
        self._program = program
        self._arguments = list(arguments)
        self._running: Running | None = None
        self.time_limit_reached = False

    def command(self) -> list[str]:
        """The words to execute. Raises BadInput when the application is not there."""
        words = commandline.resolve(commandline.split(self._program.command_line), self._around.resolve)
        path = find_program(self._program.application, self._program.line, self._around.resolve)
        return [path, *words, *self._arguments]

    async def run(self, time_limit_s: float | None = None) -> Ended:
        """Start it and wait for its end; nothing of it is left then. Raises BadInput, TaskFailed (195)."""
        await self._around.control.may_work()
        command = self.command()
        program = self._program
        try:
            self._check_executable(command[0])
            running = processes.start_program(
                self._around.reactor,
                command,
                folder=self._around.slot_folder,
                environment=self._around.program_environment(program.setenv),
                streams=Streams(
                    self._stream(program.stdin_filename),
                    self._stream(program.stdout_filename),
                    self._stream(program.stderr_filename),
                ),
            )
        except (StreamError, CannotStart) as error:
            raise TaskFailed(f"{self._around.source}:{program.line}: {program.application}: {error}") from error
        self._running = running
        self._around.accounts.use(self.cpu_time_s)
        before = _children_cpu_s()
        stop_listening = self._around.control.listen(self._suspend)
        timer = None
        if time_limit_s is not None:
            timer = self._around.control.work_clock.callLater(time_limit_s, self._on_time_limit)
        try:
            ended = await running.wait()
            await self.end()  # who cancels us calls it instead: the tree gets its time to go there
        finally:
            stop_listening()
            if timer is not None and timer.active():
                timer.cancel()
            self._around.accounts.settle(at_least_s=_children_cpu_s() - before)
        return ended

    async def end(self) -> None:
        """End what is left of its tree: TERM, 5 s, KILL."""
        running, self._running = self._running, None
        if running is not None:
            await processes.end_tree(self._around.reactor, running)
        processes.end_orphans()

    def _on_time_limit(self) -> None:
        log.warning("%s has reached its time_limit: it is ended and counts as done", self._program.application)
        self.time_limit_reached = True
        running = self._running
        if running is not None:
            start_logged(processes.end_tree(self._around.reactor, running), "time limit")

    def _suspend(self, suspended: bool) -> None:
        running = self._running
        if running is None:
            return
        root = processes.process(running.pid, running.start_time)
        if suspended:
            processes.suspend_tree(root)
        else:
            processes.resume_tree(root)

    def cpu_time_s(self) -> float:
        running = self._running
        if running is None:
            return 0.0
        return processes.cpu_time_s(processes.process(running.pid, running.start_time))

    def memory_bytes(self) -> int:
        running = self._running
        if running is None:
            return 0
        return processes.memory_bytes(processes.process(running.pid, running.start_time))

    def stderr_tail(self) -> list[str]:
        path = self._stream(self._program.stderr_filename)
        return tail_of_file(path) if path is not None else []

    def _stream(self, name: str) -> Path | None:
        return self._around.path(name) if name else None

    def _check_executable(self, path: str) -> None:
        if not os.access(path, os.X_OK):
            raise CannotStart(f"{path} is not executable")


async def run_to_success(
    around: Surroundings, host_program: HostProgram, program: Program, limit_s: float | None
) -> None:
    """Run it; anything but exit status 0 (or its time limit) is TaskFailed."""
    ended = await host_program.run(limit_s)
    if ended.good or host_program.time_limit_reached:
        return
    if ended.signal in STOP_SIGNALS and around.control.ending is None:
        await sleep(around.reactor, STOP_SIGNAL_WAIT_S)
    quote(f"{program.application} stderr", host_program.stderr_tail())
    raise TaskFailed(f"{around.source}:{program.line}: {program.application} {ended}")


class HostTask:
    """A host task, with what it tells about its progress."""

    def __init__(self, around: Surroundings, task: Task, arguments: Sequence[str]) -> None:
        self._around = around
        self._task = task
        self.program = HostProgram(around, task, arguments)
        self._own_fraction: float | None = None
        self._checkpoint_seen = self._checkpoint_mtime()

    async def run(self) -> None:
        """Returns when it has done its work. Raises TaskFailed, BadInput."""
        limit = self._task.time_limit_s
        if limit is not None:
            limit = max(0.0, limit - self._around.accounts.task_elapsed_s)
        looking = LoopingCall(self._look)
        looking.clock = self._around.reactor
        if self._task.fraction_done_filename or self._task.checkpoint_filename:
            looking.start(LOOK_S, now=False)
        try:
            await run_to_success(self._around, self.program, self._task, limit)
        finally:
            if looking.running:
                looking.stop()

    def fraction(self) -> float | None:
        return task_fraction(self._own_fraction, None, self._around.accounts.task_elapsed_s)

    def _look(self) -> None:
        if self._task.fraction_done_filename:
            found = last_number(self._around.path(self._task.fraction_done_filename))
            self._own_fraction = found if found is not None else self._own_fraction
        seen = self._checkpoint_mtime()
        if seen is not None and seen != self._checkpoint_seen:
            self._checkpoint_seen = seen
            try:
                self._around.ledger.progressed(self._around.ledger.now)
            except TemporaryExit as trouble:
                log.warning("no checkpoint this time: %s", trouble.reason)
            else:
                self._around.checkpoint_completed()

    def _checkpoint_mtime(self) -> Any:
        if not self._task.checkpoint_filename:
            return None
        try:
            return self._around.path(self._task.checkpoint_filename).stat().st_mtime_ns
        except OSError:
            return None


def last_number(path: Path) -> float | None:
    """The last number in a file, as BOINC's wrapper reads fraction_done_filename; None when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - NUMBER_LIMIT))
            numbers = _NUMBER.findall(file.read())
    except OSError:
        return None
    return float(numbers[-1]) if numbers else None


def _children_cpu_s() -> float:
    """CPU seconds of all descendants that ended and were waited for."""
    times = os.times()
    return times.children_user + times.children_system
