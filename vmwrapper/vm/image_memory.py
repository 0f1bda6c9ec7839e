"""Whether a VM is given the memory that its image says it needs: looked at by `check`, and before the VM is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from vmcontrol.common import imagenote
from vmwrapper.job.filenames import DESCRIPTION_SUFFIX
from vmwrapper.job.model import Job, Task
from vmwrapper.paths import is_file
from vmwrapper.vm import shipped_image


def fault(source: str, task: Task, image: Path) -> str:
    """The line for a guest task whose VM has less memory than its image needs; empty when it has enough, or nothing is
    said. image: as it is used, not compressed.
    """
    if task.guest is None or not is_file(image):
        return ""
    try:
        needed = imagenote.read(image)
    except OSError:  # it is for HostMain to say what is wrong with it
        return ""
    return _line(source, task, needed)


def faults(job: Job, resolve: Callable[[str], Path]) -> Iterator[str]:
    """Of all guest tasks, as far as the images, or the descriptions of compressed ones, are there."""
    for task in job.tasks:
        if task.guest is None or not task.guest.image:
            continue
        path = resolve(task.guest.image)
        line = fault(job.source, task, path) or _line(job.source, task, _described(resolve, task.guest.image))
        if line:
            yield line


def _described(resolve: Callable[[str], Path], image: str) -> int | None:
    name = f"{image}{DESCRIPTION_SUFFIX}"
    try:
        return shipped_image.read(resolve(name), name).memory_mb
    except shipped_image.BadShippedImage:
        return None


def _line(source: str, task: Task, needed: int | None) -> str:
    if task.guest is None:
        return ""
    words = imagenote.too_little(needed, task.guest.settings.memory_mb, task.guest.image)
    return f"{source}:{task.line}: <memory_size_mb>: {words}" if words else ""
