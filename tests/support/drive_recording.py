"""The wrapper with the scripted HostMain, and a record of its file operations: `drive_recording.py STATES ARGS...`.

Before each rename, removal and sync of a folder in the slot, what a power loss at this moment would leave is copied to
STATES/<number>: once with all that was done so far, and once (`-lost`) without the renames and removals since the last
sync of the folder. A file that is renamed without having been synced is noted in STATES/unsynced.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

from vmwrapper.cli.arguments import parse_arguments
from vmwrapper.options import RunOptions
from vmwrapper.run.ending import leave
from vmwrapper.run.run import run_job

FAKE = Path(__file__).with_name("fake_hostmain.py")
NOT_COPIED = ("guest.vdi", "boinc_lockfile", "stderr.txt")


class Recorder:
    """Wraps the functions of `os` by which files change their names and become durable."""

    def __init__(self, states: Path, slot: Path) -> None:
        self._states, self._slot = states, slot
        self._count = 0
        self._synced: set[tuple[int, int, int]] = set()
        self._not_durable: dict[str, bytes | None] = {}
        self._replace, self._unlink, self._fsync = os.replace, os.unlink, os.fsync

    def install(self) -> None:
        os.replace, os.unlink, os.fsync = self.replace, self.unlink, self.fsync  # type: ignore[assignment]

    def replace(self, source: Any, target: Any, **more: Any) -> None:
        if self._is_ours(target):
            self._note_state()
            found = Path(os.fsdecode(source)).stat()
            if (found.st_ino, found.st_size, found.st_mtime_ns) not in self._synced:
                with (self._states / "unsynced").open("a") as out:
                    out.write(f"{target}\n")
            self._remember(source)
            self._remember(target)
        self._replace(source, target, **more)

    def unlink(self, path: Any, **more: Any) -> None:
        if self._is_ours(path):
            self._note_state()
            self._remember(path)
        self._unlink(path, **more)

    def fsync(self, fd: int) -> None:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            self._note_state()
            self._fsync(fd)
            self._not_durable.clear()
            return
        self._fsync(fd)
        self._synced.add((found.st_ino, found.st_size, found.st_mtime_ns))

    def _is_ours(self, path: Any) -> bool:
        return Path(os.fsdecode(path)).absolute().parent == self._slot

    def _remember(self, path: Any) -> None:
        file = Path(os.fsdecode(path)).absolute()
        if file.name not in self._not_durable:
            self._not_durable[file.name] = file.read_bytes() if file.exists() else None

    def _note_state(self) -> None:
        self._count += 1
        self._copy(self._states / f"{self._count:04d}", {})
        if self._not_durable:
            self._copy(self._states / f"{self._count:04d}-lost", self._not_durable)

    def _copy(self, to: Path, instead: dict[str, bytes | None]) -> None:
        to.mkdir()
        for file in self._slot.iterdir():
            if file.is_file() and file.name not in NOT_COPIED and file.name not in instead:
                try:
                    shutil.copy(file, to / file.name)
                except FileNotFoundError:  # HostMain replaced it just now
                    shutil.copy(file, to / file.name)
        for name, content in instead.items():
            if content is not None:
                (to / name).write_bytes(content)


if __name__ == "__main__":
    Recorder(Path(sys.argv[1]), Path.cwd()).install()
    options = parse_arguments(
        sys.argv[2:], under_client=Path("init_data.xml").exists(), environment=os.environ, is_file=os.path.isfile
    )
    assert isinstance(options, RunOptions)
    leave(run_job(options, host_main=[sys.executable, str(FAKE)]))
