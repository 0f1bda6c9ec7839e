"""The names of our files in a slot directory, in one place. Who writes and reads each: docs/reference/slot-files.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmcontrol.common.slotfiles import GUEST_CONSOLE, PORTS, SECRET, VBOXMANAGE_TRACE, VM_FOLDER

__all__ = ["GUEST_CONSOLE", "PORTS", "SECRET", "VBOXMANAGE_TRACE", "VM_FOLDER", "Slot"]

CHECKPOINT = "vmwrapper_checkpoint.json"
PREVIOUS_CHECKPOINT = "vmwrapper_checkpoint.previous.json"
LINKS = "vmwrapper_links.json"
PREVIOUS_LINKS = "vmwrapper_links.previous.json"
PROCESSES = "vmwrapper_processes.json"
RESERVE = "vmwrapper_reserve"
MESSAGES = "vmwrapper_messages.json"
INITIAL_FILES = "vmwrapper_initial_files.json"
GRAPHICS_STATUS = "graphics_status.xml"
"""api/graphics2_util.cpp"""
STORY = "vmwrapper_story"
STDERR = "stderr.txt"
FINISH_FILE = "boinc_finish_called"
TEMPORARY_EXIT_FILE = "boinc_temporary_exit"
INIT_DATA = "init_data.xml"
JOB_FILE = "job.xml"
"""Logical name."""
JOB_COPY = "vmwrapper_job.xml"


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot directory."""

    folder: Path

    def file(self, name: str) -> Path:
        return self.folder / name

    @property
    def vm_folder(self) -> Path:
        return self.folder / VM_FOLDER
