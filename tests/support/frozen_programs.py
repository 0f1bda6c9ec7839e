"""The frozen executables for tests: built once from the sources as they stand. No tests."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import psutil

from tools import build_frozen

UNPACKED = "_MEI*"


@functools.cache
def frozen_programs() -> Path:
    """The folder with `vmwrapper` and `vmmain`. Building takes half a minute when something has changed."""
    output = build_frozen.CACHE / "dist"
    build_frozen.build(output, python=os.environ.get("FROZEN_PYTHON") or build_frozen.default_python())
    return output


def second_process(first: int) -> psutil.Process:
    """The program itself: the boot loader's process has exactly one child."""
    (child,) = psutil.Process(first).children()
    return child


def unpacked(folder: Path) -> list[str]:
    """What was unpacked into a slot and is still there."""
    return sorted(path.name for path in folder.glob(UNPACKED))
