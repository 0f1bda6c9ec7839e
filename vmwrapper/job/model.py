"""What a job file says, as typed values. Pure: no file is opened here.

Source: the VmApps page, BOINC's samples/wrapper, and docs/projects/job-file.md. Filled by `vmwrapper.job.parse`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import PurePath

from vmcontrol.protocol.vm import VmSettings

NCPUS = 0
"""Of cpus in a VM's settings: as many as ncpus of init_data.xml."""
DEFAULT_CHECKPOINT_INTERVAL_S = 600.0
DEFAULT_BOOT_TIMEOUT_S = 300.0
CONTAINER_VM = "container"
"""The virtual machine of a task with container that names none: one for all of them."""
CONTAINER_FRACTION_DONE = "fraction_done"
"""fraction_done_filename of a task with container that names none."""


@dataclass(frozen=True, slots=True)
class Program:
    """What unzip tasks, VMmanage tasks and tasks have in common.

    All file names are logical names, to be resolved by the BOINC runtime when the task is about to start.
    """

    application: str
    line: int
    """Line of the element in the job file, for messages."""
    command_line: str = ""
    stdin_filename: str = ""
    stdout_filename: str = ""
    stderr_filename: str = ""
    setenv: tuple[str, ...] = ()
    """NAME=VALUE. A host task with any has these alone as its environment, as they stand, as with BOINC's wrapper."""

    @property
    def title(self) -> str:
        """What it is called in messages."""
        return self.application

    @property
    def variables(self) -> dict[str, str]:
        """setenv by name."""
        return dict(one.split("=", 1) for one in self.setenv if "=" in one)


@dataclass(frozen=True, slots=True)
class UnzipTask(Program):
    """Runs before everything else, once per slot."""


@dataclass(frozen=True, slots=True)
class VmManageTask(Program):
    """Runs beside the guest tasks: a broker, HostMain, anything else a VM needs.

    A job with guest tasks always has a HostMain: one that the job file does not name takes its defaults.
    """

    @property
    def is_host_main(self) -> bool:
        """Whether this program's own HostMain is meant (docs/projects/job-file.md)."""
        if PurePath(self.application).name == "HostMain":
            return True
        is_python = PurePath(self.application).name in ("python", "python2", "python3")
        return is_python and any(word.endswith("HostMain.py") for word in self.command_line.split())


@dataclass(frozen=True, slots=True)
class GuestOptions:
    """The elements that concern a virtual machine."""

    virtualmachine: str
    image: str = ""
    """Logical name; empty: the VM exists already."""
    copy_app_to_vm: bool = False
    app_path_vm: str = ""
    """Folder in the guest that holds the application when it is not copied."""
    copy_files_to_vm: tuple[str, ...] = ()
    copy_files_from_vm: tuple[str, ...] = ()
    hypervisor: str = "auto"
    """virtualbox, qemu or auto."""
    settings: VmSettings = field(default_factory=VmSettings)
    """cpus may be NCPUS."""
    job_duration_s: float | None = None
    minimum_checkpoint_interval_s: float = DEFAULT_CHECKPOINT_INTERVAL_S
    disable_automatic_checkpoints: bool = False
    boot_timeout_s: float = DEFAULT_BOOT_TIMEOUT_S
    cpu_time_source: str = "vm"
    """vm: CPU time of the hypervisor's processes; command: of the program in the guest."""
    trickle_trigger_files: tuple[str, ...] = ()
    container: str = field(default="", repr=False)
    """Logical name of the container's disk; empty: the program runs in the guest itself."""
    container_workdir: str = field(default="", repr=False)
    """Working folder in the container; empty: the image's own."""


class Priority(IntEnum):
    """lib/common_defs.h, PROCESS_PRIORITY_*."""

    UNSPECIFIED = 0
    """Left as it is."""
    LOWEST = 1
    LOW = 2
    NORMAL = 3
    HIGH = 4
    HIGHEST = 5


@dataclass(frozen=True, slots=True)
class HostOptions:
    """What BOINC's wrapper has for tasks on the host (samples/wrapper/wrapper.cpp, TASK)."""

    exec_dir: str = ""
    """Folder in which the program runs, with macros; empty: the slot."""
    append_cmdline_args: bool = False
    """The words after --passthrough_child go to this task too."""
    multi_process: bool = False
    """It suspends its own children badly: with --use_tstp the signal goes to all of them. (SIGSTOP always does.)"""
    forward_slashes: bool = False
    """Windows: paths that boinc_resolve() puts into the command line have forward slashes."""
    priority: Priority = Priority.LOWEST


@dataclass(frozen=True, slots=True)
class Task(Program):
    """One step of the job, or a daemon. With `guest` it runs in a virtual machine, else on the host."""

    weight: float = 1.0
    checkpoint_filename: str = ""
    fraction_done_filename: str = ""
    """On the host for a host task, in the guest for a guest task."""
    time_limit_s: float | None = None
    guest: GuestOptions | None = None
    host: HostOptions = HostOptions()
    """Means nothing when there is `guest`."""

    @property
    def title(self) -> str:
        return self.application or (self.guest.container if self.guest is not None else "")


@dataclass(frozen=True, slots=True)
class ZipOutput:
    """zip_output: files of the slot that are packed into one when all tasks are done."""

    zipfilename: str
    """Logical name of the archive."""
    patterns: tuple[str, ...] = ()
    """Regular expressions in ECMAScript's form, as std::regex reads them; one must match somewhere in a file's name."""


@dataclass(frozen=True, slots=True)
class Job:
    """A whole job file."""

    source: str
    """Name of the file, for messages."""
    digest: str
    """SHA-256 of the file's bytes, hex: a checkpoint belongs to exactly this job."""
    unzip_tasks: tuple[UnzipTask, ...] = ()
    vmmanage_tasks: tuple[VmManageTask, ...] = ()
    tasks: tuple[Task, ...] = ()
    daemons: tuple[Task, ...] = ()
    """Host tasks with `daemon`: they run beside the others and are ended after the last one."""
    unzip_inputs: tuple[str, ...] = ()
    """Logical names of archives that are unpacked into the slot before everything else, once per slot."""
    zip_output: ZipOutput | None = None
    enable_graphics_support: bool = False
    """graphics_status.xml is written once a second."""
    trickle_up_period_s: float = 0.0
    """0: none."""
    intermediate_upload_files: tuple[str, ...] = ()
    warnings: tuple[Complaint, ...] = ()

    def needs_vm(self, tasks_done: int) -> bool:
        """Whether a task after the first `tasks_done` runs in a virtual machine."""
        return any(task.guest is not None for task in self.tasks[tasks_done:])


@dataclass(frozen=True, slots=True)
class Complaint:
    """Something about the job file. `str` is the one line that people read: file, line, element, what was expected."""

    source: str
    line: int | None
    element: str
    text: str

    def __str__(self) -> str:
        where = f"{self.source}:{self.line}" if self.line is not None else self.source
        return f"{where}: <{self.element}>: {self.text}" if self.element else f"{where}: {self.text}"
