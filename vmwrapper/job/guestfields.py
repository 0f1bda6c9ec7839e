"""The elements of a task that runs in a virtual machine (docs/projects/job-file.md, "Guest tasks")."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePosixPath

from vmcontrol.protocol.container import check_workdir
from vmcontrol.protocol.handshake import AGENT_PORT
from vmcontrol.protocol.vm import NETWORK_MODES, PortForward
from vmcontrol.protocol.vmlimits import MEMORY_MB, MOST_CPUS
from vmwrapper.job import names
from vmwrapper.job.complaints import Complaints
from vmwrapper.job.elements import Element
from vmwrapper.job.model import (
    DEFAULT_BOOT_TIMEOUT_S,
    DEFAULT_CHECKPOINT_INTERVAL_S,
    NCPUS,
    GuestOptions,
    Task,
)
from vmwrapper.job.reader import Fields
from vmwrapper.job.vmsettings import GivenSettings

NAMES = frozenset(
    (
        "virtualmachine",
        "image",
        "container",
        "container_workdir",
        "app_pathVM",
        "copy_app_to_VM",
        "copy_file_to_VM",
        "copy_file_from_VM",
        "copy_stdin_to_VM",
        "hypervisor",
        "os_name",
        "memory_size_mb",
        "cpus",
        "enable_network",
        "network_mode",
        "port_forward",
        "enable_remotedesktop",
        "job_duration",
        "minimum_checkpoint_interval",
        "disable_automatic_checkpoints",
        "boot_timeout",
        "cpu_time_source",
        "trickle_trigger_file",
    )
)
"""Every element that only a guest task has."""

MAX_SECONDS = 1e9

HYPERVISORS = ("auto", "virtualbox", "qemu")
CPU_TIME_SOURCES = ("vm", "command")

_OS_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def read(fields: Fields, virtualmachine: str, task: Task) -> tuple[GuestOptions, GivenSettings]:
    """The guest options of a task, and which of the VM's settings this task gives itself."""
    given = GivenSettings()
    copy_app = fields.boolean("copy_app_to_VM") or False
    fields.boolean("copy_stdin_to_VM")  # stdin_filename is copied anyway
    interval = fields.number("minimum_checkpoint_interval", unit="seconds", minimum=0, maximum=MAX_SECONDS)
    boot_timeout = fields.number("boot_timeout", unit="seconds", above=0, maximum=MAX_SECONDS)
    from_vm = fields.texts("copy_file_from_VM", names.fault_of_written_name)
    options = GuestOptions(
        virtualmachine=virtualmachine,
        copy_app_to_vm=copy_app,
        app_path_vm=fields.text("app_pathVM", names.fault_of_any_name),
        copy_files_to_vm=fields.texts("copy_file_to_VM", names.fault_of_slot_name),
        # The page lists stdout_filename among the files to copy; it comes by itself, as the program's output.
        copy_files_from_vm=tuple(
            name for name in from_vm if not _same(name, task.stdout_filename) and not _same(name, task.stderr_filename)
        ),
        job_duration_s=fields.number("job_duration", unit="seconds", above=0, maximum=MAX_SECONDS),
        minimum_checkpoint_interval_s=DEFAULT_CHECKPOINT_INTERVAL_S if interval is None else interval,
        disable_automatic_checkpoints=fields.boolean("disable_automatic_checkpoints") or False,
        boot_timeout_s=DEFAULT_BOOT_TIMEOUT_S if boot_timeout is None else boot_timeout,
        cpu_time_source=fields.choice("cpu_time_source", CPU_TIME_SOURCES) or "vm",
        trickle_trigger_files=fields.texts("trickle_trigger_file", names.fault_of_any_name),
        container=fields.text("container", names.fault_of_slot_name),
        container_workdir=fields.text("container_workdir", _fault_of_workdir),
    )
    _check_container(fields, task)
    _read_vm_settings(fields, given)
    _check_files(fields, task, copy_app=copy_app)
    return given.applied_to(options), given


def _check_container(fields: Fields, task: Task) -> None:
    """What only a container can be without, and what only a container has."""
    if not fields.has("container"):
        if fields.has("container_workdir"):
            fields.warn("container_workdir", fields.line_of("container_workdir"), "means nothing without <container>")
        return
    if not task.application:
        for element in ("copy_app_to_VM", "app_pathVM"):
            if fields.has(element) or (element == "copy_app_to_VM" and fields.boolean(element)):
                fields.error(element, fields.line_of(element), "expected an <application> with it")


def _fault_of_workdir(text: str) -> str | None:
    try:
        check_workdir(text)
    except ValueError as error:
        return f"expected an absolute folder in the container: {error}"
    return names.fault_of_any_name(text)


def _read_vm_settings(fields: Fields, given: GivenSettings) -> None:
    """What belongs to the virtual machine rather than to one task on it."""

    def give(setting: str, element: str, value: object) -> None:
        if value is not None:
            given.give(setting, value, element, fields.line_of(element))

    give("image", "image", fields.text("image", names.fault_of_any_name) or None)
    give("hypervisor", "hypervisor", fields.choice("hypervisor", HYPERVISORS))
    give("os_type", "os_name", fields.text("os_name", _fault_of_os_name) or None)
    give(
        "memory_mb",
        "memory_size_mb",
        fields.integer("memory_size_mb", unit="a whole number of MiB", minimum=MEMORY_MB[0], maximum=MEMORY_MB[-1]),
    )
    if fields.text("cpus").lower() == "ncpus":
        given.give("cpus", NCPUS, "cpus", fields.line_of("cpus"))
    else:
        give("cpus", "cpus", fields.integer("cpus", unit="ncpus, or a whole number", minimum=1, maximum=MOST_CPUS))
    give("network", "enable_network", fields.boolean("enable_network"))
    give("network_mode", "network_mode", fields.choice("network_mode", NETWORK_MODES))
    give("remote_desktop", "enable_remotedesktop", fields.boolean("enable_remotedesktop"))
    give("port_forwards", "port_forward", _read_port_forwards(fields) or None)


def _read_port_forwards(fields: Fields) -> tuple[PortForward, ...]:
    forwards: list[PortForward] = []
    taken: set[tuple[str, int]] = set()
    for element in fields.elements("port_forward"):
        forward = _read_port_forward(element, fields.complaints)
        if forward is None:
            continue
        forwards.append(forward)
        ports = {("guest_port", forward.guest_port), ("host_port", forward.host_port)} - {("host_port", 0)}
        for name, port in sorted(ports & taken):
            fields.error("port_forward", element.line, f"expected each {name} once, but {port} comes again")
        taken |= ports
    return tuple(forwards)


def _read_port_forward(element: Element, complaints: Complaints) -> PortForward | None:
    fields = Fields(element, complaints)
    guest_port = fields.integer("guest_port", unit="a port", minimum=1, maximum=65535)
    host_port = fields.integer("host_port", unit="a port, or 0 for a free one,", minimum=0, maximum=65535)
    is_remote = fields.boolean("is_remote")
    if guest_port is None and not fields.has("guest_port"):
        fields.error("guest_port", None, "expected the port of the guest that <port_forward> leads to")
    if guest_port == AGENT_PORT:
        fields.error(
            "guest_port", fields.line_of("guest_port"), f"expected another port than {AGENT_PORT}, the agent's"
        )
    fields.complain_about_others()
    return None if guest_port is None else PortForward(guest_port, host_port or 0, is_remote or False)


def _fault_of_os_name(text: str) -> str | None:
    return None if _OS_NAME.fullmatch(text) else f"expected an OS type of VirtualBox such as Linux26_64, not {text!r}"


def _check_files(fields: Fields, task: Task, *, copy_app: bool) -> None:
    """The files of a guest task on the host have names that stay in the slot, and no two are the same file."""
    checks: list[tuple[str, str, Callable[[str], str | None]]] = [
        ("stdin_filename", task.stdin_filename, names.fault_of_slot_name),
        ("stdout_filename", task.stdout_filename, names.fault_of_written_name),
        ("stderr_filename", task.stderr_filename, names.fault_of_written_name),
    ]
    if copy_app:
        checks.append(("application", task.application, names.fault_of_slot_name))
    for element, name, check in checks:
        fault = check(name) if name else None
        if fault:
            fields.error(element, fields.line_of(element), fault)
    if task.stdout_filename and _same(task.stdout_filename, task.stderr_filename):
        fields.error(
            "stderr_filename",
            fields.line_of("stderr_filename"),
            "expected another file than stdout_filename: in a guest task each replaces its file",
        )


def _same(name: str, other: str) -> bool:
    """Whether two names, `out` and `./out` say, are the same file."""
    return bool(other) and PurePosixPath(name) == PurePosixPath(other)
