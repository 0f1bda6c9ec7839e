"""What is said of a guest that broke."""

from __future__ import annotations

import pytest

from vmwrapper.vm import incident

BOOT = ["SeaBIOS", "[    0.05] tsc: Unable to calibrate against PIT"]
PANIC = [
    "[  9.1] sysrq: Trigger a crash",
    "[  9.2] Kernel panic - not syncing: sysrq triggered crash",
    "[  9.3] CPU: 0",
]


@pytest.mark.parametrize(
    ("console", "uptime_s", "expected_s", "words"),
    [
        ([*PANIC, *BOOT], 6.0, 30.0, "panicked, and it has booted anew: Kernel panic - not syncing: sysrq triggered"),
        (["[ 9.0] reboot: Restarting system", *BOOT], 6.0, 30.0, "the guest has rebooted"),
        (BOOT, 6.0, 30.0, "the guest has rebooted"),
        (["agent: Killed"], 30.0, 30.5, "the guest's agent was killed"),
        (["agent: Killed"], 900.0, 500.0, "the guest's agent was killed"),  # a clock that was set
        (["reboot: Restarting system"], None, None, "the guest has rebooted"),
        ([], None, 30.0, "the guest has rebooted, or its agent was killed"),
        ([], 30.0, None, "the guest's agent was killed"),
    ],
)
def test_panic_reboot_and_killed_agent_are_told_apart(
    console: list[str], uptime_s: float | None, expected_s: float | None, words: str
) -> None:
    assert words in incident.restarted(console, uptime_s, expected_s)


@pytest.mark.parametrize(
    ("state", "console", "trouble", "words"),
    [
        ("PoweredOff", ["[ 5.0] reboot: Power down"], "", "VM vm is off: the guest has switched itself off"),
        ("PoweredOff", [], "", "VM vm is off: its guest, or somebody on this computer, has switched it off"),
        ("PoweredOff", PANIC, "", "VM vm has ended (it is PoweredOff): the guest's kernel panicked: Kernel panic"),
        ("Aborted", [], "", "VM vm has ended: its process was killed, or has crashed"),
        ("Aborted", [], "out of memory", "VM vm has ended: out of memory"),
        ("Saved", [], "", "VM vm was saved by somebody on this computer"),
        ("Stuck", [], "disk full", "VM vm cannot go on: disk full"),
    ],
)
def test_the_end_of_a_vm_is_told_by_its_reason(state: str, console: list[str], trouble: str, words: str) -> None:
    said = incident.ended("vm", console, state, trouble)
    assert said.startswith(words)
    assert "while it should run" not in said


def test_a_silent_guest_that_panicked_is_told_so_in_a_line_of_bounded_length() -> None:
    assert "no sign of life for 180 s" in incident.silent([], 180.2, "Running")
    long = [f"Kernel panic - not syncing: {'x' * 5000}"]
    for said in (
        incident.silent(long, 180, "Running"),
        incident.unheard(long, "?"),
        incident.ended("vm", long, "", ""),
    ):
        assert "the guest's kernel panicked" in said
        assert len(said) < 400


def test_the_panic_is_quoted_although_the_guest_has_booted_since() -> None:
    console = [f"before {n}" for n in range(50)] + PANIC + [f"boot {n}" for n in range(50)]
    quoted = incident.excerpt(console)
    assert len(quoted) <= incident.EXCERPT_LINES + 1
    assert PANIC[1] in quoted
    assert "boot 49" in quoted
    assert incident.excerpt(PANIC) == PANIC
