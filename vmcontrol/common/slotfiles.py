"""The names of the files in a slot: ours, and those by which the BOINC client and an application speak.

docs/reference/slot-files.md says who writes and reads each.
"""

from __future__ import annotations

CHECKPOINT = "vmwrapper_checkpoint.json"
PREVIOUS_CHECKPOINT = "vmwrapper_checkpoint.previous.json"
LINKS = "vmwrapper_links.json"
PREVIOUS_LINKS = "vmwrapper_links.previous.json"
PROCESSES = "vmwrapper_processes.json"
RESERVE = "vmwrapper_reserve"
MESSAGES = "vmwrapper_messages.json"
INITIAL_FILES = "vmwrapper_initial_files.json"
STORY = "vmwrapper_story"
JOB_COPY = "vmwrapper_job.xml"
PORTS = "vmwrapper_ports.json"
SECRET = "vmwrapper_secret"  # noqa: S105 (a file name)
GUEST_CONSOLE = "guest_console.log"
VBOXMANAGE_TRACE = "vboxmanage_trace.txt"
VM_FOLDER = "vm"
"""One folder a VM."""
HOSTMAIN_LOCK = ".hostmain.lock"
"""In VM_FOLDER, while a HostMain lives in the slot."""

STDERR = "stderr.txt"
INIT_DATA = "init_data.xml"
JOB_FILE = "job.xml"
"""Logical name."""
FINISH_FILE = "boinc_finish_called"
TEMPORARY_EXIT_FILE = "boinc_temporary_exit"
LOCK_FILE = "boinc_lockfile"
MMAP_FILE = "boinc_mmap_file"
TASK_STATE = "boinc_task_state.xml"
TRICKLE_UP = "trickle_up.xml"
TRICKLE_DOWN = "trickle_down"
"""A file with this in its name is a message from the project's server."""
UPLOAD_REQUEST_PREFIX = "boinc_ufr_"
UPLOAD_STATUS_PREFIX = "boinc_ufs_"
GRAPHICS_STATUS = "graphics_status.xml"
"""api/graphics2_util.cpp"""

RESERVED = frozenset(
    {
        CHECKPOINT, PREVIOUS_CHECKPOINT, LINKS, PREVIOUS_LINKS, PROCESSES, RESERVE, MESSAGES, INITIAL_FILES, STORY,
        JOB_COPY, PORTS, SECRET, GUEST_CONSOLE, VBOXMANAGE_TRACE, STDERR, INIT_DATA, JOB_FILE, FINISH_FILE,
        TEMPORARY_EXIT_FILE, LOCK_FILE, MMAP_FILE, TASK_STATE, TRICKLE_UP, GRAPHICS_STATUS,
    }
)  # fmt: skip
"""Files of the slot that the client or the wrapper needs; nothing from a guest replaces them."""
