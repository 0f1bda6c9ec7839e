"""Timers do not care for the time of day, which HostMain sets in a guest."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import time
from vmcontrol.common import eventloop
reactor = eventloop.the_reactor()
reactor.callLater(0.05, reactor.stop)
assert abs(reactor.seconds() - time.monotonic()) < 1
reactor.run()
print("done")
"""


def test_the_reactor_of_our_programs_runs_on_monotonic_time() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=15)
    assert done.stdout == "done\n", done.stderr
