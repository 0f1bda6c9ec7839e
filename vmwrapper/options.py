"""The options of a run, as data: what the command line gives and every part of the wrapper may read. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

BoincRuntimeKind = Literal["auto", "library", "python"]
"""auto: libboinc_api where it is found, else pure Python; library, python: that one or an error."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """A request to run a job."""

    job_file: Path | None = None
    """From the command line; None: the logical name job.xml, resolved by the BOINC runtime."""
    extra_args: tuple[str, ...] = ()
    """Arguments appended to the command line of every task."""
    passed_args: tuple[str, ...] = ()
    """The arguments after --passthrough_child: for guest tasks, and for host tasks with append_cmdline_args."""
    under_client: bool = False
    """A BOINC client started us: init_data.xml was in the current directory."""
    boinc_runtime: BoincRuntimeKind = "auto"
    trickle_s: float = 0.0
    """Seconds between trickle-up messages; 0: none. The job file's trickle_up_period counts when this is 0."""
    nthreads: int | None = None
    """Processors the tasks may use; None: not given."""
    device: int | None = None
    """GPU device number; None: not given (init_data.xml may name one)."""
    sporadic: bool = False
    use_tstp: bool = False
    warnings: tuple[str, ...] = ()
    """Values of options that are read as BOINC's wrapper reads them, though they were hardly meant so."""
