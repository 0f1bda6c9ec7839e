"""What became of each VM when HostMain ended: said by HostMain for each one, read by the wrapper. Pure.

It travels in the answer of `shutdown` and, for an end that nobody called for (TERM, the end of the lifeline), in a
line of the status pipe. Nothing is inferred from an answer that came: a VM that is not named was not saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

REASON_LIMIT = 1000
"""Characters; a line of the status pipe has to be one write."""


class Outcome(StrEnum):
    """What became of a VM."""

    SAVED = "saved"
    """Memory and disk are durable; its next start goes on from exactly there."""
    OFF = "off"
    """It is switched off: as asked, or its guest had shut down."""
    FAILED = "failed"
    """It was to be saved or switched off, and was not; `reason` says why."""


_OUTCOMES = [outcome.value for outcome in Outcome]


@dataclass(frozen=True, slots=True)
class VmEnd:
    """The end of one VM."""

    name: str
    outcome: Outcome
    reason: str = ""
    """For the volunteer, when it failed."""
    key: str = ""
    """The constant word of the computer's trouble (interface.HostProblem); empty: none that is known."""

    def to_struct(self) -> dict[str, object]:
        return {
            "name": self.name,
            "outcome": self.outcome.value,
            "reason": self.reason[:REASON_LIMIT],
            "key": self.key,
        }


def read(values: object) -> dict[str, VmEnd]:
    """By name, from a list of structs; what cannot be understood is left out."""
    ends: dict[str, VmEnd] = {}
    for value in values if isinstance(values, Sequence) and not isinstance(values, str) else ():
        if not isinstance(value, Mapping):
            continue
        name, outcome = value.get("name"), value.get("outcome")
        if isinstance(name, str) and outcome in _OUTCOMES:
            ends[name] = VmEnd(name, Outcome(outcome), str(value.get("reason") or ""), str(value.get("key") or ""))
    return ends
