"""What a job does on the host around its tasks, from BOINC's wrapper: archives in and out, daemons, signed programs.

Owns the daemons while they run, and `vmwrapper_initial_files.json`. The order of it all is in `vmwrapper.run.sequence`.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence

from twisted.internet.defer import DeferredList

from vmcontrol.common import jsonfile
from vmcontrol.common.atomicfile import write_atomically
from vmcontrol.common.eventloop import start, start_logged
from vmcontrol.common.slotfiles import INITIAL_FILES, JOB_FILE, STDERR
from vmwrapper.context.context import JobContext
from vmwrapper.context.logical_names import LinkRefused
from vmwrapper.errors import BadInput, translate_os_errors
from vmwrapper.host.task import HostProgram
from vmwrapper.job.model import Job, Task
from vmwrapper.paths import is_file, is_there
from vmwrapper.process.patience import ABORT_S, Patience
from vmwrapper.process.program import Running

_SIGNED_LINK = re.compile(r"\.\./\.\./(?P<project>.+)/(?P<name>[^/]+)")

log = logging.getLogger(__name__)

INITIAL_FILES_LIMIT = 64 * 1024 * 1024
"""Bytes of the list. A slot has some dozens of files; archives may have put a hundred thousand into it."""


class HostSide:
    """The parts of one job on the host that are no tasks."""

    def __init__(self, context: JobContext, job: Job, passed: Sequence[str]) -> None:
        self._context = context
        self._job = job
        self._passed = list(passed)
        self._daemons: list[HostProgram] = []

    def check_signed(self) -> None:
        """Programs of the job have to be signed files of the app version, where the client says which these are.

        As BOINC's wrapper (check_executables), which keeps whoever can write an input file from running programs. A
        job file that is itself one of the signed files may name any program. Raises BadInput.
        """
        signed = set(self._context.init_data.app_files)
        if not signed or self._signed_name(JOB_FILE) in signed:
            return
        for task in (*self._job.daemons, *self._job.tasks, *self._job.unzip_tasks):
            if isinstance(task, Task) and task.guest is not None:
                continue
            if self._signed_name(task.application) not in signed:
                raise BadInput(
                    f"{self._job.source}:{task.line}: <application>: expected a file of the app version, not"
                    f" {task.application}: the job file is not one, so it may name signed programs only"
                )

    def _signed_name(self, logical: str) -> str:
        """The physical name that a link into the project's folder leads to; "" when it is none."""
        found = _SIGNED_LINK.fullmatch(self._context.names.link_text(logical))
        return found["name"] if found else ""

    # --- archives

    async def unzip_inputs(self) -> None:
        """Unpack the archives, once per slot. One that is not there is passed over, as by BOINC's wrapper."""
        context = self._context
        if not self._job.unzip_inputs or context.ledger.now.inputs_unzipped:
            return
        from vmwrapper.context.background import in_background
        from vmwrapper.host import unpacking

        unpacked = []
        for name in self._job.unzip_inputs:
            if not is_there(context.slot_folder / name):
                log.warning("unzip_input: %s is not there", name)
                continue
            try:
                path = context.names.source(name)
            except LinkRefused as refused:
                raise BadInput(f"{self._job.source}: <unzip_input>: {name} {refused.why}") from refused
            if not is_file(path):  # a pipe would make the thread wait for ever
                raise BadInput(f"{self._job.source}: <unzip_input>: {name} is no file")
            log.info("unpacking %s", name)
            try:
                with translate_os_errors(f"{name} cannot be unpacked"):
                    await in_background(
                        context.reactor,
                        context.control,
                        lambda gate, path=path: unpacking.unpack(  # type: ignore[misc]
                            path,
                            context.slot_folder,
                            gate.passing,
                            context.names.note_unpacked,
                            limit=context.init_data.rsc_disk_bound,
                        ),
                    )
            except unpacking.BadArchive as error:
                raise BadInput(f"{self._job.source}: <unzip_input>: {name} {error}") from error
            unpacked.append(name)
        context.ledger.commit(inputs_unzipped=True)
        for name in unpacked:  # now they only take space; what they link to is the client's
            (context.slot_folder / name).unlink(missing_ok=True)

    def note_initial_files(self, *, under_client: bool) -> None:
        """Write down what is in the slot before the first task: that is no output. Once per slot."""
        path = self._context.slot_folder / INITIAL_FILES
        if self._job.zip_output is None or path.exists() or self._context.ledger.now.tasks_done:
            return
        found = sorted(os.fsencode(entry.name).hex() for entry in os.scandir(self._context.slot_folder))
        if not under_client:
            found.remove(os.fsencode(STDERR).hex())  # we have just made it
        with translate_os_errors("the slot cannot be written"):
            write_atomically(path, (json.dumps({"version": 1, "names": found}) + "\n").encode())

    def _initial_files(self) -> set[str]:
        try:
            value = jsonfile.load(self._context.slot_folder / INITIAL_FILES, INITIAL_FILES_LIMIT)
            return {os.fsdecode(bytes.fromhex(name)) for name in value["names"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read (%s): the archive may hold input files too", INITIAL_FILES, error)
            return set()

    async def zip_outputs(self) -> None:
        """Pack the output files, unless the tasks have made the archive themselves."""
        context, wanted = self._context, self._job.zip_output
        if wanted is None or context.ledger.now.outputs_zipped:
            return
        from vmwrapper.context.background import in_background
        from vmwrapper.host import archives

        try:
            archive = context.names.target(wanted.zipfilename)
        except LinkRefused as error:
            raise BadInput(f"{self._job.source}: <zip_output>: {wanted.zipfilename} {error.why}") from error
        if is_there(archive):
            log.info("zip_output: %s is there already", wanted.zipfilename)
        else:
            chosen = archives.choose(
                context.slot_folder, wanted.patterns, self._initial_files(), os.path.normpath(wanted.zipfilename)
            )
            chosen = [name for name in chosen if self._may_be_packed(name)]
            log.info("packing %d files into %s", len(chosen), wanted.zipfilename)
            with translate_os_errors(f"{wanted.zipfilename} cannot be written"):
                await in_background(
                    context.reactor,
                    context.control,
                    lambda gate: archives.pack(archive, context.slot_folder, chosen, gate.passing),
                )
        context.ledger.commit(outputs_zipped=True)

    def _may_be_packed(self, name: str) -> bool:
        try:
            self._context.names.source(name)
        except LinkRefused as refused:
            log.warning("zip_output: %s is left out: it %s", name, refused.why)
            return False
        return True

    # --- daemons

    async def start_daemons(self) -> None:
        """Start those that run beside the tasks. One that ends early is no failure, as with BOINC's wrapper."""
        if not self._job.daemons:
            return
        await self._context.control.may_work()
        for task in self._job.daemons:
            log.info("daemon: %s %s", task.application, task.command_line)
            daemon = HostProgram(self._context, task, passed=self._passed)
            running = daemon.start()
            self._daemons.append(daemon)
            start_logged(self._watch(task, running), "daemon")

    async def _watch(self, task: Task, running: Running) -> None:
        log.info("daemon %s %s", task.application, await running.wait())

    async def end_daemons(self, patience: Patience | None = None) -> None:
        """TERM, and KILL when the patience is used up: all at the same time."""
        daemons, self._daemons = self._daemons, []
        if daemons:
            patience = patience or Patience(self._context.control.work_clock, ABORT_S)
            await DeferredList([start(daemon.end(patience)) for daemon in daemons], consumeErrors=True)
