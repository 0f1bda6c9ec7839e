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

from bench.many_tasks import environment

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
    subprocess.run(
        [*command, "job.xml"],
        cwd=folder,
        stderr=subprocess.DEVNULL,
        check=True,
        env=environment(folder.parent / "pycache"),
    )
    ended = time.time()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Start(float((folder / "began").read_text()) - began, ended - began, cpu)


def weigh(command: list[str], folder: Path) -> Weight:
    """Memory and disk while a task runs."""
    (folder / "job.xml").write_text(JOB.format("echo &gt; runs; sleep 60"))
    process = subprocess.Popen(
        [*command, "job.xml"], cwd=folder, stderr=subprocess.DEVNULL, env=environment(folder.parent / "pycache")
    )
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


def measure(programs: dict[str, list[str]], starts: int) -> list[dict[str, object]]:
    """All of the programs, in turn, so that what else the computer does meets all of them. Prints a line for each."""
    results: dict[str, list[Start]] = {name: [] for name in programs}
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as work:
        for number in range(starts):
            for name, command in programs.items():
                slot = Path(tempfile.mkdtemp(prefix=f"slot{number}_", dir=work))
                results[name].append(start_once(command, slot))
        for name, command in programs.items():
            weight = weigh(command, Path(tempfile.mkdtemp(prefix="weight_", dir=work)))
            print(line(name, results[name], weight))
            rows.append({"name": name, "starts": [asdict(one) for one in results[name]], "weight": asdict(weight)})
    return rows


def line(name: str, results: list[Start], weight: Weight) -> str:
    later = results[1:] or results
    median = Start(*(statistics.median(getattr(one, key) for one in later) for key in asdict(later[0])))
    early, late = (statistics.median(one.first_task_s for one in part) for part in (later[:5], later[-5:]))
    return (
        f"{name:12} first start {results[0].first_task_s:.2f} s; later {median.first_task_s:.2f} s "
        f"(best {min(one.first_task_s for one in later):.2f}, next five {early:.2f}, last five {late:.2f}), "
        f"whole {median.whole_s:.2f} s, processor {median.cpu_s:.2f} s; "
        f"{weight.processes} processes, {weight.memory_bytes / 1e6:.0f} MB memory, "
        f"{weight.unpacked_bytes / 1e6:.1f} MB unpacked, {weight.left_bytes} bytes left"
    )


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
    rows = measure(
        {
            "same Python": [str(python), "-m", "vmwrapper"],
            "this Python": [sys.executable, "-m", "vmwrapper"],
            "frozen": [str(frozen)],
            **{str(path): [str(path.resolve())] for path in options.program},
        },
        options.starts,
    )
    if options.output:
        options.output.write_text(json.dumps({"load": os.getloadavg(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
