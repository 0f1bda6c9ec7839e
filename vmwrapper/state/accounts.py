"""CPU time, run time and fraction done of the job: sums that never go back. Pure but for the clock that it is given.

The sums that are reported to the client and kept in the checkpoint. Times in seconds, fractions from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from vmcontrol.common.eventloop import Clock

ALMOST_DONE = 0.999
"""Before the end the job is never reported as finished; the client would show 100 % and wonder."""


def _nothing() -> float:
    return 0.0


class Accounts:
    """What the job has used. CPU time comes from the host's programs, and from one guest task at a time."""

    def __init__(
        self,
        work_clock: Clock,
        *,
        host: Callable[[], float] = _nothing,
        cpu_time_s: float = 0.0,
        elapsed_s: float = 0.0,
        task_elapsed_s: float = 0.0,
    ) -> None:
        """host: seconds that all programs on the host have used in this run, those that have ended too."""
        self._clock = work_clock
        self._cpu_before = cpu_time_s
        self._live: Callable[[], float] = _nothing
        self._live_seen = 0.0
        self._host = host
        self._host_seen = 0.0
        self._reported = cpu_time_s
        self._elapsed_before = elapsed_s
        self._began = work_clock.seconds()
        self._task_before = task_elapsed_s
        self._task_began: float | None = None

    def use(self, live: Callable[[], float]) -> None:
        """From now on CPU time comes from `live` (seconds since it began); what the last source gave is kept."""
        self.settle()
        self._live = live
        self._live_seen = 0.0

    def settle(self, at_least_s: float = 0.0) -> None:
        """The live source has ended: keep what it gave, or `at_least_s` when that is more (known at its end)."""
        self._look()
        self._cpu_before += max(self._live_seen, at_least_s)
        self._live, self._live_seen = _nothing, 0.0

    def _look(self) -> None:
        self._live_seen = max(self._live_seen, self._live())

    @property
    def cpu_time_s(self) -> float:
        """Of the whole job, over all starts."""
        self._look()
        self._host_seen = max(self._host_seen, self._host())
        self._reported = max(self._reported, self._cpu_before + self._live_seen + self._host_seen)
        return self._reported

    @property
    def elapsed_s(self) -> float:
        """Un-suspended seconds of the whole job, over all starts."""
        return self._elapsed_before + self._clock.seconds() - self._began

    @property
    def task_elapsed_s(self) -> float:
        """The same of the current task while its program ran."""
        return self._task_before + (self._clock.seconds() - self._task_began if self._task_began is not None else 0.0)

    def begin_task(self, elapsed_s: float = 0.0, *, runs: bool = False) -> None:
        """A task begins, or went back to where it had run for `elapsed_s`. runs: its program does, from now on."""
        self._task_before, self._task_began = elapsed_s, self._clock.seconds() if runs else None

    def program_runs(self, runs: bool) -> None:
        """The current task's program begins or goes on, or it does not run any more."""
        self.begin_task(self.task_elapsed_s, runs=runs)


class FractionDone:
    """The fraction done of the whole job from that of its current task."""

    def __init__(self, weights: Sequence[float], at_least: float = 0.0) -> None:
        self._weights = tuple(weights)
        self._total = sum(self._weights)
        self._reached = min(at_least, ALMOST_DONE)
        self._counted = 0
        """Tasks whose weights are in the sum: it is asked for after each of what may be thousands."""
        self._sum = 0.0
        self._of_task: Callable[[], float | None] | None = None

    def follow(self, of_task: Callable[[], float | None] | None) -> None:
        """From now on `of_task` gives the fraction of the task that runs; None: no task runs."""
        self._of_task = of_task

    def reached(self, tasks_done: int) -> float:
        """Of the whole job, now."""
        return self.update(tasks_done, self._of_task() if self._of_task is not None else None)

    def update(self, tasks_done: int, task_fraction: float | None) -> float:
        """task_fraction: of the task after those that are done; None: not known, then it counts when it is done."""
        if self._total > 0:
            if tasks_done < self._counted:  # the job went back
                self._counted, self._sum = 0, 0.0
            self._sum += sum(self._weights[self._counted : tasks_done])
            self._counted = tasks_done
            done = self._sum
            if tasks_done < len(self._weights) and task_fraction is not None and task_fraction > 0:
                done += self._weights[tasks_done] * min(task_fraction, 1.0)
            self._reached = max(self._reached, min(done / self._total, ALMOST_DONE))
        return self._reached


def task_fraction(own: float | None, job_duration_s: float | None, elapsed_s: float) -> float | None:
    """The program's own figure, else the part of the expected duration, else None (NaN counts as no figure)."""
    if own is not None and not math.isnan(own):
        return min(max(own, 0.0), 1.0)
    if job_duration_s is not None and job_duration_s > 0:
        return min(elapsed_s / job_duration_s, ALMOST_DONE)
    return None
