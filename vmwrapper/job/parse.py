"""From the bytes of job.xml to a `Job`. docs/projects/job-file.md describes every element.

`parse_file` is what running a job uses: a Job, or BadInput with the first error. `examine_file` is what `vmwrapper
check` uses: everything that is wrong. Both read the file as a stream: what stays is the tasks. `parse` and `examine`
are the same for bytes.
"""

from __future__ import annotations

import hashlib
import io
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from vmwrapper import cvalues
from vmwrapper.errors import BadInput
from vmwrapper.job import filenames, guestfields, hostfields, names
from vmwrapper.job.complaints import Complaints
from vmwrapper.job.elements import Element, How, Level, NotAJob, Read, read_job
from vmwrapper.job.hostfields import HOST_ONLY, MAX_SECONDS, PROGRAM, TASK_ONLY
from vmwrapper.job.model import (
    CONTAINER_FRACTION_DONE,
    CONTAINER_VM,
    Complaint,
    Job,
    Task,
    UnzipTask,
    VmManageTask,
)
from vmwrapper.job.reader import Fields
from vmwrapper.job.vmsettings import GivenSettings, unite

MAX_BYTES = 64 * 1024 * 1024
"""A job file of the page has 2 kB, one with five thousand tasks 1.2 MB."""
MAX_WEIGHT = 1e12
"""Of a guest task."""

_TASK = Level.of(
    HOST_ONLY | TASK_ONLY | PROGRAM | guestfields.NAMES - {"port_forward"},
    {"port_forward": Level.of(("guest_port", "host_port", "is_remote"))},
    hostfields.NUMBERS,
)
_JOB = Level.of(
    ("enable_graphics_support", "trickle_up_period", "intermediate_upload_file"),
    {
        **dict.fromkeys(("task", "unzip_task", "VMmanage_task"), _TASK),
        "unzip_input": Level.of(("zipfilename",)),
        "zip_output": Level.of(("zipfilename", "filename")),
    },
    {"enable_graphics_support": cvalues.boolean},
)
JOB_ELEMENTS = frozenset(_JOB.leaves.values()) | frozenset(_JOB.elements)


@dataclass(frozen=True, slots=True)
class Findings:
    """What examine found. job is None when there are errors."""

    job: Job | None
    errors: tuple[Complaint, ...]
    warnings: tuple[Complaint, ...]

    @property
    def complaints(self) -> list[Complaint]:
        """Errors and warnings in the order of the file."""
        return sorted((*self.errors, *self.warnings), key=lambda complaint: complaint.line or 0)


def parse_file(path: Path, source: str) -> Job:
    """The job, its warnings in `Job.warnings`. source: name of the file, for messages.

    Raises BadInput, with file, line and element of the first error, and what was expected there; nothing else.
    """
    return _job_of(examine_file(path, source))


def parse(content: bytes, source: str) -> Job:
    """As parse_file."""
    return _job_of(examine(content, source))


def examine_file(path: Path, source: str) -> Findings:
    """Everything that is wrong with a job file. Raises BadInput when it cannot be read, and nothing else."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would make us wait for ever, and deaf to the client
            raise BadInput(f"{path}: the job file cannot be read: it is no regular file")
        with path.open("rb") as file:
            return _examine(file.read, source)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadInput(f"{path}: the job file cannot be read: {reason}") from error


def examine(content: bytes, source: str) -> Findings:
    """Everything that is wrong with a job file. Raises nothing, whatever the bytes are."""
    return _examine(io.BytesIO(content).read, source)


def _job_of(findings: Findings) -> Job:
    if findings.job is None:
        more = len(findings.errors) - 1
        raise BadInput(str(findings.errors[0]) + (f" (and {more} more; see `vmwrapper check`)" if more else ""))
    return findings.job


class _Counted:
    """Reads a file, with its size and SHA-256."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._size = 0
        self._digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        piece = self._read(size)
        self._size += len(piece)
        if self._size > MAX_BYTES:
            raise NotAJob(f"is larger than {MAX_BYTES} bytes", None)
        self._digest.update(piece)
        return piece

    def digest(self) -> str:
        """Of the whole file. Raises NotAJob."""
        while self.read(1 << 16):
            pass
        return self._digest.hexdigest()


def _examine(read: Callable[[int], bytes], source: str) -> Findings:
    complaints = Complaints(source)
    job: Job | None = None
    file = _Counted(read)
    try:
        job = _read_job(file, complaints)
        job = replace(job, digest=file.digest())
    except NotAJob as error:
        job = None
        complaints.error(error.line, "", str(error))
    errors, warnings = complaints.sorted_errors(), complaints.sorted_warnings()
    if job is None or errors:
        return Findings(None, errors, warnings)
    return Findings(replace(job, warnings=warnings), errors, warnings)


def _read_job(file: _Counted, complaints: Complaints) -> Job:
    top = Element("job_desc", 1)
    tasks: list[Task] = []
    daemons: list[Task] = []
    given: dict[int, GivenSettings] = {}
    for child in read_job(file.read, _JOB, complaints):
        if not isinstance(child, Element) or child.name != "task":
            top.add(child)
        elif _is_guest(child):
            task, given[len(tasks)] = _read_guest_task(child, complaints)
            tasks.append(task)
        else:
            task, is_daemon = hostfields.read_task(child, complaints)
            (daemons if is_daemon else tasks).append(task)
    return _job(top, unite(tasks, given, complaints), tuple(daemons), complaints)


def _job(top: Element, tasks: tuple[Task, ...], daemons: tuple[Task, ...], complaints: Complaints) -> Job:
    fields = Fields(top, complaints)
    job = Job(
        source=complaints.source,
        digest="",
        unzip_tasks=tuple(_read_unzip_task(element, complaints) for element in fields.elements("unzip_task")),
        vmmanage_tasks=tuple(_read_vmmanage_task(element, complaints) for element in fields.elements("VMmanage_task")),
        tasks=tasks,
        daemons=daemons,
        unzip_inputs=hostfields.read_unzip_inputs(fields.elements("unzip_input"), complaints),
        zip_output=hostfields.read_zip_output(fields.elements("zip_output"), complaints),
        enable_graphics_support=_wants_graphics(fields, complaints),
        trickle_up_period_s=fields.number("trickle_up_period", unit="seconds", minimum=0, maximum=MAX_SECONDS) or 0.0,
        intermediate_upload_files=fields.texts(
            "intermediate_upload_file",  # a guest's comes into the slot before it is uploaded
            names.fault_of_written_name if any(task.guest for task in tasks) else names.fault_of_slot_name,
        ),
    )
    fields.complain_about_others(JOB_ELEMENTS)
    _check_host_main(job, complaints)
    job = _with_host_main(job)
    _check_our_files(job, complaints)
    if not job.tasks:
        fields.warn("job_desc", fields.line, "has no <task>: there is nothing to do")
    return job


def _wants_graphics(fields: Fields, complaints: Complaints) -> bool:
    values = [hostfields.read_boolean(leaf, complaints) for leaf in fields.leaves("enable_graphics_support")]
    return next((value for value in reversed(values) if value is not None), False)


def _is_guest(task: Element) -> bool:
    """Whether it names a virtual machine or a container, well or badly."""
    return any(leaf.name in ("virtualmachine", "container") and leaf.text for leaf in task.leaves)


def _check_our_files(job: Job, complaints: Complaints) -> None:
    """Nothing that a program says is written into a file by which vmwrapper lives."""

    def check(line: int | None, element: str, name: str) -> None:
        if name and (fault := names.fault_of_our_name(name)):
            complaints.error(line, element, fault)

    for programs in (job.unzip_tasks, job.vmmanage_tasks, job.daemons, job.tasks):
        for program in programs:
            check(program.line, "stdout_filename", program.stdout_filename)
            check(program.line, "stderr_filename", program.stderr_filename)
    if job.zip_output is not None:
        check(None, "zip_output", job.zip_output.zipfilename)
    _check_disks(job, complaints)


def _check_disks(job: Job, complaints: Complaints) -> None:
    """Nothing that comes out of a guest, and no archive, is written into the disk of a container."""
    disks = filenames.container_disks(job)
    if not disks:
        return
    for task in job.tasks:
        if task.guest is not None:
            outputs = [("stdout_filename", task.stdout_filename), ("stderr_filename", task.stderr_filename)]
            outputs += [("copy_file_from_VM", name) for name in task.guest.copy_files_from_vm]
            for element, name in outputs:
                if name and filenames.plain(name) in disks:
                    complaints.error(task.line, element, f"expected another name than {name!r}, a container's disk")
    others = [("intermediate_upload_file", name) for name in job.intermediate_upload_files]
    if job.zip_output is not None:
        others.append(("zip_output", job.zip_output.zipfilename))
    for element, name in others:
        if filenames.plain(name) in disks:
            complaints.error(None, element, f"expected another name than {name!r}, a container's disk")


def _check_host_main(job: Job, complaints: Complaints) -> None:
    """One HostMain drives all virtual machines of a job."""
    host_mains = [task for task in job.vmmanage_tasks if task.is_host_main]
    for extra in host_mains[1:]:
        complaints.error(extra.line, "VMmanage_task", "expected one HostMain only; another stands above")


def _with_host_main(job: Job) -> Job:
    """The job with a HostMain, after the other VMmanage tasks, if it has guest tasks and names none."""
    first_guest = next((task for task in job.tasks if task.guest is not None), None)
    if first_guest is None or any(task.is_host_main for task in job.vmmanage_tasks):
        return job
    host_main = VmManageTask(application="HostMain", line=first_guest.line)
    return replace(job, vmmanage_tasks=(*job.vmmanage_tasks, host_main))


def _read_unzip_task(element: Element, complaints: Complaints) -> UnzipTask:
    fields = Fields(element, complaints)
    task = UnzipTask(**_read_program(fields))
    fields.complain_about_others()
    return task


def _read_vmmanage_task(element: Element, complaints: Complaints) -> VmManageTask:
    fields = Fields(element, complaints)
    task = VmManageTask(**_read_program(fields))
    fields.complain_about_others()
    return task


def _read_guest_task(element: Element, complaints: Complaints) -> tuple[Task, GivenSettings]:
    """A task in a virtual machine. All of it is strict: BOINC's wrapper has no such tasks."""
    for leaf in element.leaves:
        if leaf.how is How.TEXT and not _is_utf8(leaf.text):
            complaints.error(leaf.line, leaf.name, "expected UTF-8: in a guest task names and words are no mere bytes")
    fields = Fields(element, complaints)
    weight = fields.number("weight", unit="a number", minimum=0, maximum=MAX_WEIGHT)
    in_container = fields.has("container")
    task = Task(
        **_read_program(fields, has_own_program=in_container),
        weight=1.0 if weight is None else weight,
        checkpoint_filename=fields.text("checkpoint_filename", names.fault_of_any_name),
        fraction_done_filename=fields.text("fraction_done_filename", names.fault_of_any_name)
        or (CONTAINER_FRACTION_DONE if in_container else ""),
        time_limit_s=fields.number("time_limit", unit="seconds", minimum=0, maximum=MAX_SECONDS) or None,
    )
    virtualmachine = fields.text("virtualmachine", names.fault_of_vm_name) or (CONTAINER_VM if in_container else "")
    guest, given = guestfields.read(fields, virtualmachine, task)
    fields.complain_about_others()
    return replace(task, guest=guest), given


def _is_utf8(text: str) -> bool:
    try:
        return bool(text.encode("utf-8"))
    except UnicodeEncodeError:
        return False


class _ProgramFields(TypedDict):
    application: str
    line: int
    command_line: str
    stdin_filename: str
    stdout_filename: str
    stderr_filename: str
    setenv: tuple[str, ...]


def _read_program(fields: Fields, *, has_own_program: bool = False) -> _ProgramFields:
    """has_own_program: what runs may be known without application, as that of a container."""
    return _ProgramFields(
        application=fields.text("application", names.fault_of_any_name)
        if has_own_program
        else fields.required("application", "the name of a program", names.fault_of_any_name),
        line=fields.line,
        command_line=fields.text("command_line"),
        stdin_filename=fields.text("stdin_filename", names.fault_of_any_name),
        stdout_filename=fields.text("stdout_filename", names.fault_of_any_name),
        stderr_filename=fields.text("stderr_filename", names.fault_of_any_name),
        setenv=tuple(value.text for value in fields.values("setenv", _fault_of_variable)),
    )


def _fault_of_variable(text: str) -> str | None:
    name, equals, _ = text.partition("=")
    return None if name.strip() and equals else f"expected NAME=VALUE, not {text[:100]!r}"
