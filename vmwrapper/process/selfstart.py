"""How this program starts another of its own (HostMain, a supervisor): from Python, or from a frozen executable.

-P keeps the current folder, a slot full of a project's files, out of the module search path.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from vmcontrol.common import frozen

AS_MODULE = "VMWRAPPER_AS"
"""Environment variable that tells a frozen executable which module's main program it is."""


def own_program(module: str, environment: Mapping[str, str] = os.environ) -> tuple[list[str], dict[str, str]]:
    """Words that start `module` as a program, and variables to add to `environment`, which it is to run with."""
    if frozen.is_frozen():
        frozen.protect()
        return [sys.executable], {AS_MODULE: module, **frozen.variables(environment)}
    utf8 = ["-X", "utf8"] if sys.flags.utf8_mode else []
    return [sys.executable, *utf8, "-P", "-m", module], {}
