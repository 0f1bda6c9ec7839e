"""What goes wrong with a VM of the job.

    HostMainError               a call did not give a result
    +-- HostMainGone            no connection, or nothing that is an answer: what became of the call is not known
    +-- HostMainSilent          no answer within the limit: likewise
    +-- CallFailed              fault -1: HostMain's words
    +-- HypervisorTrouble       fault 1: the computer's trouble, with a reason for the volunteer
    +-- MissingFile             fault 2: a file is not there, with a list of what is; or it is none that can be read
    +-- Refused                 fault 4: a VM like that can never be made here
    +-- GuestSilent             fault 3: the agent in the guest does not answer
    VmTrouble                   the VM or its agent is not there: bring it up again, perhaps from an older state
    +-- GuestFailed             by its own fault: a state that leads there again and again is given up
    StateLost                   the newest state that is left is of before what earlier tasks did in this VM

Only GuestFailed counts against the state that the VM was brought back to.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmwrapper.errors import BadInput, SubTaskFailed, TemporaryExit
from vmwrapper.state.checkpoint import SnapshotRecord

VM_IN_USE = "vm-in-use"
"""The drivers' key for a VM that another task of this computer uses."""
IMAGE_FAULTS = ("image-missing", "image-damaged")
"""Of both drivers: an input file cannot be used."""


class HostMainError(Exception):
    """A call to HostMain gave no result."""


class HostMainGone(HostMainError):  # noqa: N818
    """No connection to HostMain, or it broke, or something else than the method's answer came over it."""


class HostMainSilent(HostMainError):  # noqa: N818
    """HostMain did not answer within the limit."""


class CallFailed(HostMainError):  # noqa: N818
    """Fault -1."""


class HypervisorTrouble(HostMainError):  # noqa: N818
    """Fault 1. delay_s: None when it will never pass by itself."""

    def __init__(self, reason: str, *, key: str, delay_s: int | None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.key = key
        self.delay_s = delay_s


class MissingFile(HostMainError):  # noqa: N818
    """Fault 2. listing: what is in the folder where it should be. reason: it is there, but cannot be used; else ""."""

    def __init__(self, path: str, listing: Sequence[str], reason: str = "") -> None:
        super().__init__(f"{path}: {reason}" if reason else f"{path} is missing")
        self.path = path
        self.listing = tuple(listing)
        self.reason = reason


class Refused(HostMainError):  # noqa: N818
    """Fault 4: what was asked for can never be."""


class GuestSilent(HostMainError):  # noqa: N818
    """Fault 3."""


class VmTrouble(Exception):  # noqa: N818
    """The VM, or the agent in it, is not there any more."""


class GuestFailed(VmTrouble):
    """The guest, not the computer: it is silent, panicked, rebooted, or its agent was killed. `str` says which.

    silent: it does not answer, and nothing says that it ever will.
    """

    def __init__(self, why: str, *, silent: bool = False) -> None:
        super().__init__(why)
        self.silent = silent


class StateLost(Exception):  # noqa: N818
    """What there is of a VM does not have in it what earlier tasks did there.

    to: the state that there is; None: none, its snapshots are gone (a person deleted them, or the disk lost them).
    """

    def __init__(self, why: str, to: SnapshotRecord | None = None) -> None:
        super().__init__(why)
        self.to = to


def as_exit(trouble: HypervisorTrouble) -> TemporaryExit | SubTaskFailed | BadInput:
    """How the job ends for the computer's trouble: later again, or never."""
    if trouble.key in IMAGE_FAULTS:
        return BadInput(trouble.reason)
    if trouble.delay_s is None:
        return SubTaskFailed(trouble.reason)
    waits = trouble.key == VM_IN_USE
    return TemporaryExit(trouble.reason, fault=trouble.key, delay_s=trouble.delay_s, counted=not waits)
