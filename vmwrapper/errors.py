"""The errors of the wrapper, as a tree. Each says how the job ends.

    JobError                    the job ends now; `status` says how, the text is the one clear line in stderr.txt
    +-- BadInput          206   job file, arguments, configuration, a missing file on the host
    +-- TaskFailed        195   a program failed, or what it should have made is not there
    +-- GuestOutOfMemory  205
    +-- SubTaskFailed     208   broker or HostMain died for good; temporary exits are used up
    TemporaryExit               try again later; carries a delay and a reason that a volunteer understands
    Aborted                     the client asked for the end of the task
    Quit                        the client asked us to stop and to go on later

No `JobError` is ever raised for something that may pass by itself: that is a `TemporaryExit`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vmwrapper.exit_status import ExitStatus

DISK_DELAY_S = 600
"""Seconds until a full or read-only disk is tried again."""


class JobError(Exception):
    """The job is over and has failed. `str(error)` is one line: what, where, what to do."""

    status = ExitStatus.CHILD_FAILED


class BadInput(JobError):  # noqa: N818 (the name says more without "Error")
    """An input is wrong. Nothing was started, or the task was not."""

    status = ExitStatus.INIT_FAILURE


class TaskFailed(JobError):  # noqa: N818
    """A task's program failed, or an output file that it should have made is missing."""

    status = ExitStatus.CHILD_FAILED


class GuestOutOfMemory(JobError):  # noqa: N818
    """The guest's kernel killed the program for want of memory."""

    status = ExitStatus.OUT_OF_MEMORY


class SubTaskFailed(JobError):  # noqa: N818
    """A VMmanage task (broker, HostMain) died for good."""

    status = ExitStatus.SUB_TASK_FAILURE


class TemporaryExit(Exception):  # noqa: N818
    """Ask the BOINC client to start the job again later.

    fault: a short constant name; repeats of the same fault are counted in the slot.
    delay_s: seconds until the next try, 0 to 86400 (client/app_control.cpp).
    counted: False for a wait that is no fault (a VM that another task uses).
    limit: how many of the same fault in a row there may be; the next one is a failure.
    """

    def __init__(self, reason: str, *, fault: str, delay_s: int, counted: bool = True, limit: int = 5) -> None:
        super().__init__(reason)
        self.reason = reason
        self.fault = fault
        self.delay_s = delay_s
        self.counted = counted
        self.limit = limit


@contextlib.contextmanager
def translate_os_errors(what: str, *, fault: str = "disk") -> Iterator[None]:
    """Raise an OSError of the block as a TemporaryExit that says `what` cannot be done, and to free some space."""
    try:
        yield
    except OSError as error:
        raise TemporaryExit(
            f"{what} ({error.strerror}): free some space on BOINC's disk", fault=fault, delay_s=DISK_DELAY_S
        ) from error


class Aborted(Exception):  # noqa: N818
    """The client's abort request: everything of this task goes, exit 194."""


class Quit(Exception):  # noqa: N818
    """The client's quit request, a lost client, or TERM: save, end everything, go on at the next start.

    by_signal: the signal that asked for it when we run standalone, else None; we then die of that signal.
    """

    def __init__(self, why: str, *, by_signal: int | None = None) -> None:
        super().__init__(why)
        self.by_signal = by_signal
