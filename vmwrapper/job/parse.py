"""From the bytes of job.xml to a `Job`. docs/job-file.md describes every element.

`parse` is what running a job uses: a Job, or BadInput with the first error. `examine` is what `vmwrapper check` uses:
everything that is wrong. Neither opens a file; `read` does, and bounds its size.
"""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TypedDict

from lxml import etree

from vmwrapper.errors import BadInput
from vmwrapper.job import commandline, guestfields, macros, names, xmltext
from vmwrapper.job.model import Complaint, HostOptions, Job, Priority, Task, UnzipTask, VmManageTask, ZipOutput
from vmwrapper.job.patterns import BadPattern, compile_pattern
from vmwrapper.job.reader import Complaints, Fields, line_of
from vmwrapper.job.vmsettings import GivenSettings, unite

MAX_SECONDS = 1e9
"""Thirty years: longer than any task, and far from where floats lose seconds."""
MAX_WEIGHT = 1e12

HOST_BOOLEANS = ("daemon", "append_cmdline_args", "multi_process", "forward_slashes")
HOST_ONLY = frozenset((*HOST_BOOLEANS, "exec_dir", "priority"))
"""Elements of BOINC's wrapper that only a task on the host has."""
TASK_ONLY = frozenset(("weight", "checkpoint_filename", "fraction_done_filename", "time_limit"))
PROGRAM = frozenset(("application", "command_line", "stdin_filename", "stdout_filename", "stderr_filename", "setenv"))
JOB_ELEMENTS = frozenset(
    (
        *("task", "unzip_task", "VMmanage_task", "unzip_input", "zip_output", "enable_graphics_support"),
        *("trickle_up_period", "intermediate_upload_file"),
    )
)
KNOWN = PROGRAM | TASK_ONLY | HOST_ONLY | JOB_ELEMENTS | guestfields.NAMES | {"job_desc", "zipfilename", "filename"}
"""Elements that have to be closed, however much else is forgiven."""


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


def read(path: Path) -> bytes:
    """The bytes of a job file. Raises BadInput when it cannot be read; stops reading where a file is too large."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would make us wait for ever, and deaf to the client
            raise BadInput(f"{path}: the job file cannot be read: it is no regular file")
        with path.open("rb") as file:
            return file.read(xmltext.MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadInput(f"{path}: the job file cannot be read: {reason}") from error


def parse(content: bytes, source: str) -> Job:
    """The job, its warnings in `Job.warnings`. source: name of the file, for messages.

    Raises BadInput, with file, line and element of the first error, and what was expected there; nothing else.
    """
    findings = examine(content, source)
    if findings.job is None:
        more = len(findings.errors) - 1
        raise BadInput(str(findings.errors[0]) + (f" (and {more} more; see `vmwrapper check`)" if more else ""))
    return findings.job


def examine(content: bytes, source: str) -> Findings:
    """Everything that is wrong with a job file. Raises nothing, whatever the bytes are."""
    complaints = Complaints(source)
    job: Job | None = None
    try:
        document = xmltext.parse_document(content, KNOWN)
    except xmltext.NotXml as error:
        complaints.error(error.line, "", str(error))
    else:
        for line, text in document.warnings:
            complaints.warn(line, "", text)
        job = _read_job(document.root, hashlib.sha256(content).hexdigest(), complaints)
    errors = tuple(sorted(complaints.errors, key=lambda complaint: complaint.line or 0))
    warnings = tuple(sorted(complaints.warnings, key=lambda complaint: complaint.line or 0))
    if job is None or errors:
        return Findings(None, errors, warnings)
    return Findings(replace(job, warnings=warnings), errors, warnings)


def _read_job(root: etree._Element, digest: str, complaints: Complaints) -> Job | None:
    if root.tag != "job_desc":
        complaints.error(line_of(root), str(root.tag), "expected <job_desc> as the outermost element")
        return None
    fields = Fields(root, complaints)
    tasks, daemons = _read_tasks(fields, complaints)
    job = Job(
        source=complaints.source,
        digest=digest,
        unzip_tasks=tuple(_read_unzip_task(element, complaints) for element in fields.elements("unzip_task")),
        vmmanage_tasks=tuple(_read_vmmanage_task(element, complaints) for element in fields.elements("VMmanage_task")),
        tasks=tasks,
        daemons=daemons,
        unzip_inputs=_read_unzip_inputs(fields, complaints),
        zip_output=_read_zip_output(fields, complaints),
        enable_graphics_support=fields.boolean("enable_graphics_support") or False,
        trickle_up_period_s=fields.number("trickle_up_period", unit="seconds", minimum=0, maximum=MAX_SECONDS) or 0.0,
        intermediate_upload_files=fields.texts("intermediate_upload_file", names.fault_of_slot_name),
    )
    fields.complain_about_others()
    _check_host_main(job, complaints)
    if not job.tasks:
        fields.warn("job_desc", fields.line, "has no <task>: there is nothing to do")
    return job


def _check_host_main(job: Job, complaints: Complaints) -> None:
    """Exactly one HostMain drives the virtual machines of a job; without one none could ever start."""
    host_mains = [task for task in job.vmmanage_tasks if task.is_host_main]
    first_guest = next((task for task in job.tasks if task.guest is not None), None)
    if first_guest is not None and not host_mains:
        complaints.error(
            first_guest.line,
            "virtualmachine",
            "expected a <VMmanage_task> whose application is HostMain: nothing else can run a virtual machine",
        )
    for host_main in host_mains:
        words = commandline.split(host_main.command_line)
        if all(PurePath(word).name == "HostMain.py" for word in words):
            complaints.error(host_main.line, "command_line", "expected the name of HostMain's configuration file")
    for extra in host_mains[1:]:
        complaints.error(extra.line, "VMmanage_task", "expected one HostMain only; another stands above")


def _read_unzip_inputs(fields: Fields, complaints: Complaints) -> tuple[str, ...]:
    found: list[str] = []
    for element in fields.elements("unzip_input"):
        inside = Fields(element, complaints)
        found += inside.texts("zipfilename", names.fault_of_any_name)
        if not inside.has("zipfilename"):
            inside.error("unzip_input", inside.line, "expected a <zipfilename>, the name of an archive")
        inside.complain_about_others()
    return tuple(dict.fromkeys(found))


def _read_zip_output(fields: Fields, complaints: Complaints) -> ZipOutput | None:
    """Of several elements, as in BOINC's wrapper: the last zipfilename, and all patterns."""
    zipfilename = ""
    patterns: list[str] = []
    for element in fields.elements("zip_output"):
        inside = Fields(element, complaints)
        zipfilename = inside.required("zipfilename", "the name of the archive", names.fault_of_any_name)
        patterns += inside.texts("filename", _fault_of_pattern)
        if not inside.has("filename"):
            inside.warn("zip_output", inside.line, "has no <filename>: nothing will be in the archive")
        inside.complain_about_others()
    return ZipOutput(zipfilename, tuple(patterns)) if zipfilename else None


def _fault_of_pattern(text: str) -> str | None:
    try:
        compile_pattern(text)
    except BadPattern as error:
        return f"expected a regular expression, not {text[:100]!r}: {error}"
    return None


def _read_unzip_task(element: etree._Element, complaints: Complaints) -> UnzipTask:
    fields = Fields(element, complaints)
    task = UnzipTask(**_read_program(fields))
    fields.complain_about_others(TASK_ONLY | HOST_ONLY | guestfields.NAMES)
    return task


def _read_vmmanage_task(element: etree._Element, complaints: Complaints) -> VmManageTask:
    fields = Fields(element, complaints)
    task = VmManageTask(**_read_program(fields))
    fields.complain_about_others(TASK_ONLY | HOST_ONLY | guestfields.NAMES)
    return task


def _read_tasks(fields: Fields, complaints: Complaints) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """The tasks with all that belongs to their virtual machines, and the daemons."""
    tasks, daemons = [], []
    for element in fields.elements("task"):
        task, given, is_daemon = _read_task(element, complaints)
        if is_daemon:
            daemons.append(task)
        else:
            tasks.append((task, given))
    return unite(tasks, complaints), tuple(daemons)


def _read_task(element: etree._Element, complaints: Complaints) -> tuple[Task, GivenSettings, bool]:
    fields = Fields(element, complaints)
    weight = fields.number("weight", unit="a number", minimum=0, maximum=MAX_WEIGHT)
    task = Task(
        **_read_program(fields),
        weight=1.0 if weight is None else weight,
        checkpoint_filename=fields.text("checkpoint_filename", names.fault_of_any_name),
        fraction_done_filename=fields.text("fraction_done_filename", names.fault_of_any_name),
        time_limit_s=fields.number("time_limit", unit="seconds", minimum=0, maximum=MAX_SECONDS) or None,
    )
    virtualmachine = fields.text("virtualmachine", names.fault_of_vm_name)
    if virtualmachine:
        guest, given = guestfields.read(fields, virtualmachine, task)
        fields.complain_about_others(HOST_ONLY)
        return replace(task, guest=guest), given, False
    host, is_daemon = _read_host_options(fields)
    _check_resolve(fields, task.command_line)
    fields.complain_about_others(guestfields.NAMES)
    return replace(task, host=host), GivenSettings(), is_daemon


def _read_host_options(fields: Fields) -> tuple[HostOptions, bool]:
    given = {name: fields.boolean(name) or False for name in HOST_BOOLEANS}
    priority = fields.integer("priority", unit="a whole number", minimum=0, maximum=int(Priority.HIGHEST))
    options = HostOptions(
        exec_dir=fields.text("exec_dir", names.fault_of_any_name),
        append_cmdline_args=given["append_cmdline_args"],
        multi_process=given["multi_process"],
        forward_slashes=given["forward_slashes"],
        priority=Priority.LOWEST if priority is None else Priority(priority),
    )
    return options, given["daemon"]


def _check_resolve(fields: Fields, command_line: str) -> None:
    try:
        macros.resolve(command_line, lambda name: name)
    except macros.OpenMacro as error:
        fields.error("command_line", fields.line_of("command_line"), f"expected {error}".replace("without", "with its"))


class _ProgramFields(TypedDict):
    application: str
    line: int
    command_line: str
    stdin_filename: str
    stdout_filename: str
    stderr_filename: str
    setenv: tuple[tuple[str, str], ...]


def _read_program(fields: Fields) -> _ProgramFields:
    return _ProgramFields(
        application=fields.required("application", "the name of a program", names.fault_of_any_name),
        line=fields.line,
        command_line=fields.text("command_line"),
        stdin_filename=fields.text("stdin_filename", names.fault_of_any_name),
        stdout_filename=fields.text("stdout_filename", names.fault_of_any_name),
        stderr_filename=fields.text("stderr_filename", names.fault_of_any_name),
        setenv=tuple(_split_variable(value.text) for value in fields.values("setenv", _fault_of_variable)),
    )


def _fault_of_variable(text: str) -> str | None:
    name, equals, _ = text.partition("=")
    return None if name.strip() and equals else f"expected NAME=VALUE, not {text[:100]!r}"


def _split_variable(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value
