"""Whether the broker at the other end of a connection is a program of this job, before it is told the passcode.

The wrapper chooses its port and the broker binds it later; in between, and when the broker has died, any program of the
computer can listen there. So it is looked which process has the other end: one that the wrapper has started has it, or
nothing is said. Not asked of a broker whose login stands in HostConfig.cfg: it may be anybody's.
"""

from __future__ import annotations

import ipaddress
import os
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psutil  # the agent in the guest imports this module, and has no psutil

OURS_LIMIT_S = 5.0
"""For the broker to accept the connection; before that nobody has the other end."""
_LOOK_AGAIN_S = 0.1

Address = tuple[str, int]


class NotOurBroker(OSError):  # noqa: N818
    """The listener is no program of this job."""


class JobsPrograms:
    """The processes that descend from one, the wrapper, which is ours too."""

    def __init__(self, root: int | None = None) -> None:
        """root: a pid; None: our parent's, as long as it lives."""
        self._root = os.getppid() if root is None else root

    def wait_in_thread(self, here: Address, there: Address, stop: threading.Event) -> None:
        """Return when one of them has the end `there` of the connection; `here` is our end. Raises NotOurBroker."""
        for _ in range(round(OURS_LIMIT_S / _LOOK_AGAIN_S)):
            if self.have(here, there):
                return
            if stop.wait(_LOOK_AGAIN_S):
                break
        raise NotOurBroker(f"no program of this job listens at {there[0]}:{there[1]}; it was not told the passcode")

    def have(self, here: Address, there: Address) -> bool:
        """Whether one of them has the end `there` of the connection."""
        import psutil

        wanted = _plain(there), _plain(here)
        try:
            root = psutil.Process(self._root)
            processes = [root, *root.children(recursive=True)]
        except psutil.Error:
            return False
        return any(wanted in _connections(process) for process in processes)


def _connections(process: psutil.Process) -> set[tuple[Address, Address]]:
    import psutil

    try:
        found: Any = process.net_connections("tcp")
    except (psutil.Error, OSError):  # it has ended meanwhile
        return set()
    return {(_plain(one.laddr), _plain(one.raddr)) for one in found if one.laddr and one.raddr}


def _plain(address: Any) -> Address:
    """A JVM has IPv4 connections at sockets of IPv6."""
    ip = ipaddress.ip_address(address[0].partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)
    return str(mapped or ip), address[1]
