"""The disks of a job's containers: read on the host before anything starts, and made ready for the VMs.

check       before anything starts; disks that are shipped compressed are read when they are unpacked
attached    the disks of a VM, in the order of the job
command     what a task runs
faults      for `vmwrapper check`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vmcontrol.common import containerdisk
from vmcontrol.common.containerdisk import BadContainerDisk, ContainerDisk
from vmwrapper.context.context import JobContext
from vmwrapper.context.logical_names import LinkRefused
from vmwrapper.errors import BadInput
from vmwrapper.job.model import Job, Task
from vmwrapper.paths import is_file
from vmwrapper.vm import container, shipped_image
from vmwrapper.vm.container import BadContainer, ContainerCommand
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
            logical = _name(task)
            if not logical:
                continue
            try:
                path = self._context.names.source(logical)
            except LinkRefused as refused:
                raise BadInput(_line(self._context.source, task, f"it {refused.why}")) from refused
            if fault := _fault(self._context.source, task, path):
                raise BadInput(fault)

    async def attached(self, virtualmachine: str) -> tuple[Path, ...]:
        """Where the disks of this VM's containers are, each once. Raises BadInput, TemporaryExit."""
        paths: dict[str, Path] = {}
        for task in self._context.job.tasks:
            if task.guest is None or task.guest.virtualmachine != virtualmachine or not task.guest.container:
                continue
            logical = task.guest.container
            if logical not in paths:
                path = await self._images.ready(logical)
                if not is_file(path):
                    raise BadInput(_line(self._context.source, task, "it is not there"))
                self._disks[logical] = _read(self._context.source, task, path)
                paths[logical] = path.absolute()
            self._decide(task)
        return tuple(paths.values())

    def command(self, task: Task) -> ContainerCommand | None:
        """What a task runs in its container; None: it runs in the guest itself. Raises BadInput."""
        return self._decide(task) if _name(task) else None

    def _decide(self, task: Task) -> ContainerCommand:
        given = self._context.options
        further = [*given.extra_args, *given.passed_args]
        return _decide(self._context.source, task, self._disks[_name(task)], further)


def faults(job: Job, resolve: Callable[[str], Path]) -> Iterator[str]:
    """What keeps tasks from running in their containers, as far as the disks are there."""
    for task in job.tasks:
        if (name := _name(task)) and (fault := _fault(job.source, task, resolve(name))):
            yield fault


def notes(job: Job, resolve: Callable[[str], Path]) -> Iterator[str]:
    """Of disks that cannot be looked at."""
    names = dict.fromkeys(name for task in job.tasks if (name := _name(task)))
    for name in names:
        path = resolve(name)
        if not is_file(path):
            yield f"{name} is not there: what its container runs is not checked"
        elif _is_packed(path):
            yield f"{name} is compressed: what its container runs is looked at once it is unpacked"


def _fault(source: str, task: Task, path: Path) -> str:
    """Why a task cannot run in the container of this disk; empty when it can, or that cannot be seen yet."""
    if not is_file(path) or _is_packed(path):
        return ""
    try:
        _decide(source, task, _read(source, task, path))
    except BadInput as error:
        return str(error)
    return ""


def _is_packed(path: Path) -> bool:
    try:
        return shipped_image.packing(path) is not None
    except OSError:
        return False


def _read(source: str, task: Task, path: Path) -> ContainerDisk:
    try:
        return containerdisk.read(path)
    except BadContainerDisk as error:
        raise BadInput(_line(source, task, str(error))) from error
    except OSError as error:
        raise BadInput(_line(source, task, f"it cannot be read: {error.strerror}")) from error


def _decide(source: str, task: Task, disk: ContainerDisk, further: Sequence[str] = ()) -> ContainerCommand:
    try:
        return container.command(task, disk, further)
    except BadContainer as error:
        raise BadInput(_line(source, task, str(error))) from error


def _name(task: Task) -> str:
    return task.guest.container if task.guest is not None else ""


def _line(source: str, task: Task, why: str) -> str:
    return f"{source}:{task.line}: <container>: {_name(task)}: {why}"
