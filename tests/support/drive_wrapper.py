"""The wrapper as a program, with the scripted HostMain for the real one: `drive_wrapper.py ARGS...` in a slot.

DRIVE_HOST_MAIN=real: the real HostMain, with the hypervisor of tests.support_hypervisor.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vmwrapper.cli.arguments import parse_arguments
from vmwrapper.options import RunOptions
from vmwrapper.run.ending import leave
from vmwrapper.run.run import run_job

FAKE = Path(__file__).with_name("fake_hostmain.py")

if __name__ == "__main__":
    options = parse_arguments(
        sys.argv[1:], under_client=Path("init_data.xml").exists(), environment=os.environ, is_file=os.path.isfile
    )
    assert isinstance(options, RunOptions)
    real = os.environ.get("DRIVE_HOST_MAIN") == "real"
    leave(run_job(options, host_main=[sys.executable, *(["-m", "tests.support.hypervisor"] if real else [str(FAKE)])]))
