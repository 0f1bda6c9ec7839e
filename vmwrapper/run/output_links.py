"""Outputs that are not where the client looks for them when the job ends: its own words explain nothing.

The client lays a link for each output into the slot. A program that writes through its name fills the project's file;
one that moves a file of its own onto the name replaces the link, and the result stays in the slot. Only links that led
to nothing when this start began are known to be outputs: an input's file is there.
"""

from __future__ import annotations

from pathlib import Path

from vmwrapper.context.logical_names import LinkRefused, LogicalNames
from vmwrapper.paths import is_there, listed

_CONSEQUENCE = 'the client will report "upload failure"'


class OutputLinks:
    """The links of one slot to outputs."""

    def __init__(self, folder: Path, names: LogicalNames) -> None:
        self._folder = folder
        self._names = names
        self._outputs: dict[str, tuple[str, Path]] = {}
        """The text of each link, and where it leads."""

    def note(self) -> None:
        """Before anything of the job runs."""
        for name in self._names.links_now():
            try:
                target = self._names.target(name)
            except LinkRefused:
                continue
            if not target.is_relative_to(self._names.folder) and not is_there(target):
                self._outputs[name] = self._text(name), target

    def complaints(self) -> list[str]:
        """One line for each that was replaced, and one for all that were never written."""
        lines, missing = [], []
        for name, (text, target) in self._outputs.items():
            if self._text(name) == text:
                missing += [] if is_there(target) else [name]
                continue
            there = is_there(self._folder / name)
            done = "replaced the client's link by a file of its own" if there else "removed the client's link"
            if is_there(target):
                lines.append(f"{name}: a program has {done}: what is uploaded is what was written to {target} before")
            else:
                lines.append(f"{name}: a program has {done}, so nothing is at {target}: {_CONSEQUENCE}")
        if missing:
            lines.append(f"not written: {listed(missing)}. Unless it is optional, {_CONSEQUENCE}")
        return lines

    def _text(self, name: str) -> str:
        """Of the link that lies there now; "" when it is none."""
        return self._names.text_now(name)
