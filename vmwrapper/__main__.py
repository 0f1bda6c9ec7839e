"""`python -m vmwrapper`, and the main program of the frozen executable.

The frozen executable is all our programs in one file. A variable of the environment, set by
`vmwrapper.process.selfstart` or `vmcontrol.common.launch` and taken out of it here, says which one a process is; or the
name that it was called by (a link named HostMain); never a word of the command line. Until that is known nothing heavy
is imported.
"""

from __future__ import annotations

import os
import sys

from vmcontrol.common import frozen


def start() -> int | None:
    """Find out which program this is to be, and be it."""
    if not frozen.is_frozen():
        from vmwrapper.cli.main import main

        return main()
    frozen.begin()
    if "VMWRAPPER_LAUNCH" in os.environ:
        from vmcontrol.common.launch import run_if_asked

        run_if_asked(sys.argv[1:])
    try:
        return _frozen_program()
    finally:
        frozen.end()


def _frozen_program() -> int | None:
    name = os.path.basename(sys.argv[0])  # noqa: PTH119 (imports little)
    if name in ("HostMain", "HostMain.exe"):
        os.environ.setdefault("VMWRAPPER_AS", "vmcontrol.hostmain")
    match os.environ.pop("VMWRAPPER_AS", ""):
        case "vmcontrol.hostmain":
            from vmcontrol.hostmain import main as hostmain

            hostmain.program()
        case "vmwrapper.process.supervisor":
            from vmwrapper.process import supervisor

            return supervisor.main(sys.argv[1:])
    from vmwrapper.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(start())
