"""Time limits of tests, stretched by the load of the computer.

A limit says how long something takes on a computer that has nothing else to do. With twice as many processes as
processors everything takes twice as long, so limits are multiplied by the load for each processor, four times at most:
what hangs is still ended. tests/conftest.py prints the largest factor that was used.
"""

from __future__ import annotations

import os
import time

LARGEST = 4.0
used = 1.0
"""The largest factor so far in this process."""


def factor() -> float:
    """1 on a computer whose processors suffice for the processes that want them (load average of the last minute)."""
    global used  # noqa: PLW0603 (the end of the run tells it)
    now = min(LARGEST, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))
    used = max(used, now)
    return now


def stretched(limit_s: float) -> float:
    return limit_s * factor()


def after(limit_s: float) -> float:
    """The time of time.monotonic() at which the stretched limit is over."""
    return time.monotonic() + stretched(limit_s)
