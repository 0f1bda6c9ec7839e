"""The wrapper process: it runs the tasks of job.xml for the BOINC client, on the host or in a virtual machine."""

__version__ = "0.1.0"
