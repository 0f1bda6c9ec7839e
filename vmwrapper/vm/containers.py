"""The disks of a job's containers: looked at before anything starts, and made ready for the VMs.

check       before anything starts; a disk that is shipped compressed is read when it is unpacked
attached    the disks of a VM, in the order of the job
command     what a task runs
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vmcontrol.common.containerdisk import ContainerDisk
from vmwrapper.context.context import JobContext
from vmwrapper.context.logical_names import LinkRefused
from vmwrapper.errors import BadInput
from vmwrapper.job.model import Task
from vmwrapper.paths import is_file
from vmwrapper.vm import container_check
from vmwrapper.vm.container import ContainerCommand
from vmwrapper.vm.images import SharedImages


class Containers:
    """For one job."""

    def __init__(self, context: JobContext, images: SharedImages) -> None:
        self._context = context
        self._images = images
        self._disks: dict[str, ContainerDisk] = {}
        """Those that are ready, by logical name."""

    def check(self, tasks: Sequence[Task]) -> None:
        """Raises BadInput for a disk that is there, and that cannot run its task."""
        for task in tasks:
            logical = container_check.name(task)
            if not logical:
                continue
            try:
                path = self._context.names.source(logical)
            except LinkRefused as refused:
                raise BadInput(container_check.line(self._context.source, task, f"it {refused.why}")) from refused
            if fault := container_check.fault(self._context.source, task, path):
                raise BadInput(fault)

    async def attached(self, virtualmachine: str) -> tuple[Path, ...]:
        """Where the disks of this VM's containers are, each once. Raises BadInput, TemporaryExit."""
        paths: dict[str, Path] = {}
        source = self._context.source
        for task in self._context.job.tasks:
            logical = container_check.name(task)
            if not logical or task.guest is None or task.guest.virtualmachine != virtualmachine:
                continue
            if logical not in paths:
                path = await self._images.ready(logical)
                if not is_file(path):
                    raise BadInput(container_check.line(source, task, "it is not there"))
                self._disks[logical] = container_check.read(source, task, path)
                paths[logical] = path.absolute()
            self._decide(task)
        return tuple(paths.values())

    def command(self, task: Task) -> ContainerCommand | None:
        """What a task runs in its container; None: it runs in the guest itself. Raises BadInput."""
        return self._decide(task) if container_check.name(task) else None

    def _decide(self, task: Task) -> ContainerCommand:
        given = self._context.options
        further = [*given.extra_args, *given.passed_args]
        return container_check.decide(self._context.source, task, self._disks[container_check.name(task)], further)
