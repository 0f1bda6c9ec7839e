"""A slot directory. The names of the files in it: vmcontrol.common.slotfiles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmcontrol.common.slotfiles import VM_FOLDER


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot directory."""

    folder: Path

    def file(self, name: str) -> Path:
        return self.folder / name

    @property
    def vm_folder(self) -> Path:
        return self.folder / VM_FOLDER
