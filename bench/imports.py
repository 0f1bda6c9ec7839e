"""What the imports of a host job cost: time and memory of each, in a fresh interpreter, and of each after another.

    python -m bench.imports [--rounds 15]

Prints medians: milliseconds of processor time and megabytes of resident memory that the second import adds to the
first. The rounds take turns, so that a load that comes and goes is the same for all; `chrt -r 1` keeps most of it away.
For what is imported by whom: `python -X importtime -m vmwrapper` in a slot.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.many_tasks import environment

PROGRAM = """
import os, time
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
{first}
began, memory = time.process_time(), resident()
{second}
print(1000 * (time.process_time() - began), resident() - memory, resident())
"""
REACTOR = "import twisted.internet.reactor"
WRAPPER = "from vmwrapper.cli import main as cli; from vmwrapper.run import run as runner"
USED = "import signal, select, logging, dataclasses, tempfile, ctypes, json, hashlib, shutil"
"""What the wrapper's modules import themselves, Twisted apart."""
PAIRS = (
    ("pass", "pass"),
    ("pass", REACTOR),
    ("pass", "import asyncio"),
    ("import asyncio", "import http.cookiejar"),
    ("import asyncio, http.cookiejar", REACTOR),
    ("pass", USED),
    (USED, REACTOR),
    (f"{USED}\n{REACTOR}", WRAPPER),
    ("pass", f"{WRAPPER}\n{REACTOR}"),
    (f"{WRAPPER}\n{REACTOR}", "import psutil"),
    (f"{WRAPPER}\n{REACTOR}", "import vmwrapper.vm.services, vmwrapper.vm.session"),
)


def measured(pair: tuple[str, str], pycache: Path) -> list[float]:
    command = [sys.executable, "-c", PROGRAM.format(first=pair[0], second=pair[1])]
    done = subprocess.run(command, env=environment(pycache), capture_output=True, text=True, check=True, timeout=60)
    return [float(word) for word in done.stdout.split()]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.imports", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        for pair in PAIRS:
            measured(pair, Path(folder))  # compiles
        results = [[measured(pair, Path(folder)) for pair in PAIRS] for _ in range(rounds)]
    for number, (first, second) in enumerate(PAIRS):
        time_ms, added, whole = (
            statistics.median(values) for values in zip(*(one[number] for one in results), strict=True)
        )
        after = "" if first == "pass" else f" after {first}"
        print(f"{time_ms:.0f} ms, {added:.1f} MB (then {whole:.1f}): {second}{after}".replace("\n", "; "))
    return 0


if __name__ == "__main__":
    sys.exit(main())
