"""Programs on the host: unzip tasks, host tasks and daemons. Started, limited and ended as a whole tree.

Event-driven: the end of a program is seen when it happens. What the elements of BOINC's wrapper mean is in
`HostProgram.start_line`; `vmwrapper.host.spawn` starts, `vmwrapper.process.family` knows what came of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.internet.task import LoopingCall

from vmcontrol.common.eventloop import sleep, start_logged
from vmcontrol.common.proctable import Entry
from vmwrapper.boinc.runtime import InitData
from vmwrapper.context.context import JobContext
from vmwrapper.context.streams import streams_of
from vmwrapper.errors import BadInput, TaskFailed, TemporaryExit
from vmwrapper.host import spawn
from vmwrapper.job import commandline
from vmwrapper.job.macros import OpenMacro
from vmwrapper.job.macros import resolve as resolve_macro
from vmwrapper.job.model import HostOptions, Priority, Program, Task
from vmwrapper.log import quote, size_of, tail_of_file
from vmwrapper.paths import is_file, is_folder, what_is_there
from vmwrapper.process.family import ProcessFamily
from vmwrapper.process.patience import ABORT_S, Patience
from vmwrapper.process.program import CannotStart, Ended, Running, StreamError, Streams
from vmwrapper.state.accounts import task_fraction

if TYPE_CHECKING:
    from vmwrapper.host.stderr_copy import StderrCopy

NICE_VALUES: dict[int, int] = {Priority.LOWEST: 19, Priority.LOW: 10, Priority.HIGH: -10, Priority.HIGHEST: -15}
"""lib/util.h, PROCESS_*_PRIORITY. Normal is 0 there, which means: left as it is."""
STOP_SIGNALS = frozenset({1, 2, 15})
"""HUP, INT, TERM: who sends them to a task often sends them to us too."""
STOP_SIGNAL_WAIT_S = 0.5
"""A terminal's Ctrl-C and systemd's TERM reach task and wrapper at once: then it is a quit and no failure."""
LOOK_S = 1.0
"""Between looks at the files by which a program tells its progress."""
NUMBER_LIMIT = 4096
"""Bytes at the end of a progress file that are read."""

_NUMBER = re.compile(rb"\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)")

log = logging.getLogger(__name__)


class HostProgram:
    """One program of the job on the host, until nothing of it is left."""

    def __init__(
        self, context: JobContext, program: Program, arguments: Sequence[str] = (), passed: Sequence[str] = ()
    ) -> None:
        """arguments: words that follow those of the job file. passed: the words after --passthrough_child."""
        self._context = context
        self._program = program
        self._arguments = list(arguments)
        self._passed = list(passed)
        self._family: ProcessFamily | None = None
        self._stderr_copy: StderrCopy | None = None
        self._stderr_begins = 0
        """Bytes that earlier programs had left in its stderr file."""
        self.time_limit_reached = False
        self.left_running: list[Entry] = []
        """What ran on when the program had ended."""

    def start_line(self) -> spawn.Program:
        """What is executed, without its streams; environment: its setenv, empty for ours.

        Raises BadInput when the application is not there, TaskFailed for its folder.
        """
        context, program = self._context, self._program
        host = program.host if isinstance(program, Task) else None
        command_line, setenv, folder = program.command_line, program.setenv, context.slot_folder
        if host is not None:
            macros = context.macros
            setenv = tuple(macros.substitute(variable) for variable in setenv)
            command_line = macros.substitute(command_line)
            if host.append_cmdline_args:
                command_line = " ".join((command_line, *self._passed))
            try:
                forward_slashes = host.forward_slashes if os.name == "nt" else None
                command_line = resolve_macro(command_line, context.names.resolve, forward_slashes=forward_slashes)
            except OpenMacro as error:
                raise BadInput(f"{context.source}:{program.line}: <command_line>: {error}") from error
            folder = context.slot_folder / macros.substitute(host.exec_dir)
            if not is_folder(folder):
                raise TaskFailed(
                    f"{context.source}:{program.line}: <exec_dir>: {host.exec_dir!r} is not a folder that can be"
                    " entered"
                )
        arguments = commandline.resolve(commandline.split(command_line), context.names.resolve)
        path, name = self._application(host, folder)
        return spawn.Program(
            path,
            (name, *arguments, *self._arguments),
            folder,
            setenv,
            niceness=niceness(context.init_data, host),
            umask=context.program_umask,
        )

    def _application(self, host: HostOptions | None, folder: Path) -> tuple[str, str]:
        """The path to execute from inside the folder, and argv[0].

        As with BOINC's wrapper a relative path is executed from inside exec_dir, if there is such a program there; else
        it means the slot's (with BOINC's wrapper that task fails).
        """
        context, program = self._context, self._program
        path = context.macros.application(program.application) if host is not None else None
        if path is None:
            path = str(context.names.resolve(program.application))
            path = program.application if Path(path) == Path(program.application) else path
        if not is_file(context.slot_folder / path):
            found = shutil.which(program.application) if "/" not in program.application else None
            if found is None:
                raise BadInput(
                    f"{context.source}:{program.line}: <application>: {program.application} is neither a file in the"
                    f" slot nor a program on PATH; {what_is_there(context.slot_folder)}"
                )
            return found, program.application
        if folder != context.slot_folder and not is_file(folder / path):
            path = str((context.slot_folder / path).absolute())
        if not os.access(folder / path, os.X_OK):
            raise TaskFailed(f"{context.source}:{program.line}: {program.application}: {path} is not executable")
        return path, path

    def start(self) -> Running:
        """Start it. Raises BadInput, TaskFailed (195)."""
        context, program = self._context, self._program
        line = self.start_line()
        host = program.host if isinstance(program, Task) else None
        streams = self._streams()
        stderr = streams.stderr
        self._stderr_begins = size_of(stderr)
        if stderr is None and context.stderr_file is not None and os.name == "posix":
            from vmwrapper.host.stderr_copy import StderrCopy

            self._stderr_copy = StderrCopy(context.reactor, context.stderr_file)
            streams = replace(streams, stderr_fd=self._stderr_copy.writing_end)
        self._family = family = context.host_programs.begin(multi_process=host.multi_process if host else False)
        log.debug("starting %s %s in %s", line.path, line.arguments[1:], line.folder)
        environment = context.program_environment(line.environment, family.mark)
        try:
            running = spawn.spawn(context.reactor, replace(line, environment=environment, streams=streams))
        except (StreamError, CannotStart) as error:
            family.drop()
            raise TaskFailed(f"{context.source}:{program.line}: {program.application}: {error}") from error
        finally:
            if self._stderr_copy is not None:
                self._stderr_copy.started()
        family.started(running)
        return running

    async def run(self, time_limit_s: float | None = None, *, may_leave: bool = False) -> Ended:
        """Start it and wait for its end. Raises BadInput, TaskFailed (195).

        may_leave: what it leaves running goes on when it was good (`left_running`); else nothing of it is left then.
        """
        context = self._context
        await context.control.may_work()
        running = self.start()
        timer = None
        if time_limit_s is not None:
            timer = context.control.work_clock.callLater(time_limit_s, self._on_time_limit)
        try:
            ended = await running.wait()
            if ended.signal in STOP_SIGNALS and not self.time_limit_reached and context.control.ending is None:
                await sleep(context.reactor, STOP_SIGNAL_WAIT_S)  # who cancels us ends what is left
            if self.time_limit_reached and self._family is not None:
                await self._family.wait_ended()
            elif not may_leave or not ended.good:
                await self.end(self._short_patience())
            elif self._family is not None:
                self.left_running = await self._family.left_running()
                self._drain()
        finally:
            if timer is not None and timer.active():
                timer.cancel()
        return ended

    async def end(self, patience: Patience) -> None:
        """End what is left of its tree. Harmless when nothing is, or when that is being done already."""
        if self._family is not None:
            try:
                await self._family.end(patience)
            finally:
                self._drain()

    def is_there(self) -> bool:
        """Whether any of what it has left still runs. For one whose program has ended."""
        there = self._family is not None and self._family.is_there()
        if not there:
            self._drain()
        return there

    def members(self) -> list[Entry]:
        """Its processes."""
        return self._family.members() if self._family is not None else []

    def _drain(self) -> None:
        if self._stderr_copy is not None:
            self._stderr_copy.drain()

    def _short_patience(self) -> Patience:
        """In time that stands while we are suspended: what is stopped cannot save."""
        return Patience(self._context.control.work_clock, ABORT_S)

    def _on_time_limit(self) -> None:
        log.warning("%s has reached its time_limit: it is ended and counts as done", self._program.application)
        self.time_limit_reached = True
        start_logged(self.end(self._short_patience()), "time limit")

    def stderr_tail(self) -> list[str]:
        path = self._streams().stderr
        return tail_of_file(path, since=self._stderr_begins) if path is not None else []

    def _streams(self) -> Streams:
        """Raises TaskFailed for a link that is not to be followed."""
        program = self._program
        try:
            return streams_of(program, self._context.names)
        except StreamError as error:
            raise TaskFailed(f"{self._context.source}:{program.line}: {program.application}: {error}") from error


def niceness(init_data: InitData, host: HostOptions | None) -> int | None:
    """The nice value of a program, None: as it is. The volunteer's choice counts before the job file's."""
    if host is None or init_data.no_priority_change:
        return None
    if init_data.process_priority >= 0:
        return NICE_VALUES.get(init_data.process_priority + 1)
    return NICE_VALUES.get(int(host.priority))


async def run_to_success(
    context: JobContext,
    host_program: HostProgram,
    program: Program,
    limit_s: float | None,
    *,
    may_leave: bool = False,
) -> None:
    """Run it; anything but exit status 0 (or its time limit) is TaskFailed."""
    ended = await host_program.run(limit_s, may_leave=may_leave)
    if ended.good or host_program.time_limit_reached:
        return
    quote(f"{program.application} stderr", host_program.stderr_tail(), at_the_end=True)
    raise TaskFailed(f"{context.source}:{program.line}: {program.application} {ended}")


class HostTask:
    """A host task, with what it tells about its progress."""

    def __init__(self, context: JobContext, task: Task, arguments: Sequence[str], passed: Sequence[str] = ()) -> None:
        self._context = context
        self._task = task
        self.program = HostProgram(context, task, arguments, passed)
        self._own_fraction: float | None = None
        self._checkpoint_seen = self._checkpoint_mtime()

    async def run(self) -> None:
        """Returns when it has done its work. Raises TaskFailed, BadInput."""
        if self._task.fraction_done_filename:  # what is there is not of this run
            with contextlib.suppress(OSError):
                self._context.names.target(self._task.fraction_done_filename).unlink()
        limit = self._task.time_limit_s
        if limit is not None:
            limit = max(0.0, limit - self._context.accounts.task_elapsed_s)
        looking = LoopingCall(self._look)
        looking.clock = self._context.reactor
        if self._task.fraction_done_filename or self._task.checkpoint_filename:
            looking.start(LOOK_S, now=False)
        self._context.progress.follow(self.fraction)
        try:
            await run_to_success(self._context, self.program, self._task, limit, may_leave=True)
        finally:
            self._context.progress.follow(None)
            if looking.running:
                looking.stop()

    def fraction(self) -> float | None:
        return task_fraction(self._own_fraction, None, self._context.accounts.task_elapsed_s)

    def _look(self) -> None:
        if self._task.fraction_done_filename:
            found = None
            with contextlib.suppress(OSError):
                found = last_number(self._context.names.source(self._task.fraction_done_filename))
            self._own_fraction = found if found is not None else self._own_fraction
        seen = self._checkpoint_mtime()
        if seen is not None and seen != self._checkpoint_seen:
            self._checkpoint_seen = seen
            try:
                self._context.ledger.progressed(self._context.ledger.now)
            except TemporaryExit as trouble:
                log.warning("no checkpoint this time: %s", trouble.reason)
            else:
                self._context.runtime.checkpoint_completed()

    def _checkpoint_mtime(self) -> Any:
        if not self._task.checkpoint_filename:
            return None
        try:
            return self._context.names.source(self._task.checkpoint_filename).stat().st_mtime_ns
        except OSError:
            return None


def last_number(path: Path) -> float | None:
    """The number at the start of the last line that begins with one, as BOINC's wrapper reads such a file."""
    if not is_file(path):  # a pipe would make us wait for ever
        return None
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - NUMBER_LIMIT))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    if size > NUMBER_LIMIT:
        del lines[0]  # only the end of one
    numbers = [found[1] for line in lines if (found := _NUMBER.match(line))]
    return float(numbers[-1]) if numbers else None
