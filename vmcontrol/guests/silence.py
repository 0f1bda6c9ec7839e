"""How long a guest has given no sign of life although it could have: a pure measure, fed with samples.

Not every second of silence counts. A guest whose VM is paused, or is being snapshotted, cannot speak; nor can one
whose process waits for a processor, as a process of idle priority does for minutes beside busy ones; and a HostMain
that gets no processor itself hears nothing. What is left counts: it is a guest that was let run and said nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PERIOD_S = 5.0
"""Between two samples. No more than this counts for one: what goes beyond it, HostMain itself has been late."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What is known of a VM's process at one moment."""

    at: float
    """Seconds of HostMain's clock."""
    waited_s: Mapping[int, float] | None = None
    """For each thread the seconds that it was runnable and had no processor. None: this system does not tell."""
    cpu_s: float | None = None
    """Where it does not: CPU time of the process."""
    runnable: bool = False
    """Where it does not: whether the process wanted a processor at that moment."""


class Silence:
    """Of one guest."""

    def __init__(self, period_s: float = PERIOD_S) -> None:
        self.seconds = 0.0
        """Of silence that counts, since the last sign of life."""
        self._period_s = period_s
        self._last: Sample | None = None

    def heard(self) -> None:
        """A sign of life came since the last sample."""
        self.seconds = 0.0
        self._last = None

    def stood(self) -> None:
        """The guest could not speak at some time since the last sample."""
        self._last = None

    def sample(self, now: Sample) -> None:
        """Another moment; the time since the last one counts as far as the VM was let run."""
        last, self._last = self._last, now
        if last is None:
            return
        passed = now.at - last.at
        self.seconds += min(self._period_s, max(0.0, passed - starved_s(last, now)))


def starved_s(last: Sample, now: Sample) -> float:
    """Seconds between two samples in which the VM wanted a processor and had none.

    Of the thread that waited longest: a guest needs all of them, and one that has ended has waited no more.
    """
    if last.waited_s is not None and now.waited_s is not None:
        before = last.waited_s
        return max((waited - before.get(thread, waited) for thread, waited in now.waited_s.items()), default=0.0)
    if last.cpu_s is None or now.cpu_s is None or not (last.runnable and now.runnable):
        return 0.0
    return max(0.0, now.at - last.at - (now.cpu_s - last.cpu_s))
