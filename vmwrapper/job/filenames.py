"""Every logical name that a job file mentions, and those that a guest's files get. Pure."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import PurePath, PurePosixPath

from vmwrapper.job import commandline, macros
from vmwrapper.job.model import Job, Program, Task

DESCRIPTION_SUFFIX = ".json"
"""After the logical name of an image, or of a container's disk: the logical name of its description."""


def mentioned(job: Job) -> set[str]:
    """Logical names, as they are written."""
    found = {*job.unzip_inputs, *job.intermediate_upload_files}
    if job.zip_output is not None:
        found.add(job.zip_output.zipfilename)
    for program in (*job.unzip_tasks, *job.vmmanage_tasks, *job.daemons, *job.tasks):
        found |= set(_of_program(program))
    return {name for name in found if name}


def _of_program(program: Program) -> Iterator[str]:
    yield program.application
    yield from (program.stdin_filename, program.stdout_filename, program.stderr_filename)
    words = commandline.split(program.command_line)
    yield from (word for word in words if word.startswith(commandline.FILE_PREFIX))
    yield from _resolved(program.command_line)
    if not isinstance(program, Task):
        yield from words  # a VMmanage task's configuration
        return
    yield program.checkpoint_filename
    if program.guest is None:
        yield program.fraction_done_filename
        return
    yield from (*program.guest.copy_files_to_vm, *program.guest.copy_files_from_vm)
    if program.guest.image:
        yield program.guest.image
        yield program.guest.image + DESCRIPTION_SUFFIX
    if program.guest.container:
        yield program.guest.container
        yield program.guest.container + DESCRIPTION_SUFFIX


def _resolved(command_line: str) -> list[str]:
    names: list[str] = []

    def note(name: str) -> str:
        names.append(name)
        return ""

    with contextlib.suppress(macros.OpenMacro):  # the parser has complained, or the program will
        macros.resolve(command_line, note)
    return names


def container_disks(job: Job) -> set[str]:
    """Those of the disks of containers and of their descriptions, as `plain` gives them."""
    disks = {task.guest.container for task in job.tasks if task.guest is not None and task.guest.container}
    return {plain(name + suffix) for name in disks for suffix in ("", DESCRIPTION_SUFFIX)}


def plain(name: str) -> str:
    """A name by which the same file is told on every system: case does not count, nor does `./`."""
    return str(PurePosixPath(name)).casefold()


def written_by_guests(job: Job) -> set[str]:
    """Those under which something that came out of a guest is written."""
    found: set[str] = set()
    for task in job.tasks:
        if task.guest is not None:
            found |= {task.stdout_filename, task.stderr_filename, *task.guest.copy_files_from_vm}
            found |= set(job.intermediate_upload_files)
    return {name for name in found if name}


def configurations(job: Job) -> set[str]:
    """Names of HostMain's configuration."""
    return {
        word
        for task in job.vmmanage_tasks
        if task.is_host_main
        for word in commandline.split(task.command_line)
        if PurePath(word).name != "HostMain.py"
    }
