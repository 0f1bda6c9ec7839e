"""The names of our files in a slot directory, in one place. docs/architecture.md says who writes and reads each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CHECKPOINT = "vmwrapper_checkpoint.json"
PREVIOUS_CHECKPOINT = "vmwrapper_checkpoint.previous.json"
PORTS = "vmwrapper_ports.json"
PROCESSES = "vmwrapper_processes.json"
RESERVE = "vmwrapper_reserve"
MESSAGES = "vmwrapper_messages.json"
SECRET = "vmwrapper_secret"  # noqa: S105 (a file name)
INITIAL_FILES = "vmwrapper_initial_files.json"
GRAPHICS_STATUS = "graphics_status.xml"
"""api/graphics2_util.cpp"""
GUEST_CONSOLE = "guest_console.log"
VBOXMANAGE_TRACE = "vboxmanage_trace.txt"
VM_FOLDER = "vm"
STDERR = "stderr.txt"
FINISH_FILE = "boinc_finish_called"
TEMPORARY_EXIT_FILE = "boinc_temporary_exit"
INIT_DATA = "init_data.xml"
JOB_FILE = "job.xml"
"""Logical name."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot directory."""

    folder: Path

    def file(self, name: str) -> Path:
        return self.folder / name

    @property
    def vm_folder(self) -> Path:
        return self.folder / VM_FOLDER
