"""The job from its first unzip task to its last task: what runs when, and when a task counts as done.

Owns the order. Never ends the process: it returns when all tasks are done, raises how the job ends otherwise, and is
cancelled when the client wants an end; `vmwrapper.run.run` does the rest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmwrapper import names
from vmwrapper.boinc.runtime import InitData
from vmwrapper.context.context import JobContext
from vmwrapper.errors import BadInput, JobError, translate_os_errors
from vmwrapper.host.daemons import HostSide
from vmwrapper.host.left_running import LeftRunning
from vmwrapper.host.outputs import Outputs
from vmwrapper.host.task import HostProgram, HostTask, run_to_success
from vmwrapper.job import commandline, filenames, meaning
from vmwrapper.job.model import Job, Task
from vmwrapper.run.output_links import OutputLinks
from vmwrapper.slot import Slot
from vmwrapper.state.checkpoint import VmRecord
from vmwrapper.state.rollback import go_back

if TYPE_CHECKING:
    from vmwrapper.context.readiness import Readiness
    from vmwrapper.vm.images import SharedImages
    from vmwrapper.vm.machine import Machine, StateLost
    from vmwrapper.vm.services import Management
    from vmwrapper.vm.task import GuestTask

log = logging.getLogger(__name__)


class JobSequence:
    """One run of the job, from where the checkpoint says that it is."""

    def __init__(
        self,
        context: JobContext,
        job: Job,
        *,
        extra_args: Sequence[str],
        passed_args: Sequence[str],
        under_client: bool,
        init_data: InitData,
        nthreads: int | None,
        make_management: Callable[[], Management],
        ready: Readiness,
        strangers: Sequence[VmRecord] = (),
    ) -> None:
        """extra_args: for every task. passed_args: see RunOptions. make_management: called when an unfinished task
        needs a VM. strangers: VMs of another job in this slot.
        """
        self._context = context
        self._job = job
        self._extra_args = list(extra_args)
        self._passed_args = list(passed_args)
        self._under_client = under_client
        self._init_data = init_data
        self._nthreads = nthreads
        self._make_management = make_management
        self._ready = ready
        self._strangers = list(strangers)
        self.management: Management | None = None
        self.machine: Machine | None = None
        self.guest_task: GuestTask | None = None
        self.host_task: HostTask | None = None
        self.host_program: HostProgram | None = None
        self.host_side = HostSide(context, job, passed_args)
        self.left = LeftRunning(context)
        self.images: SharedImages | None = None
        self.output_links = OutputLinks(context.slot_folder, context.names)
        self._outputs = Outputs(context.slot_folder, context.names)
        self.cpu_share: Callable[[], int] = lambda: 100
        """Percent of its processors that a VM may use now."""

    async def run(self) -> None:
        """Until all tasks are done. Raises JobError, TemporaryExit."""
        self.host_side.check_signed()
        self.output_links.note()
        self._check_inputs()
        await self.host_side.unzip_inputs()
        await self._unzip()
        self.host_side.note_initial_files(under_client=self._under_client)
        self._check_inputs()
        self._start_management()
        await self._remove_strangers()
        await self._end_management()
        await self._run_tasks()
        await self.host_side.end_daemons()
        await self.host_side.zip_outputs()

    async def _run_tasks(self) -> None:
        if self._context.ledger.now.tasks_done < len(self._job.tasks):
            await self.host_side.start_daemons()
            await self._run_leaving_tasks_again()
        while (index := self._context.ledger.now.tasks_done) < len(self._job.tasks):
            await self._context.control.may_work()
            task = self._job.tasks[index]
            self._context.accounts.begin_task(self._context.ledger.now.task_elapsed_s, runs=task.guest is None)
            if task.guest is None:
                await self._run_host_task(index, task)
            else:
                await self._run_guest_task(index, task)
                await self._end_management()
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

    @property
    def has_strangers(self) -> bool:
        """Whether VMs of another job are still to be removed."""
        return bool(self._strangers)

    def task_fraction(self) -> float | None:
        """Of the task that is being done; None when it is not known."""
        task = self.guest_task or self.host_task
        return task.fraction() if task is not None else None

    # --- before the tasks

    async def _unzip(self) -> None:
        ledger = self._context.ledger
        for index in range(ledger.now.unzip_done, len(self._job.unzip_tasks)):
            task = self._job.unzip_tasks[index]
            log.info("unzip task %d: %s %s", index + 1, task.application, task.command_line)
            self.host_program = HostProgram(self._context, task)
            await run_to_success(self._context, self.host_program, task, None)
            ledger.commit(unzip_done=index + 1)
        self.host_program = None

    def _check_inputs(self) -> None:
        """What is missing now and what nothing can make any more ends the job before anything starts."""
        now = self._context.ledger.now
        if not self._job.needs_vm(now.tasks_done):
            return
        from vmwrapper.vm.decisions import missing_inputs

        complaints = missing_inputs(self._job, now.unzip_done, now.tasks_done, self._context.fault_of_input)
        if complaints:
            raise complaints[0]
        wanted = {task.guest.hypervisor for task in self._job.tasks if task.guest is not None} - {"auto"}
        if len(wanted) > 1:
            raise BadInput(f"{self._job.source}: one job cannot use two hypervisors ({', '.join(sorted(wanted))})")

    def _start_management(self) -> None:
        """VMmanage tasks run while a VM is needed, or while one that a killed run left has to be removed."""
        now = self._context.ledger.now
        needed = self._job.needs_vm(now.tasks_done)
        if not needed and not ((now.vms or self._strangers) and self._job.vmmanage_tasks):
            return
        self.management = self._make_management()
        self._context.host_programs.are_alone = False
        self.management.start()

    async def _end_management(self) -> None:
        """VMmanage tasks go with the last VM: what becomes of a broker then is nothing to the tasks that follow."""
        now = self._context.ledger.now
        if self.management is None or now.vms or self._strangers or self._job.needs_vm(now.tasks_done):
            return
        await self.management.end(save=False)
        self.management = None

    async def _remove_strangers(self) -> None:
        """VMs of another job or result in this slot, and those that no unfinished task needs."""
        now = self._context.ledger.now
        needed = {task.guest.virtualmachine for task in self._job.tasks[now.tasks_done :] if task.guest is not None}
        unneeded = [*self._strangers, *(vm for vm in now.vms if vm.virtualmachine not in needed)]
        if self.management is None or not unneeded:
            return
        host = await self.management.host()
        available = await host.available()
        for vm in unneeded:
            if vm.ours and vm.name in available:
                log.info("deleting VM %s, which nothing needs any more", vm.name)
                await host.delete(vm.name)
            elif vm.name in available:
                await host.release(vm.name)
            self._context.ledger.keep(self._context.ledger.now.without_vm(vm.name))
        self._strangers.clear()

    # --- tasks

    def _arguments(self, task: Task) -> list[str]:
        """Words of a guest task's command line: its own, as they stand, then those of our command line."""
        return [*commandline.split(task.command_line), *self._extra_args, *self._passed_args]

    async def _run_host_task(self, index: int, task: Task) -> None:
        log.info("task %d of %d: %s %s", index + 1, len(self._job.tasks), task.application, task.command_line)
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
        self._context.checkpoint_completed()
        self.host_task = self.host_program = None

    async def _run_guest_task(self, index: int, task: Task) -> None:
        from vmwrapper.vm.machine import StateLost
        from vmwrapper.vm.task import GuestTask

        guest = task.guest
        if guest is None or self.management is None:
            raise RuntimeError("a guest task without its VMmanage tasks")
        log.info(
            "task %d of %d: %s %s in VM %s",
            index + 1, len(self._job.tasks), task.application, task.command_line, guest.virtualmachine,
        )  # fmt: skip
        self._establish_links()
        machine = await self._machine_for(task)
        command_id = names.command_id(self._init_data.result_name, index, meaning.digest(task))
        self.guest_task = GuestTask(
            self._context,
            machine,
            task,
            index=index,
            command_id=command_id,
            arguments=self._arguments(task),
            users=self._users,
        )
        try:
            await self.guest_task.run(lambda done: self._count_as_done(index, machine, done))
        except StateLost as lost:
            self._go_back(machine, lost)
        else:
            await self._release(index, machine)
        self.guest_task = None

    @property
    def _users(self) -> list[str]:
        """For each task the VM that it uses, "" for none."""
        return [task.guest.virtualmachine if task.guest is not None else "" for task in self._job.tasks]

    def _establish_links(self) -> None:
        """Before the first guest runs: which names of the slot are links is known from here on."""
        with translate_os_errors("The slot cannot be written", fault="checkpoint-file"):
            self._context.names.establish(filenames.mentioned(self._job))

    def _go_back(self, machine: Machine, lost: StateLost) -> None:
        """What earlier tasks did in this VM is gone, and later ones may need it: back to the first of them."""
        now = self._context.ledger.now
        back = go_back(now, self._users, machine.virtualmachine, lost.to)
        log.warning("rollback: %s: the job goes back to task %d", lost, back.tasks_done + 1)
        self._context.ledger.keep(back)
        machine.close()
        self.machine = None

    async def _image(self, logical: str) -> Path:
        """Where the image of a VM is: one that was shipped compressed is unpacked now, or was by another job."""
        from vmwrapper.vm.images import SharedImages

        self.images = SharedImages(self._context)
        return await self.images.ready(logical)

    async def _machine_for(self, task: Task) -> Machine:
        """The VM of this task: the one that runs already, or a new object for it."""
        from vmwrapper.vm import image_memory
        from vmwrapper.vm.machine import Machine

        guest = task.guest
        management = self.management
        if guest is None or management is None:
            raise RuntimeError("not a guest task")
        if self.machine is not None and self.machine.virtualmachine == guest.virtualmachine:
            return self.machine
        context = self._context
        record = context.ledger.now.vm(guest.virtualmachine)
        image: Path | None = await self._image(guest.image) if guest.image else None
        if image is not None and (fault := image_memory.fault(self._job.source, task, image)):
            raise BadInput(fault)
        if record is None:
            name = guest.virtualmachine
            if image is not None:
                project = names.project_part(self._init_data.project_url, context.slot_folder)
                name = names.vm_name(project, self._init_data.result_name, self._init_data.slot, name)
            record = VmRecord(guest.virtualmachine, name, ours=image is not None)
        self.machine = Machine(
            context.reactor,
            slot=Slot(context.slot_folder),
            record=record,
            image=image,
            options=guest,
            ncpus=self._nthreads if self._nthreads and self._nthreads > 0 else self._init_data.ncpus,
            management=management,
            control=context.control,
            ledger=context.ledger,
            ready=self._ready,
            timeline=context.timeline,
        )
        self.machine.set_cpu_share(self.cpu_share())
        return self.machine

    def _uses_vm_later(self, index: int, virtualmachine: str) -> bool:
        return any(
            later.guest is not None and later.guest.virtualmachine == virtualmachine
            for later in self._job.tasks[index + 1 :]
        )

    async def _count_as_done(self, index: int, machine: Machine, task: GuestTask) -> None:
        """The outputs are safe. A snapshot if the VM is still needed, the checkpoint, then the agent may forget."""
        ledger = self._context.ledger
        command_id = task.progress.command_id
        if self._uses_vm_later(index, machine.virtualmachine):
            await task.count_as_done()
        else:
            self._context.accounts.begin_task()
            ledger.progressed(replace(ledger.now, tasks_done=index + 1, current=None))
        self._context.checkpoint_completed()
        if machine.is_live:
            await task.forget(command_id)

    async def _release(self, index: int, machine: Machine) -> None:
        """What becomes of the VM after a task: it stays for the next one, is saved for a later one, or goes."""
        from vmwrapper.vm.hostmain import HostError

        following = self._job.tasks[index + 1] if index + 1 < len(self._job.tasks) else None
        if (
            following is not None
            and following.guest is not None
            and following.guest.virtualmachine == machine.virtualmachine
        ):
            machine.drop_old_snapshots_later()
            return
        self.machine = None
        try:
            if self._uses_vm_later(index, machine.virtualmachine):
                await machine.save()
                machine.close()
            else:
                await machine.remove()
        except HostError as error:  # the tasks that were done on it are done; its snapshot is there
            log.warning("VM %s: %s", machine.name, error)
            await machine.discard()  # nothing looks after it until a later task needs it
            machine.close()
