"""Frozen against unfrozen: time until the first task runs, processor time, memory, what a start writes to the disk.

    python -m bench.frozen [--starts 20] [--output JSON] [PROGRAM...]

PROGRAM: further frozen executables to compare, for example of another build. Each start is a host job whose task notes
the time at which it runs; the file cache is warm but for the first start of all, which is shown apart. Times hold for
an otherwise idle computer: the load is shown beside them, and processor time does not depend on it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
JOB = "<job_desc><task><application>sh</application><command_line>-c '{}'</command_line></task></job_desc>"


@dataclass
class Start:
    """One start; seconds, bytes."""

    first_task_s: float
    whole_s: float
    cpu_s: float


@dataclass
class Weight:
    """While a task runs."""

    processes: int
    memory_bytes: int
    """Proportional set size of all our processes."""
    unpacked_bytes: int
    left_bytes: int
    """In the slot after the end, beyond what an unfrozen wrapper leaves."""


def start_once(command: list[str], folder: Path) -> Start:
    """A host job in a slot of its own."""
    (folder / "job.xml").write_text(JOB.format("date +%s.%N &gt; began"))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.time()
    subprocess.run([*command, "job.xml"], cwd=folder, stderr=subprocess.DEVNULL, check=True, env=environment())
    ended = time.time()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Start(float((folder / "began").read_text()) - began, ended - began, cpu)


def weigh(command: list[str], folder: Path) -> Weight:
    """Memory and disk while a task runs."""
    (folder / "job.xml").write_text(JOB.format("echo &gt; runs; sleep 60"))
    process = subprocess.Popen([*command, "job.xml"], cwd=folder, stderr=subprocess.DEVNULL, env=environment())
    try:
        deadline = time.monotonic() + 30
        while not (folder / "runs").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        first = psutil.Process(process.pid)
        ours = [p for p in [first, *first.children(recursive=True)] if p.name() not in ("sh", "sleep")]
        memory = sum(p.memory_full_info().pss for p in ours)
        unpacked = sum(f.stat().st_blocks * 512 for home in folder.glob("_MEI*") for f in home.rglob("*"))
    finally:
        process.terminate()
        process.wait(20)
    left = sum(f.stat().st_size for home in folder.glob("_MEI*") for f in home.rglob("*"))
    return Weight(len(ours), memory, unpacked, left)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def measure(name: str, command: list[str], starts: int) -> dict[str, object]:
    """All of one program, printed as a line of a table."""
    with tempfile.TemporaryDirectory() as work:
        results = []
        for number in range(starts):
            slot = Path(work, f"slot{number}")
            slot.mkdir()
            results.append(start_once(command, slot))
        slot = Path(work, "weight")
        slot.mkdir()
        weight = weigh(command, slot)
    later = results[1:] or results
    median = Start(*(statistics.median(getattr(one, key) for one in later) for key in asdict(later[0])))
    print(
        f"{name:12} first start {results[0].first_task_s:.2f} s; later {median.first_task_s:.2f} s "
        f"(best {min(one.first_task_s for one in later):.2f}, second {later[0].first_task_s:.2f}, last "
        f"{later[-1].first_task_s:.2f}), whole {median.whole_s:.2f} s, processor {median.cpu_s:.2f} s; "
        f"{weight.processes} processes, {weight.memory_bytes / 1e6:.0f} MB memory, "
        f"{weight.unpacked_bytes / 1e6:.1f} MB unpacked, {weight.left_bytes} bytes left"
    )
    return {"name": name, "starts": [asdict(one) for one in results], "weight": asdict(weight)}


def main() -> None:
    """The program."""
    from tools import build_frozen

    parser = argparse.ArgumentParser(prog="python -m bench.frozen")
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--output", type=Path)
    parser.add_argument("program", nargs="*", type=Path)
    options = parser.parse_args()
    frozen = build_frozen.build(build_frozen.CACHE / "dist", python=build_frozen.default_python())[0]
    size = frozen.stat().st_size / 1e6
    print(f"{frozen.name}: {size:.1f} MB; load {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors")
    python = build_frozen.CACHE / "venv" / "bin" / "python"
    rows = [
        measure("same Python", [str(python), "-m", "vmwrapper"], options.starts),
        measure("this Python", [sys.executable, "-m", "vmwrapper"], options.starts),
        measure("frozen", [str(frozen)], options.starts),
        *(measure(str(path), [str(path.resolve())], options.starts) for path in options.program),
    ]
    if options.output:
        options.output.write_text(json.dumps({"load": os.getloadavg(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
