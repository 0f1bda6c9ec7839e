"""Main program of the frozen VMMain, for guests without Python: the agent, and the supervisor of one command."""

from __future__ import annotations

import os
import sys

from vmcontrol.common import frozen

if __name__ == "__main__":
    frozen.begin()
    if os.environ.pop("VMMAIN_SUPERVISOR", ""):
        from guest.commands import supervisor

        supervisor.main()
    else:
        from guest.agent import main

        code = main.main()
        sys.stderr.flush()
        frozen.end()
        os._exit(code)
