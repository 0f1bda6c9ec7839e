"""How long the messages of the real BOINC client take with a job in a VM, from the message in shared memory.

    python -m bench.under_client [--memory MIB]

First one job alone, then two at once, each with a guest of its own; QEMU. The steps are those of test_client_vm.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from guest.image.cache import guest_image
from tests.integration.project.test_client_vm import (
    KINDS,
    LONGER_THAN_THE_TEST,
    QUIT_LIMIT_S,
    Story,
    abort_one,
    finish_one,
    suspend_and_resume,
    timed_end,
)
from tests.support.boinc_client import BoincClient
from tests.support.client_vm import job, task

ROOT = Path(__file__).parents[1]


def story(folder: Path, names: list[str], memory_mb: int) -> dict[str, list[float]]:
    """The first job is aborted at the end, unless it is the only one; the last one finishes."""
    image = guest_image(ROOT / ".cache" / "guest-image")
    work = task(LONGER_THAN_THE_TEST, memory_mb=memory_mb, interval_s=600)
    jobs = [job(name, image, [work], kind=KINDS[i % len(KINDS)]) for i, name in enumerate(names)]
    with BoincClient(folder, jobs) as client:
        told = Story(client, names)
        told.wait_running()
        suspend_and_resume(told)
        for what, cause, act in (
            ("quit", "<quit/>", client.quit),
            ("quit", "<quit/>", client.quit),
            ("TERM to all", "", client.terminate_group),
        ):
            timed_end(told, what, QUIT_LIMIT_S, cause, act)
            client.start()
            told.wait_running()
            told.measure_restart()
        if len(names) > 1:
            abort_one(told, names[0])
        finish_one(told, names[-1])
        for messages in told.messages.values():
            messages.close()
    return told.measured


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.under_client", description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=int, default=256, metavar="MIB", help="of a guest (%(default)s)")
    memory_mb = parser.parse_args().memory
    print(f"guests of {memory_mb} MiB, load before: {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors")
    for names in (["alone"], ["first", "second"]):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for what, seconds in story(Path(folder), names, memory_mb).items():
                print(f"{' and '.join(names)}: {what}: {' '.join(f'{one:.2f}' for one in seconds)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
