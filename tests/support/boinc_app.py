"""A tiny application that uses the runtime as the wrapper does: `boinc_app.py KIND`, run under the real client.

It reports its progress, notes in events.txt what the client wants, and ends as the file `order` in its slot says. Not a
test itself.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import cast

from vmwrapper.boinc.choose import open_runtime
from vmwrapper.boinc.runtime import AppStatus, Runtime
from vmwrapper.options import BoincRuntimeKind

POLL_S = 0.05


def note(event: str) -> None:
    with Path("events.txt").open("a") as events:
        events.write(event + "\n")


def carry_out(order: str, runtime: Runtime) -> int:
    """The end of the process: its exit status."""
    if order == "temporary":
        runtime.temporary_exit(3600, "Waiting for a better day")
        return 0
    runtime.report_app_status(AppStatus(cpu_time=42.0, checkpoint_cpu_time=42.0, fraction_done=1.0))
    if order == "finish":
        runtime.finish(0, "the app is done")
        return 0
    return 195


def run(runtime: Runtime) -> int:
    runtime.init()
    data = runtime.init_data()
    note(f"init {data.result_name} {data.wu_cpu_time:g}")
    suspended = False
    while True:
        status = runtime.get_status()
        if status.abort_request or status.quit_request or status.no_heartbeat:
            note("abort" if status.abort_request else "quit" if status.quit_request else "lost")
            return 194 if status.abort_request else 0
        if status.suspended != suspended:
            suspended = status.suspended
            note("suspended" if suspended else "resumed")
        if status.reread_init_data_file:
            note(f"period {runtime.reread_init_data().checkpoint_period:g}")
        if runtime.time_to_checkpoint():
            runtime.checkpoint_completed()
            note("checkpoint")
        if not suspended:
            runtime.report_app_status(AppStatus(cpu_time=17.0, checkpoint_cpu_time=11.0, fraction_done=0.375))
        order = Path("order")
        if order.exists():
            return carry_out(order.read_text(), runtime)
        time.sleep(POLL_S)


def main() -> int:
    runtime = open_runtime(cast("BoincRuntimeKind", sys.argv[1]), Path())
    sys.stderr.write(runtime.description + "\n")
    try:
        return run(runtime)
    finally:
        runtime.close()


sys.exit(main())
