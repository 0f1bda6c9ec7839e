"""What has to be ready before a guest task can run, as data: what, how it is probed, how long it may take, and a hint.

All are started side by side; the list only says how far they are, and what to do about one that does not come.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from vmwrapper.context.progress import Timeline

log = logging.getLogger(__name__)

BROKER_LIMIT_S = 60.0
"""ActiveMQ's JVM takes seconds on a slow disk."""
HOST_MAIN_LIMIT_S = 60.0
"""A second on an idle computer; a loaded one that has just booted is slow."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """One thing that has to be there."""

    key: str
    what: str
    """For people: "waiting for ..."."""
    probed_by: str
    limit_s: float | None
    """Seconds of un-suspended time; None: the job file says (boot_timeout)."""
    hint: str
    """What to look at when it does not come."""
    stage: str = ""
    """Its name in the timeline."""


BROKER = Requirement(
    "broker",
    "the message broker",
    "HostMain's event broker-connected",
    BROKER_LIMIT_S,
    "look at the stdout and stderr files of the broker's VMmanage task and at HostConfig.cfg, [Broker]",
    "broker ready",
)
HOST_MAIN = Requirement(
    "hostmain",
    "HostMain",
    "HostMain's event xmlrpc",
    HOST_MAIN_LIMIT_S,
    "look at the stdout and stderr files of HostMain's VMmanage task",
)
VM = Requirement(
    "vm",
    "the virtual machine",
    "XML-RPC start, which returns when the hypervisor says Running",
    240.0,
    "`vmwrapper doctor` says whether this computer can run virtual machines",
    "VM booted",
)
AGENT = Requirement(
    "agent",
    "the guest agent",
    "XML-RPC waitGuest",
    None,
    "look at guest_console.log; boot_timeout in the job file is the limit",
    "agent there",
)

ALL = (BROKER, HOST_MAIN, VM, AGENT)


class Readiness:
    """How far the requirements are."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._ready: set[str] = set()

    def reached(self, requirement: Requirement) -> None:
        """It is there (again)."""
        if requirement.stage:
            self._timeline.mark(requirement.stage)
        if requirement.key not in self._ready:
            self._ready.add(requirement.key)
            log.info("%s", self)

    def gone(self, requirement: Requirement) -> None:
        """It was there and is not any more."""
        self._ready.discard(requirement.key)

    def is_ready(self, requirement: Requirement) -> bool:
        return requirement.key in self._ready

    def __str__(self) -> str:
        """Such as "2 of 4: waiting for the guest agent"."""
        waiting = [requirement.what for requirement in ALL if requirement.key not in self._ready]
        count = f"{len(ALL) - len(waiting)} of {len(ALL)}"
        return f"{count}: waiting for {' and '.join(waiting)}" if waiting else f"{count}: all ready"
