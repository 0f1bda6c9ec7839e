"""What happened to a guest, in words for stderr.txt. Pure: what was seen in, a sentence out.

The guest writes its console itself, so what is read there decides about words and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

PANIC = "Kernel panic - not syncing"
REBOOTS = ("reboot: Restarting system", "reboot: machine restart", "sysrq: Resetting", "Rebooting in ")
HALTS = ("reboot: Power down", "reboot: System halted", "init: power off")
CLOCK_SLACK_S = 3.0
"""A guest's clock of its uptime may be behind ours by that; a boot takes longer."""
EXCERPT_LINES = 20
_QUOTED = 200
"""Characters of a line of the guest within a sentence."""


def panic(console: Sequence[str]) -> str:
    """What the kernel said last of a panic of its own; empty: nothing of that."""
    for line in reversed(console):
        if (at := line.find(PANIC)) >= 0:
            return line[at : at + _QUOTED].strip()
    return ""


def excerpt(console: Sequence[str]) -> list[str]:
    """The lines that are worth quoting: the last ones, and those before a panic where they are not among these."""
    at = next((n for n in reversed(range(len(console))) if PANIC in console[n]), None)
    if at is None or at >= len(console) - EXCERPT_LINES:
        return list(console[-EXCERPT_LINES:])
    half = EXCERPT_LINES // 2
    return [*console[max(0, at - half + 1) : at + 1], "...", *console[-half:]]


def restarted(console: Sequence[str], uptime_s: float | None, expected_s: float | None) -> str:
    """Why an agent does not know the command that it ran.

    uptime_s: of the guest, now. expected_s: what that would be if the guest had not booted since the command began.
    """
    if said := panic(console):
        return f"the guest's kernel panicked, and it has booted anew: {said}"
    if uptime_s is not None and expected_s is not None:
        booted = uptime_s < expected_s - CLOCK_SLACK_S
    else:
        booted = any(mark in line for line in console for mark in REBOOTS)
    if booted:
        return "the guest has rebooted"
    if uptime_s is None:
        return "the guest has rebooted, or its agent was killed"
    return "the guest's agent was killed, and started anew without knowing of it; the guest itself runs on"


def silent(console: Sequence[str], seconds: float, state: str) -> str:
    """Why a guest gives no sign of life."""
    if said := panic(console):
        return f"the guest's kernel panicked: {said}"
    return (
        f"the guest has given no sign of life for {seconds:.0f} s in which it could have, and does not answer when it "
        f"is asked anew; its VM is {state}"
    )


def unheard(console: Sequence[str], question: str) -> str:
    """Why a guest that was asked does not answer, whatever it is asked."""
    said = panic(console)
    return f"the guest's kernel panicked: {said}" if said else f"the guest does not answer: {question}"


def ended(name: str, console: Sequence[str], state: str, trouble: str) -> str:
    """Why a VM runs no more."""
    why = f": {trouble}" if trouble else ""
    if said := panic(console):
        return f"VM {name} has ended (it is {state}): the guest's kernel panicked: {said}"
    if state == "PoweredOff" and any(mark in line for line in console for mark in HALTS):
        return f"VM {name} is off: the guest has switched itself off"
    reasons = {
        "PoweredOff": "is off: its guest, or somebody on this computer, has switched it off",
        "Aborted": f"has ended{why or ': its process was killed, or has crashed'}",
        "Saved": "was saved by somebody on this computer",
        "Stuck": f"cannot go on{why}",
    }
    return f"VM {name} {reasons.get(state, f'does not run any more: it is {state}{why}')}"
