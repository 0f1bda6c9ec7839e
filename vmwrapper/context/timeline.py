"""The short timeline of a job: when which stage was reached, for the last line of stderr.txt."""

from __future__ import annotations

from vmcontrol.common.eventloop import Clock

STAGES = ("broker ready", "VM booted", "agent there", "files in", "run", "files out", "done")
"""The stages of a guest task, in the order in which they are usually reached."""


class Timeline:
    """When which stage was reached for the first time, in seconds; since the process began, if its owner says so."""

    def __init__(self, clock: Clock, began: float | None = None) -> None:
        self._clock = clock
        self._began = clock.seconds() if began is None else began
        self._reached: dict[str, float] = {}

    def mark(self, stage: str) -> None:
        self._reached.setdefault(stage, self._clock.seconds() - self._began)

    def reached(self, stage: str) -> float | None:
        return self._reached.get(stage)

    def __str__(self) -> str:
        known = {stage: number for number, stage in enumerate(STAGES)}
        stages = sorted(self._reached.items(), key=lambda item: (item[1], known.get(item[0], 0)))
        return ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in stages)
