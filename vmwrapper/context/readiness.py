"""What has to be ready before a guest task can run, and how far it is: "2 of 4: waiting for the guest agent".

All are started side by side; this only reports how far they are.
"""

from __future__ import annotations

import logging
from enum import Enum

from vmwrapper.context.timeline import Timeline

log = logging.getLogger(__name__)


class Requirement(Enum):
    """One thing that has to be there, with its name for people. In the order of the report."""

    BROKER = "the message broker"
    HOST_MAIN = "HostMain"
    VM = "the virtual machine"
    AGENT = "the guest agent"


STAGES = {
    Requirement.BROKER: "broker ready",
    Requirement.VM: "VM booted",
    Requirement.AGENT: "agent there",
}
"""Their names in the timeline."""


class Readiness:
    """How far the requirements are."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._ready: set[Requirement] = set()

    def reached(self, requirement: Requirement) -> None:
        """It is there (again)."""
        if requirement in STAGES:
            self._timeline.mark(STAGES[requirement])
        if requirement not in self._ready:
            self._ready.add(requirement)
            log.info("%s", self)

    def gone(self, *requirements: Requirement) -> None:
        """They were there and are not any more."""
        self._ready.difference_update(requirements)

    def __str__(self) -> str:
        waiting = [requirement.value for requirement in Requirement if requirement not in self._ready]
        count = f"{len(Requirement) - len(waiting)} of {len(Requirement)}"
        return f"{count}: waiting for {' and '.join(waiting)}" if waiting else f"{count}: all ready"
