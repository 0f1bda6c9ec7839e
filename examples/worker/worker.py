#!/usr/bin/env python3
"""The worker of the VmApps page: it reads stdin and writes stdout, reads the file `in` and writes the file `out`.

usage: worker.py CPU_SECONDS

Everything it reads comes out in upper case, as in BOINC's own worker; in between it computes for as many seconds of
CPU time as it was told. The file `fraction_done` says how far it is.
"""

import sys
import time
from pathlib import Path

MONOTONE_STEP = 0.02
"""The fraction done is written each time it has grown by this much: often enough for a progress bar."""


def compute(cpu_seconds: float) -> int:
    """Burn CPU time with arithmetic whose result is printed, so that it cannot be left out."""
    value, told = 1, 0.0
    while (done := time.process_time()) < cpu_seconds:
        for _ in range(10_000):
            value = value * 1103515245 + 12345 & 0x7FFFFFFF
        if done / cpu_seconds - told >= MONOTONE_STEP:
            told = done / cpu_seconds
            Path("fraction_done").write_text(f"{told:.3f}\n")
    return value


def main() -> int:
    """Run as the page says; a bad argument or a missing file ends in a message and a status that is not 0."""
    try:
        cpu_seconds = float(sys.argv[1])
    except (IndexError, ValueError):
        print("usage: worker.py CPU_SECONDS", file=sys.stderr)
        return 2
    text = Path("in").read_text()
    words = sys.stdin.read()
    print(f"worker: {len(words)} characters on stdin, {len(text)} in `in`", file=sys.stderr)
    compute(cpu_seconds)
    Path("out").write_text(text.upper())
    sys.stdout.write(words.upper())
    return 0


if __name__ == "__main__":
    sys.exit(main())
