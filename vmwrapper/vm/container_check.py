"""Whether a task can run in the container of its disk, as far as the disk's header says it. No reactor.

fault, faults   why not; before anything starts, and for `vmwrapper check` and `package`
notes           what could not be looked at
read, decide    the same with BadInput
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vmcontrol.common import containerdisk
from vmcontrol.common.containerdisk import BadContainerDisk, ContainerDisk
from vmwrapper.errors import BadInput
from vmwrapper.job.model import Job, Task
from vmwrapper.paths import is_file
from vmwrapper.vm import container, shipped_image
from vmwrapper.vm.container import BadContainer, ContainerCommand


def faults(job: Job, resolve: Callable[[str], Path]) -> Iterator[str]:
    """What keeps tasks from running in their containers, as far as the disks are there."""
    for task in job.tasks:
        if (logical := name(task)) and (line := fault(job.source, task, resolve(logical))):
            yield line


def notes(job: Job, resolve: Callable[[str], Path]) -> Iterator[str]:
    """Of disks that cannot be looked at."""
    for logical in dict.fromkeys(logical for task in job.tasks if (logical := name(task))):
        path = resolve(logical)
        if not is_file(path):
            yield f"{logical} is not there: what its container runs is not checked"
        elif _is_packed(path):
            yield f"{logical} is compressed: what its container runs is looked at once it is unpacked"


def fault(source: str, task: Task, path: Path) -> str:
    """Why a task cannot run in the container of this disk; empty when it can, or that cannot be seen yet."""
    if not is_file(path) or _is_packed(path):
        return ""
    try:
        decide(source, task, read(source, task, path))
    except BadInput as error:
        return str(error)
    return ""


def _is_packed(path: Path) -> bool:
    try:
        return shipped_image.packing(path) is not None
    except OSError:
        return False


def read(source: str, task: Task, path: Path) -> ContainerDisk:
    """Raises BadInput."""
    try:
        return containerdisk.read(path)
    except BadContainerDisk as error:
        raise BadInput(line(source, task, str(error))) from error
    except OSError as error:
        raise BadInput(line(source, task, f"it cannot be read: {error.strerror}")) from error


def decide(source: str, task: Task, disk: ContainerDisk, further: Sequence[str] = ()) -> ContainerCommand:
    """What a task runs. Raises BadInput."""
    try:
        return container.command(task, disk, further)
    except BadContainer as error:
        raise BadInput(line(source, task, str(error))) from error


def name(task: Task) -> str:
    """Logical name of the disk of its container; empty: it has none."""
    return task.guest.container if task.guest is not None else ""


def line(source: str, task: Task, why: str) -> str:
    """What is wrong with the disk, for people."""
    return f"{source}:{task.line}: <container>: {name(task)}: {why}"
