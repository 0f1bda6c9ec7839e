"""Whether a process got the processor that it wanted, as the system tells it. Opens files of /proc; never raises.

Linux counts for each thread how long it was runnable without running (Documentation/scheduler/sched-stats.rst,
/proc/PID/schedstat, second field, nanoseconds). Elsewhere CPU time and the process's state have to do.
"""

from __future__ import annotations

from pathlib import Path

from vmcontrol.common import proctable
from vmcontrol.guests.silence import Sample


def sample(at: float, pid: int | None) -> Sample:
    """What is known of process `pid` now. at: seconds of the caller's clock."""
    if not pid:
        return Sample(at)
    waited = _waited(Path("/proc") / str(pid) / "task")
    if waited:
        return Sample(at, waited_s=waited)
    process = proctable.look_at(pid)
    if process is None:
        return Sample(at)
    return Sample(at, cpu_s=process.cpu_time_s, runnable=process.state == "R")


def _waited(tasks: Path) -> dict[int, float]:
    found: dict[int, float] = {}
    try:
        for task in tasks.iterdir():
            try:
                found[int(task.name)] = int((task / "schedstat").read_text().split()[1]) / 1e9
            except (OSError, ValueError, IndexError):  # it has ended, or this kernel does not count
                continue
    except OSError:
        return {}
    return found
