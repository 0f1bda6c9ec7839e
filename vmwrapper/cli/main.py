"""The command `vmwrapper`: looks at how we were started, and hands over.

Nothing heavy is imported before it is known to be needed: `check` runs without a reactor, and so does `--help`.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vmcontrol.common import slotfiles
from vmwrapper import __version__, slot
from vmwrapper.cli import console
from vmwrapper.cli.arguments import (
    USAGE,
    CheckRequest,
    ConvertRequest,
    DoctorRequest,
    LicensesRequest,
    PackageRequest,
    ShowHelp,
    ShowVersion,
    UsageError,
    parse_arguments,
)
from vmwrapper.exit_status import ExitStatus
from vmwrapper.options import RunOptions
from vmwrapper.paths import is_file, is_there
from vmwrapper.process import descriptors


def main(words: Sequence[str] | None = None) -> int:
    """The whole program; its exit status. words: without the program's name (default: those of this process)."""
    if words is None:  # else we are no program of our own
        console.be_utf8()
    console.begin()
    descriptors.raise_limit()
    try:
        return _main(sys.argv[1:] if words is None else words)
    except ModuleNotFoundError as error:
        package = (error.name or "?").partition(".")[0]
        if package in ("vmwrapper", "vmcontrol"):
            raise
        console.say(f"vmwrapper: the Python package {package} is missing: install vmwrapper with pip", sys.stderr)
        return ExitStatus.INIT_FAILURE


def _main(words: Sequence[str]) -> int:
    under_client = is_there(Path(slotfiles.INIT_DATA))
    try:
        request = parse_arguments(
            words,
            under_client=under_client,
            environment=os.environ,
            is_file=lambda word: is_file(Path(word)),
        )
    except UsageError as error:
        console.say(f"vmwrapper: {error} (vmwrapper --help says more)", sys.stderr)
        return ExitStatus.INIT_FAILURE
    match request:
        case ShowHelp() | LicensesRequest():
            return _show_text(request)
        case ShowVersion():
            return _show_version(under_client=under_client)
        case CheckRequest(job_file):
            return check(job_file)
        case PackageRequest() | ConvertRequest() | DoctorRequest() | RunOptions():
            return _run(request)


NEEDED_LATER = ("psutil",)
"""Packages that a job may need when it is half done: by what its programs leave running, for one."""


def _run(request: PackageRequest | ConvertRequest | DoctorRequest | RunOptions) -> int:
    if not _is_in_a_folder():
        console.say("vmwrapper: the folder in which it was started is gone", sys.stderr)
        return ExitStatus.INIT_FAILURE
    if isinstance(request, PackageRequest):
        from vmwrapper.cli import package

        return package.run(request.words)
    if isinstance(request, ConvertRequest):
        from vmwrapper.cli import convert

        return convert.run(request.words)
    if isinstance(request, DoctorRequest):
        from vmwrapper.cli import doctor

        return doctor.run()
    _look_for_packages()
    gc.disable()  # a thousand new classes and functions: nothing of it is garbage, and looking takes time
    from vmwrapper.run import run

    gc.freeze()
    gc.enable()
    return run.run(request)


def _look_for_packages() -> None:
    """Raise ModuleNotFoundError for one of NEEDED_LATER, without the time that importing it takes."""
    from importlib.util import find_spec

    for name in NEEDED_LATER:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def check(job_file: Path | None) -> int:
    """Say everything that is wrong with a job file, one line each, on stderr; 0 when nothing is, else 206."""
    from vmwrapper.context.logical_names import LogicalNames
    from vmwrapper.errors import BadInput
    from vmwrapper.job import parse
    from vmwrapper.vm import container_check, image_memory

    names = LogicalNames(slot.Slot(Path()))
    path = job_file or names.resolve(slotfiles.JOB_FILE)
    try:
        findings = parse.examine_file(path, str(path))
    except BadInput as error:
        console.say(str(error), sys.stderr)
        return ExitStatus.INIT_FAILURE
    for complaint in findings.complaints:
        console.say(str(complaint), sys.stderr)
    if findings.job is None or findings.complaints:
        return ExitStatus.INIT_FAILURE
    job = findings.job
    for note in container_check.notes(job, names.resolve):
        console.say(f"note: {note}", sys.stderr)
    if faults := [*image_memory.faults(job, names.resolve), *container_check.faults(job, names.resolve)]:
        for fault in faults:
            console.say(fault, sys.stderr)
        return ExitStatus.INIT_FAILURE
    guests = sum(task.guest is not None for task in job.tasks)
    console.say(
        f"{path}: good: {len(job.unzip_tasks)} unzip tasks, {len(job.vmmanage_tasks)} VMmanage tasks, "
        f"{len(job.tasks)} tasks, {guests} of them in a virtual machine",
        sys.stdout,
    )
    return ExitStatus.DONE


def _show_text(request: ShowHelp | LicensesRequest) -> int:
    if isinstance(request, ShowHelp):
        console.say(USAGE.rstrip("\n"), sys.stdout)
    else:
        from vmwrapper.cli import licenses

        console.say(licenses.text().rstrip("\n"), sys.stdout)
    return ExitStatus.DONE


def _show_version(*, under_client: bool) -> int:
    """As BOINC's wrapper does: under a client the version goes to stderr.txt and the job counts as done."""
    console.say(f"vmwrapper {__version__}", sys.stderr if under_client else sys.stdout)
    if under_client:
        from vmwrapper.boinc import files

        files.write_finish_file(Path(), ExitStatus.DONE)
    return ExitStatus.DONE


def _is_in_a_folder() -> bool:
    try:
        return bool(os.getcwd())  # noqa: PTH109 (there is nothing else to ask)
    except OSError:
        return False
