"""Macros of BOINC's wrapper in the texts of host tasks. Pure. Source: samples/wrapper/wrapper.cpp, macro_substitute.

    $PROJECT_DIR      the project's folder (init_data.xml), else "."
    $NTHREADS         --nthreads, else 1
    $PWD              the current folder, which is the slot
    $GPU_DEVICE_NUM   init_data.xml's number, else --device's; left as it stands when there is neither
    boinc_resolve(F)  in command lines: the physical path of the logical name F

They are replaced in this order, each everywhere, and anywhere in a word. In `application`, $PROJECT_DIR counts alone,
and what stands before it is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROJECT_DIR = "$PROJECT_DIR"
RESOLVE = "boinc_resolve("


class OpenMacro(Exception):  # noqa: N818
    """`boinc_resolve(` without its closing parenthesis."""


@dataclass(frozen=True, slots=True)
class Macros:
    """The values in this run."""

    project_dir: str = "."
    nthreads: int = 1
    pwd: str = "."  # noqa: S105 (a folder)
    gpu_device_num: int = -1
    """-1: not known."""

    def substitute(self, text: str) -> str:
        """For exec_dir, setenv and command_line."""
        text = text.replace(PROJECT_DIR, self.project_dir)
        text = text.replace("$NTHREADS", str(self.nthreads)).replace("$PWD", self.pwd)
        if self.gpu_device_num >= 0:
            text = text.replace("$GPU_DEVICE_NUM", str(self.gpu_device_num))
        return text

    def application(self, text: str) -> str | None:
        """The path of an application that is given with $PROJECT_DIR; None for a logical name."""
        _, macro, rest = text.partition(PROJECT_DIR)
        return f"{self.project_dir}{rest}" if macro else None


def resolve(command_line: str, resolver: Callable[[str], str | Path], *, forward_slashes: bool | None = None) -> str:
    """The command line with each boinc_resolve(F) replaced. Raises OpenMacro.

    forward_slashes: Windows; True: paths with /, False: with backslashes; None: as they are.
    """
    done: list[str] = []
    rest = command_line
    while True:
        before, macro, after = rest.partition(RESOLVE)
        done.append(before)
        if not macro:
            return "".join(done)
        name, closed, rest = after.partition(")")
        if not closed:
            raise OpenMacro(f"'{RESOLVE}' without ')'")
        path = str(resolver(name))
        if forward_slashes is not None:
            path = path.replace("\\", "/") if forward_slashes else path.replace("/", "\\")
        done.append(path)
