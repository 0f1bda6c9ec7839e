"""The guest half of a job, and its one door: the VMmanage tasks, the VM of the task in hand, the guest tasks.

    check_inputs    before anything starts
    begin           VMmanage tasks up, VMs that nothing needs deleted
    run_task        one guest task, from its VM to its results
    end             VMs saved or deleted, VMmanage tasks ended

Owns the VM in use. There is a session only for a job that needs VMs, or that has some to remove.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from twisted.internet.defer import CancelledError

from vmcontrol.common import virtualbox
from vmcontrol.common.eventloop import LimitReached, with_limit
from vmcontrol.protocol.vmends import VmEnd
from vmwrapper import names
from vmwrapper.context.context import JobContext
from vmwrapper.errors import BadInput, TemporaryExit, translate_os_errors
from vmwrapper.job import filenames
from vmwrapper.job.model import Task
from vmwrapper.process.patience import Patience
from vmwrapper.state.checkpoint import VmRecord
from vmwrapper.state.rollback import go_back
from vmwrapper.vm import decisions, image_memory
from vmwrapper.vm.containers import Containers
from vmwrapper.vm.images import SharedImages
from vmwrapper.vm.machine import Machine
from vmwrapper.vm.services import Services
from vmwrapper.vm.task import GuestTask
from vmwrapper.vm.trouble import HostMainError, StateLost

DELETE_LIMIT_S = 15.0
"""For deleting the VMs at a failure or an abort; what is left then is removed with its files."""

log = logging.getLogger(__name__)


class GuestSession:
    """The guest half of one job."""

    def __init__(self, context: JobContext, services: Services, stale_vms: Sequence[VmRecord]) -> None:
        """stale_vms: of another job in this slot, to be removed."""
        self._context = context
        self._services = services
        self._stale_vms = list(stale_vms)
        self._images = SharedImages(context)
        self._containers = Containers(context, self._images)
        self._users = decisions.users(context.job)
        self._machine: Machine | None = None
        self._task: GuestTask | None = None
        self.failure = services.failure

    def may_start_virtualbox(self) -> bool:
        """Whether HostMain may start VirtualBox's service for this job."""
        asks_for_qemu = any(task.guest and task.guest.hypervisor == "qemu" for task in self._context.job.tasks)
        return not asks_for_qemu and virtualbox.program() is not None

    # --- what the reports say

    @property
    def machine(self) -> Machine | None:
        """The VM in use."""
        return self._machine

    def running_task(self) -> GuestTask | None:
        """The guest task whose command runs now and can be asked; None while the client wants nothing to run."""
        control = self._context.control
        can_answer = self._task is not None and self._task.is_running and not control.suspended
        return self._task if can_answer and control.ending is None else None

    def waits_for(self) -> str:
        """What stands in the way of the task in hand, for people; "" for nothing."""
        if self._machine is not None and self._machine.held_up.reason:
            return f"waiting: {self._machine.held_up.reason}"
        if self._images.progress:
            return self._images.progress
        stage = str(self._context.ready)
        return stage if "waiting" in stage and not self._services.is_ending else ""

    # --- before the tasks

    def check_inputs(self) -> None:
        """What is missing now and what nothing can make any more ends the job before anything starts."""
        job, now = self._context.job, self._context.ledger.now
        if not job.needs_vm(now.tasks_done):
            return
        complaints = decisions.missing_inputs(job, now.unzip_done, now.tasks_done, self._context.fault_of_input)
        if complaints:
            raise complaints[0]
        self._containers.check(job.tasks[now.tasks_done :])
        wanted = {task.guest.hypervisor for task in job.tasks if task.guest is not None} - {"auto"}
        if len(wanted) > 1:
            raise BadInput(f"{job.source}: one job cannot use two hypervisors ({', '.join(sorted(wanted))})")

    async def begin(self) -> None:
        """Start the VMmanage tasks, and remove VMs of another job or result, and those that no unfinished task needs.

        Raises JobErrors, TemporaryExit, HostMainErrors.
        """
        self._context.host_programs.are_alone = False
        self._services.start()
        now = self._context.ledger.now
        needed = self._users[now.tasks_done :]
        unneeded = [*self._stale_vms, *(vm for vm in now.vms if vm.virtualmachine not in needed)]
        if unneeded:
            hostmain = await self._services.hostmain()
            available = await hostmain.available()
            for vm in unneeded:
                if vm.ours and vm.name in available:
                    log.info("deleting VM %s, which nothing needs any more", vm.name)
                    await hostmain.delete(vm.name)
                elif vm.name in available:
                    await hostmain.release(vm.name)
                self._context.ledger.keep(self._context.ledger.now.without_vm(vm.name))
            self._stale_vms.clear()
        await self._end_services()

    async def _end_services(self) -> None:
        """VMmanage tasks go with the last VM: what becomes of a broker then is nothing to the tasks that follow."""
        now = self._context.ledger.now
        if not (now.vms or self._stale_vms or self._context.job.needs_vm(now.tasks_done) or self._services.is_ending):
            await self._services.end(save=False)

    # --- tasks

    async def run_task(self, index: int) -> None:
        """Run a guest task. Returns when it counts as done, or when the job has gone back to an earlier task.

        Raises JobErrors, TemporaryExit.
        """
        context, task = self._context, self._context.job.tasks[index]
        self._establish_links()
        machine = await self._machine_for(task)
        self._task = GuestTask(context, machine, index, self._containers.command(task))
        try:
            await self._task.run()
        except StateLost as lost:
            self._go_back(machine, lost)
        else:
            await self._release(index, machine)
        self._task = None
        await self._end_services()

    def _establish_links(self) -> None:
        """Before the first guest runs: which names of the slot are links is known from here on."""
        with translate_os_errors("The slot cannot be written", fault="checkpoint-file"):
            self._context.names.establish(filenames.mentioned(self._context.job))

    async def _machine_for(self, task: Task) -> Machine:
        """The VM of this task: the one that runs already, or a new object for it."""
        context, guest = self._context, task.guest
        if guest is None:
            raise ValueError("not a guest task")
        if self._machine is not None and self._machine.virtualmachine == guest.virtualmachine:
            return self._machine
        record = context.ledger.now.vm(guest.virtualmachine)
        image: Path | None = await self._images.ready(guest.image) if guest.image else None
        if image is not None and (fault := image_memory.fault(context.source, task, image)):
            raise BadInput(fault)
        disks = await self._containers.attached(guest.virtualmachine)
        if record is None:
            name, data = guest.virtualmachine, context.init_data
            if image is not None:
                project = names.project_part(data.project_url, context.slot_folder)
                name = names.vm_name(project, data.result_name, data.slot, name)
            record = VmRecord(guest.virtualmachine, name, ours=image is not None)
        if disks and not record.ours:
            raise BadInput(
                f"{context.source}:{task.line}: <container>: the virtual machine {guest.virtualmachine} was there"
                " before, and only one that is made for the job has the disks of containers: name its <image>"
            )
        self._machine = Machine(context, self._services, guest, record, image, disks)
        return self._machine

    def _go_back(self, machine: Machine, lost: StateLost) -> None:
        """What earlier tasks did in this VM is gone, and later ones may need it: back to the first of them."""
        back = go_back(self._context.ledger.now, self._users, machine.virtualmachine, lost.to)
        log.warning("rollback: %s: the job goes back to task %d", lost, back.tasks_done + 1)
        self._context.ledger.keep(back)
        machine.close()
        self._machine = None

    async def _release(self, index: int, machine: Machine) -> None:
        """What becomes of the VM after a task: it stays for the next one, is saved for a later one, or goes."""
        if self._users[index + 1 : index + 2] == (machine.virtualmachine,):
            machine.drop_old_snapshots()
            return
        self._machine = None
        try:
            if machine.virtualmachine in self._users[index + 1 :]:
                await machine.save()
                machine.close()
            else:
                await machine.remove()
        except HostMainError as error:  # the tasks that were done on it are done; its snapshot is there
            log.warning("VM %s: %s", machine.name, error)
            await machine.discard()  # nothing looks after it until a later task needs it
            machine.close()

    # --- the end

    async def end(self, *, save: bool, patience: Patience) -> Mapping[str, VmEnd]:
        """Save the VMs, or delete them as far as that can be done in time, and end the VMmanage tasks.

        What HostMain says of each VM that was there to its end, by name. Files of VMs that are left stay in the slot.
        """
        if not save and self._services.running and self._context.ledger.now.vms:
            try:
                await with_limit(self._context.reactor, DELETE_LIMIT_S, "deleting the VMs", self._delete_vms())
            except CancelledError:
                raise
            except (LimitReached, Exception) as error:  # noqa: BLE001 (the end goes on)
                log.warning("not all VMs could be deleted: %s", error)
        return await self._services.end(save=save, limit_s=patience.left_s)

    async def _delete_vms(self) -> None:
        hostmain, ledger = await self._services.hostmain(), self._context.ledger
        for vm in ledger.now.vms:
            try:
                await (hostmain.delete(vm.name) if vm.ours else hostmain.release(vm.name))
            except HostMainError as error:  # the others go all the same
                log.warning("VM %s could not be %s: %s", vm.name, "deleted" if vm.ours else "given back", error)
                continue
            try:
                ledger.keep(ledger.now.without_vm(vm.name))
            except TemporaryExit as full:
                log.error("%s", full.reason)
