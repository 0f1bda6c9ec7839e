"""A job of many tasks that do nothing, with vmwrapper and, if its path is given, with BOINC's `wrapper`.

    python -m bench.many_tasks [--wrapper PATH] [--tasks 200] [--wrapper-tasks 10] [--folder DIR] [--frozen PATH]

Prints milliseconds a task, from exec to the first task's start, resident and proportional memory while a task runs,
the time from the last task's end to the exit, and what fsync costs in that folder. wrapper takes a second a task, so
it gets fewer. Tasks have the wrapper's own priority, so that on a loaded computer `chrt -r 1` makes it quiet for both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
STAMP = "#!/bin/sh\ndate +%s.%N >> stamps\n"
STOP = "#!/bin/sh\nsleep 4\nexit 1\n"
LARGE_JOB = 100_000
ROUNDS = 5


def slot_with(folder: Path, tasks: str, **files: str) -> Path:
    slot = Path(tempfile.mkdtemp(dir=folder))
    (slot / "job.xml").write_text(f"<job_desc>\n{tasks}</job_desc>\n")
    for name, text in files.items():
        (slot / name).write_text(text)
        (slot / name).chmod(0o755)
    return slot


def environment(pycache: Path) -> dict[str, str]:
    """With compiled modules, as an installed package has them, also where the environment asks for none."""
    given = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**given, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(pycache)}


def start(command: list[str], slot: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, cwd=slot, env=environment(slot.parent / "pycache"), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def per_task_ms(command: list[str], folder: Path, tasks: int) -> float:
    """A long job less a short one: what is the same in both is no part of a task."""
    seconds = []
    for count in (1, tasks + 1):
        slot = slot_with(folder, "<task><application>/bin/true</application><priority>3</priority></task>\n" * count)
        began = time.monotonic()
        assert start(command, slot).wait() == 0
        seconds.append(time.monotonic() - began)
    return 1000 * (seconds[1] - seconds[0]) / tasks


def start_and_end_ms(command: list[str], folder: Path) -> tuple[float, float]:
    """From exec to the first task's code, and from its end to the exit: medians."""
    starts, ends = [], []
    for _ in range(ROUNDS):
        slot = slot_with(folder, "<task><application>stamp</application><priority>3</priority></task>\n", stamp=STAMP)
        began = time.time()
        assert start(command, slot).wait() == 0
        over = time.time()
        stamp = float((slot / "stamps").read_text())
        starts.append(1000 * (stamp - began))
        ends.append(1000 * (over - stamp))
    return statistics.median(starts), statistics.median(ends)


def memory_mb(command: list[str], folder: Path, *, job_bytes: int = 0) -> tuple[float, float]:
    """Resident and proportional memory of the wrapper, helpers included, while a task runs.

    That task fails, so those behind it, which fill the job file up to `job_bytes`, do not run.
    """
    first = "<task><application>stop</application></task>\n"
    rest = "<task><application>/bin/true</application><command_line>-a one --of many</command_line></task>\n"
    slot = slot_with(folder, first + rest * (job_bytes // len(rest)), stop=STOP)
    process = start(command, slot)
    time.sleep(3)
    members = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    full = [member.memory_full_info() for member in members if member.name() not in {"stop", "sleep"}]
    assert process.wait() != 0
    return sum(one.rss for one in full) / 1e6, sum(one.pss for one in full) / 1e6


def fsync_ms(folder: Path) -> float:
    """One file of the size of a checkpoint, written and synced."""
    path = folder / "fsync"
    times = []
    for _ in range(50):
        with path.open("wb") as file:
            began = time.monotonic()
            file.write(b"x" * 600)
            file.flush()
            os.fsync(file.fileno())
            times.append(1000 * (time.monotonic() - began))
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.many_tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wrapper", type=Path, help="BOINC's wrapper, an executable")
    parser.add_argument("--frozen", type=Path, help="the frozen vmwrapper, in place of the Python one")
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--wrapper-tasks", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="where the slots are made (on a real disk; default: here)")
    arguments = parser.parse_args()
    own = [str(arguments.frozen.resolve())] if arguments.frozen else [sys.executable, "-m", "vmwrapper"]
    measured: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder or Path.cwd()) as scratch:
        folder = Path(scratch)
        print(f"fsync of a small file: {fsync_ms(folder):.2f} ms")
        for name, command, tasks in (
            ("vmwrapper", own, arguments.tasks),
            ("wrapper", [str(arguments.wrapper.resolve())] if arguments.wrapper else [], arguments.wrapper_tasks),
        ):
            if not command:
                continue
            start(command, slot_with(folder, "")).wait()  # compiles, and fills the file cache
            first, end = start_and_end_ms(command, folder)
            resident, proportional = memory_mb(command, folder)
            measured[name] = {
                "a task, ms": per_task_ms(command, folder, tasks),
                "exec to the first task, ms": first,
                "last task to the exit, ms": end,
                "resident memory, MB": resident,
                "proportional memory, MB": proportional,
                "resident memory with a job file of 100 KB, MB": memory_mb(command, folder, job_bytes=LARGE_JOB)[0],
            }
    for what in measured["vmwrapper"]:
        values = [f"{name} {values[what]:.1f}" for name, values in measured.items()]
        if len(values) > 1:
            values.append(f"ratio {measured['vmwrapper'][what] / measured['wrapper'][what]:.3f}")
        print(f"{what}: {', '.join(values)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
