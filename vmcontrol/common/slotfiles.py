"""The names of files in a slot that more than one of our programs knows, in one place. Who writes and reads each:
docs/reference/slot-files.md."""

from __future__ import annotations

PORTS = "vmwrapper_ports.json"
SECRET = "vmwrapper_secret"  # noqa: S105 (a file name)
GUEST_CONSOLE = "guest_console.log"
VBOXMANAGE_TRACE = "vboxmanage_trace.txt"
VM_FOLDER = "vm"
"""One folder a VM."""
HOSTMAIN_LOCK = ".hostmain.lock"
"""In VM_FOLDER, while a HostMain lives in the slot."""
