"""`python -m vmwrapper`, and the main program of the frozen executable.

The frozen executable is all our programs in one file: a variable of the environment, set by `vmwrapper.selfstart` and
taken out of it here, says which one a process is.
"""

from __future__ import annotations

import os
import runpy
import sys

from vmwrapper.cli import main

if __name__ == "__main__":
    module = os.environ.pop("VMWRAPPER_AS", None)
    if module and getattr(sys, "frozen", False):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.exit(main())
