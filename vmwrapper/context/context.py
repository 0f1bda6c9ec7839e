"""What tasks need from the rest of the wrapper, in one bundle; made once, in `vmwrapper.run.run`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmwrapper.boinc.runtime import InitData
from vmwrapper.context.control import Control
from vmwrapper.context.logical_names import LinkRefused, LogicalNames
from vmwrapper.context.timeline import Timeline
from vmwrapper.job.macros import Macros
from vmwrapper.paths import fault_of_input
from vmwrapper.process.leftovers import ProcessList
from vmwrapper.process.programs import HostPrograms
from vmwrapper.process.trees import RUN_MARK
from vmwrapper.state.accounts import Accounts
from vmwrapper.state.ledger import Ledger


@dataclass(frozen=True, slots=True)
class JobContext:
    """The slot, the client, the books."""

    reactor: Any
    source: str
    """Name of the job file, for messages."""
    slot_folder: Path
    names: LogicalNames
    program_umask: int
    """Of host programs: the client's, as with BOINC's wrapper. Ours is stricter."""
    environment: Mapping[str, str]
    """Ours, which host programs inherit."""
    stderr_file: Path | None
    """By hand: stderr.txt, where our lines go besides fd 2. None: fd 2 is all there is."""
    control: Control
    ledger: Ledger
    accounts: Accounts
    timeline: Timeline
    process_list: ProcessList
    host_programs: HostPrograms
    init_data: InitData
    macros: Macros
    time_to_checkpoint: Callable[[], bool]
    checkpoint_completed: Callable[[], None]
    checkpoint_abandoned: Callable[[], None]
    """time_to_checkpoint said yes, and nothing came of it."""

    def resolve(self, logical: str) -> Path:
        """What boinc_resolve_filename gives."""
        return self.names.resolve(logical)

    def path(self, logical: str) -> Path:
        """Where the bytes of a logical name of the slot are. Raises LinkRefused, an OSError."""
        return self.names.source(logical)

    def fault_of_input(self, logical: str) -> str:
        """Why a logical name does not lead to an input file, after the name; "" when it does."""
        try:
            return fault_of_input(self.path(logical), self.slot_folder)
        except LinkRefused as refused:
            return refused.why

    def program_environment(self, setenv: tuple[str, ...], mark: str) -> tuple[str, ...]:
        """Of a host program: its setenv alone when it has any, as with BOINC's wrapper, else ours; and its mark.

        NAME=VALUE each. What stands twice in the job file is there twice: which one counts is the program's affair.
        """
        inherited = (f"{name}={value}" for name, value in self.environment.items() if name != RUN_MARK)
        return (*(setenv or inherited), f"{RUN_MARK}={mark}")
