"""The job from its first unzip task to its last task: what runs when, and when a host task counts as done.

Owns the order. Never ends the process: it returns when all tasks are done, raises how the job ends otherwise, and is
cancelled when the client wants an end; `vmwrapper.run.run` does the rest.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from vmwrapper.context.context import JobContext
from vmwrapper.errors import JobError
from vmwrapper.host.daemons import HostSide
from vmwrapper.host.left_running import LeftRunning
from vmwrapper.host.outputs import Outputs
from vmwrapper.host.task import HostProgram, HostTask, run_to_success
from vmwrapper.job.model import Task
from vmwrapper.run.output_links import OutputLinks

if TYPE_CHECKING:
    from vmwrapper.vm.session import GuestSession

log = logging.getLogger(__name__)


class JobSequence:
    """One run of the job, from where the checkpoint says that it is."""

    def __init__(self, context: JobContext, session: GuestSession | None) -> None:
        """session: None when no VM is needed, nor to be removed."""
        self._context = context
        self._job = context.job
        self._extra_args = list(context.options.extra_args)
        self._passed_args = list(context.options.passed_args)
        self._session = session
        self.host_task: HostTask | None = None
        self.host_program: HostProgram | None = None
        self.host_side = HostSide(context, context.job, self._passed_args)
        self.left = LeftRunning(context)
        self.output_links = OutputLinks(context.slot_folder, context.names)
        self._outputs = Outputs(context.slot_folder, context.names)

    async def run(self) -> None:
        """Until all tasks are done. Raises JobError, TemporaryExit."""
        self.host_side.check_signed()
        self.output_links.note()
        self._check_guests_inputs()
        await self.host_side.unzip_inputs()
        await self._unzip()
        self.host_side.note_initial_files(under_client=self._context.options.under_client)
        self._check_guests_inputs()
        if self._session is not None:
            await self._session.begin()
        await self._run_tasks()
        await self.host_side.end_daemons()
        await self.host_side.zip_outputs()

    def _check_guests_inputs(self) -> None:
        if self._session is not None:
            self._session.check_inputs()

    async def _run_tasks(self) -> None:
        if self._context.ledger.now.tasks_done < len(self._job.tasks):
            await self.host_side.start_daemons()
            await self._run_leaving_tasks_again()
        while (index := self._context.ledger.now.tasks_done) < len(self._job.tasks):
            await self._context.control.may_work()
            await self.left.before(index)
            task = self._job.tasks[index]
            where = f" in VM {task.guest.virtualmachine}" if task.guest is not None else ""
            log.info("task %d of %d: %s %s%s", index + 1, len(self._job.tasks), task.title, task.command_line, where)
            self._context.accounts.begin_task(self._context.ledger.now.task_elapsed_s, runs=task.guest is None)
            if task.guest is None:
                await self._run_host_task(index, task)
            elif self._session is None:
                raise RuntimeError("a guest task without a session")
            else:
                await self._session.run_task(index)
        await self.left.settle()

    async def _run_leaving_tasks_again(self) -> None:
        """Those that are done and had left running what later tasks may need: it went with the last run.

        If one fails now that is no failure of the job: whether a later task needs it will be seen.
        """
        for index in self.left.to_run_again():
            task = self._job.tasks[index]
            await self._context.control.may_work()
            log.info("task %d runs again: what it had left running went with the last run", index + 1)
            self.host_program = program = HostProgram(self._context, task, self._extra_args, self._passed_args)
            try:
                await run_to_success(self._context, program, task, task.time_limit_s, may_leave=True)
            except JobError as error:
                log.warning("%s; going on without it", error)
            self.host_program = None
            self.left.ran_again(index)
            self.left.add(index, program)
        self.left.look()

    async def _unzip(self) -> None:
        ledger = self._context.ledger
        for index in range(ledger.now.unzip_done, len(self._job.unzip_tasks)):
            task = self._job.unzip_tasks[index]
            log.info("unzip task %d: %s %s", index + 1, task.application, task.command_line)
            self.host_program = HostProgram(self._context, task)
            await run_to_success(self._context, self.host_program, task, None)
            ledger.commit(unzip_done=index + 1)
        self.host_program = None

    async def _run_host_task(self, index: int, task: Task) -> None:
        self.host_task = HostTask(self._context, task, self._extra_args, self._passed_args)
        self.host_program = self.host_task.program
        began_ns = time.time_ns()
        await self.host_task.run()
        self.left.add(index, self.host_task.program)
        if index + 1 == len(self._job.tasks):  # as a part of the task: a restart meanwhile has to begin it again
            await self.left.settle()
        self._outputs.sync(began_ns)
        ledger = self._context.ledger
        self._context.accounts.begin_task()
        left = self.left.indices()
        ledger.progressed(replace(ledger.now, tasks_done=index + 1, current=None, left_running=left))
        self._context.runtime.checkpoint_completed()
        self.host_task = self.host_program = None
