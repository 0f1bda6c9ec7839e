"""One VMmanage task: HostMain, the broker or another program that guest tasks need beside them.

Owns its command line, its process and what it has written to its stderr. What its end means for the job is decided by
`vmwrapper.vm.services`.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from socket import socket
from typing import Any

from vmcontrol.common.eventloop import Event, LimitReached, with_limit
from vmwrapper.context.context import JobContext
from vmwrapper.context.logical_names import LinkRefused
from vmwrapper.context.streams import streams_of
from vmwrapper.context.waiting import InARow
from vmwrapper.errors import BadInput, SubTaskFailed
from vmwrapper.job import commandline
from vmwrapper.job.model import VmManageTask
from vmwrapper.log import quote, size_of, tail_of_file
from vmwrapper.paths import fault_of_input, is_file, what_is_there
from vmwrapper.process.ending import kill_program
from vmwrapper.process.leftovers import Role
from vmwrapper.process.program import CannotStart, Ended, StreamError, Streams, start_program
from vmwrapper.process.selfstart import own_program
from vmwrapper.process.supervised import DOOR_FD, SupervisedProcess, pipes, supervised_command

GRACE_S = 2.0
"""For programs that take a TERM."""

log = logging.getLogger(__name__)

Command = tuple[list[str], dict[str, str]]
"""The program with its arguments, and the environment."""


class Managed:
    """One VMmanage task, over all its starts."""

    def __init__(self, context: JobContext, task: VmManageTask) -> None:
        self._context = context
        self.task = task
        self.name = "HostMain" if task.is_host_main else Path(task.application).name
        self.process: SupervisedProcess | None = None
        """None: does not run."""
        self.deaths = InARow(context.ledger)
        self.refusal = ""
        """Why the supervisor could not start its program."""
        self.program_ended: Ended | None = None
        """How the program under the supervisor ended, as that says; the supervisor's own end says nothing."""
        self._stderr_begins = 0
        """Bytes that were in its stderr file when it was started."""
        self._over = Event()
        """Set while no process of it runs."""

    # --- its command

    def command(self, environment: Mapping[str, str], host_main: list[str] | None) -> Command:
        """Its command line and environment. host_main: in place of our own HostMain (tests). Raises BadInput."""
        names = self._context.names
        arguments = commandline.resolve(commandline.split(self.task.command_line), names.resolve)
        environment = {**environment, **self.task.variables}
        if not self.task.is_host_main:
            return supervised_command([self._find_program(), *arguments], GRACE_S, environment)
        configuration = [argument for argument in arguments if Path(argument).name != "HostMain.py"]
        if configuration:  # else HostMain takes its defaults
            try:
                fault = fault_of_input(names.source(configuration[0]), self._context.slot_folder)
            except LinkRefused as refused:
                fault = refused.why
            if fault:
                raise self.bad_input("command_line", f"HostMain's configuration {configuration[0]} {fault}")
        own, extra = own_program("vmcontrol.hostmain", environment)
        return [*(host_main or own), *configuration], {**environment, **extra}

    def _find_program(self) -> str:
        """The path of a program: a file of the slot by its logical name, else found on PATH. Raises BadInput."""
        application, folder = self.task.application, self._context.slot_folder
        path = folder / self._context.names.resolve(application)
        if is_file(path):
            return str(path.absolute())
        if "/" not in application and (found := shutil.which(application)):
            return found
        neither = f"{application} is neither a file in the slot nor a program on PATH"
        raise self.bad_input("application", f"{neither}; {what_is_there(folder)}")

    def place(self, element: str) -> str:
        """File, line and element, for messages."""
        return f"{self._context.source}:{self.task.line}: <{element}>"

    def bad_input(self, element: str, text: str) -> BadInput:
        return BadInput(f"{self.place(element)}: {text}")

    # --- its process

    def start(
        self,
        command: Command,
        *,
        on_event: Callable[[Managed, Mapping[str, Any]], None],
        on_end: Callable[[Managed, SupervisedProcess | None], None],
        door: socket | None,
    ) -> None:
        """Start it. on_end is called with the process that ended. Raises BadInput, SubTaskFailed."""
        program, environment = command
        if door is not None:
            environment = {**environment, "VMWRAPPER_DOOR_FD": str(DOOR_FD)}
        streams = self._streams()

        def ended() -> None:
            over, self.process = self.process, None
            self._over.set()
            if over is not None:
                self._context.process_list.drop(over.pid)
            on_end(self, over)

        process = SupervisedProcess(self._context.reactor, self.name, lambda event: on_event(self, event), ended)
        self._over.clear()
        self.refusal, self.program_ended, self._stderr_begins = "", None, size_of(streams.stderr)
        try:
            start_program(
                self._context.reactor,
                program,
                folder=self._context.slot_folder,
                environment=environment,
                streams=streams,
                pipes=pipes(door),
                protocol=process,
            )
        except StreamError as error:
            raise self._bad_stream(error) from error
        except CannotStart as error:
            raise SubTaskFailed(f"{self.place('application')}: {self.name}: {error}") from error
        self.process = process
        role = Role.HOST_MAIN if self.task.is_host_main else Role.SUPERVISOR
        with contextlib.suppress(OSError):  # the mark in the environment finds it as well
            self._context.process_list.add(role, process.pid, process.began)

    async def end(self) -> None:
        """Cut its lifeline; kill it when it is not over soon."""
        process = self.process
        if process is None:
            return
        process.cut_lifeline()
        try:
            await with_limit(self._context.reactor, GRACE_S + 3.0, f"the end of {self.name}", self._over.wait())
        except LimitReached as error:
            log.warning("%s: it is killed", error)
            await kill_program(self._context.reactor, process)

    # --- its streams

    def _streams(self) -> Streams:
        try:
            return streams_of(self.task, self._context.names)
        except StreamError as error:
            raise self._bad_stream(error) from error

    def _bad_stream(self, error: StreamError) -> BadInput:
        there = f"; {what_is_there(self._context.slot_folder)}" if error.is_missing else ""
        return self.bad_input(error.element, f"{self.name}: {error}{there}")

    def quote_stderr(self) -> None:
        """Quote its last lines in stderr.txt."""
        quote(f"{self.name} stderr", self._stderr_tail())

    def last_words(self) -> str:
        """What it said last, as the end of a sentence; nothing when that went to our own stderr."""
        if not self.task.stderr_filename:
            return ""
        lines = self._stderr_tail()
        return f": {lines[-1]}" if lines else f": it wrote nothing to {self.task.stderr_filename}"

    def _stderr_tail(self) -> list[str]:
        try:
            path = self._streams().stderr
        except BadInput:
            return []  # it has put a link in the place of its file
        return tail_of_file(path, since=self._stderr_begins) if path is not None else []
