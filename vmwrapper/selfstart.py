"""How this program starts another of its own programs (HostMain, the keeper): from Python, or from a frozen executable.

-P keeps the current folder, a slot full of a project's files, out of the module search path.
"""

from __future__ import annotations

import sys

AS_MODULE = "VMWRAPPER_AS"
"""Environment variable that tells a frozen executable which module's main program it is."""


def own_program(module: str) -> tuple[list[str], dict[str, str]]:
    """Words that start `module` as a program, and variables to add to its environment."""
    if getattr(sys, "frozen", False):
        return [sys.executable], {AS_MODULE: module}
    return [sys.executable, "-P", "-m", module], {}
