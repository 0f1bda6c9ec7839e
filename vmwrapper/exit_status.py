"""Exit statuses of vmwrapper. Source: BOINC lib/error_numbers.h. What each means to people:
docs/reference/exit-status.md.

Unix keeps eight bits of a status, so none of BOINC's negative ERR_ numbers may ever leave this process.
"""

from enum import IntEnum


class ExitStatus(IntEnum):
    """The exit status of the process, for the BOINC client or a shell."""

    DONE = 0
    TEMPORARY_STANDALONE = 75
    """sysexits.h EX_TEMPFAIL: a temporary exit without a client."""
    DOCTOR_NO = 1
    STATEFILE_WRITE = 192
    """Under a client: the request for a later start cannot be written into the slot."""
    ABORTED_BY_CLIENT = 194
    CHILD_FAILED = 195
    """A task's or an unzip task's program failed or could not be started (application missing in the guest; exec_dir or
    a stream file of a host task), or a file that should come out of the guest is missing."""
    OUT_OF_MEMORY = 205
    INIT_FAILURE = 206
    """The job file, the arguments or the configuration are wrong, or a file on the host is missing."""
    SUB_TASK_FAILURE = 208
    """A VMmanage task died for good, the hypervisor cannot work here, or the temporary exits are used up."""
