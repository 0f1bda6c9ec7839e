"""Which of the two BOINC runtimes this process uses."""

from __future__ import annotations

import logging
from pathlib import Path

from vmwrapper.boinc.python import PureRuntime
from vmwrapper.boinc.runtime import Runtime
from vmwrapper.options import BoincRuntimeKind

log = logging.getLogger(__name__)


def open_runtime(kind: BoincRuntimeKind, folder: Path) -> Runtime:
    """The runtime for a slot, not yet initialised.

    auto: BOINC's own library where it can be used, else pure Python. Raises BoincError for `library` without one.
    The library works in the current directory, so for any other folder auto means pure Python; so it does where the
    library does not understand init_data.xml, which it then would take for no client.
    """
    from vmwrapper.boinc.library import LibraryMissing, LibraryRuntime

    if kind == "python" or (kind == "auto" and not folder.samefile(Path())):
        return PureRuntime(folder)
    try:
        runtime = LibraryRuntime(folder)
    except LibraryMissing as error:
        if kind == "library":
            raise
        log.info("%s; using the runtime in Python", error)
        return PureRuntime(folder)
    if kind == "auto" and not runtime.understands_init_data():
        log.info("libboinc_api does not understand init_data.xml; using the runtime in Python")
        return PureRuntime(folder)
    return runtime
