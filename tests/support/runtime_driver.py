"""A process with one BOINC runtime in it, driven by a test: one call a line on stdin, one answer a line on stdout.

libboinc keeps its state in globals, so every test needs a process of its own. Not a test itself.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from enum import Enum
from pathlib import Path
from typing import Any

from vmwrapper.boinc.library import LibraryRuntime
from vmwrapper.boinc.python import PureRuntime
from vmwrapper.boinc.runtime import AppStatus, BoincError


def plain(value: Any) -> Any:
    """As JSON can say it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.name
    return str(value) if isinstance(value, Path) else value


def main() -> None:
    kind, lock_wait_s = sys.argv[1], float(sys.argv[2])
    runtime: Any = {"library": LibraryRuntime, "python": PureRuntime}[kind](Path.cwd(), lock_wait_s=lock_wait_s)
    for line in sys.stdin:
        name, arguments, keywords = json.loads(line)
        if name == "report_app_status":
            arguments = [AppStatus(**keywords)]
            keywords = {}
        try:
            found = getattr(runtime, name)
            answer = {"result": plain(found(*arguments, **keywords) if callable(found) else found)}
        except BoincError as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


main()
