"""The wrapper process: it runs the tasks of job.xml for the BOINC client, on the host or in a virtual machine."""

from vmcontrol import __version__

__all__ = ["__version__"]
