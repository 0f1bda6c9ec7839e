"""What tasks need from the rest of the wrapper, in one bundle; built once, in `vmwrapper.run.run`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmwrapper.boinc.runtime import InitData, Runtime
from vmwrapper.context.control import Control
from vmwrapper.context.logical_names import LinkRefused, LogicalNames
from vmwrapper.context.readiness import Readiness
from vmwrapper.context.timeline import Timeline
from vmwrapper.job.macros import Macros
from vmwrapper.job.model import Job
from vmwrapper.options import RunOptions
from vmwrapper.paths import fault_of_input
from vmwrapper.process.leftovers import ProcessList
from vmwrapper.process.orphans import RUN_MARK
from vmwrapper.process.programs import HostPrograms
from vmwrapper.slot import Slot
from vmwrapper.state.accounts import Accounts, FractionDone
from vmwrapper.state.ledger import Ledger


@dataclass(frozen=True, slots=True)
class JobContext:
    """The job, its slot, the client, and what is written down."""

    reactor: Any
    options: RunOptions
    runtime: Runtime
    slot: Slot
    names: LogicalNames
    job: Job
    program_umask: int
    """Of host programs: the client's, as with BOINC's wrapper. Ours is stricter."""
    stderr_file: Path | None
    """Standalone: stderr.txt, where our lines go besides fd 2. None: fd 2 is all there is."""
    control: Control
    process_list: ProcessList
    host_programs: HostPrograms
    accounts: Accounts
    progress: FractionDone
    ledger: Ledger
    timeline: Timeline
    ready: Readiness

    @property
    def init_data(self) -> InitData:
        """The newest content of init_data.xml: the client changes it while the job runs. Never keep a copy."""
        return self.runtime.init_data()

    @property
    def source(self) -> str:
        """Name of the job file, for messages."""
        return self.job.source

    @property
    def slot_folder(self) -> Path:
        return self.slot.folder

    @property
    def macros(self) -> Macros:
        """samples/wrapper/wrapper.cpp, macro_substitute: the client's device comes before --device."""
        device = self.init_data.gpu_device_num
        if device < 0 and self.options.device is not None:
            device = self.options.device
        return Macros(
            project_dir=str(self.init_data.project_dir or "."),
            nthreads=1 if self.options.nthreads is None else self.options.nthreads,
            pwd=str(self.slot.folder),
            gpu_device_num=device,
        )

    def fault_of_input(self, logical: str) -> str:
        """Why a logical name does not lead to an input file, after the name; "" when it does."""
        try:
            return fault_of_input(self.names.source(logical), self.slot.folder)
        except LinkRefused as refused:
            return refused.why

    def program_environment(self, setenv: tuple[str, ...], mark: str) -> tuple[str, ...]:
        """Of a host program: its setenv alone when it has any, as with BOINC's wrapper, else ours; and its mark.

        NAME=VALUE each. What stands twice in the job file is there twice: which one counts is the program's affair.
        """
        inherited = (f"{name}={value}" for name, value in os.environ.items() if name != RUN_MARK)
        return (*(setenv or inherited), f"{RUN_MARK}={mark}")
