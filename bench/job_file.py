"""Time and memory of reading a job file, of tasks as a real project has them.

    python -m bench.job_file [--tasks 5000 280000] [--folder DIR]

For each number of tasks: the size of the file, the seconds that `vmwrapper check` takes (by the clock, and of the
processor), and how much more memory it has at most than with a job of one task, also as a multiple of the file's size.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

TASK = (
    "   <task>\n      <application>fit</application>\n      "
    "<command_line>{} filters.dat observations.dat</command_line>\n"
    "      <stdout_filename>stdout_file</stdout_filename>\n      <stderr_filename>stderr_file</stderr_filename>\n"
    "   </task>\n"
)
MIB = 1 << 20


def check(path: Path) -> tuple[float, float, int]:
    """Seconds, seconds of the processor, and bytes at most, of `vmwrapper check`."""
    began = time.monotonic()
    pid = os.posix_spawn(sys.executable, [sys.executable, "-m", "vmwrapper", "check", str(path)], os.environ)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"vmwrapper check ended with {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.job_file", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, nargs="+", default=[5000, 280_000], help="numbers of tasks")
    parser.add_argument("--folder", type=Path, help="where the files are made; default: the system's for such things")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        path = Path(scratch) / "job.xml"
        path.write_text(f"<job_desc>\n{TASK.format(0)}</job_desc>\n")
        base_s, _, base = check(path)
        print(f"1 task: {base_s:.2f} s, {base / MIB:.0f} MiB")
        for count in arguments.tasks:
            with path.open("w") as file:
                file.write("<job_desc>\n")
                file.writelines(TASK.format(number) for number in range(count))
                file.write("</job_desc>\n")
            size = path.stat().st_size
            seconds, processor, memory = check(path)
            more = memory - base
            print(
                f"{count} tasks: {size / MIB:.1f} MiB, {seconds:.2f} s ({processor:.2f} s of the processor), "
                f"{more / MIB:.0f} MiB more: {more / size:.1f} times its size"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
