"""What the wrapper asks of BOINC's runtime: one interface, two implementations (libboinc_api by ctypes, pure Python).

Names are BOINC's without the prefix `boinc_`. Source: api/boinc_api.h, lib/app_ipc.h, and
https://github.com/BOINC/boinc/wiki/BasicApi. No method blocks longer than a file operation, except `init`, which may
wait up to 35 s for the lock file of a slot (api/boinc_api.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Status:
    """boinc_get_status: what the client wants now. `no_heartbeat`: the client is gone."""

    no_heartbeat: bool = False
    suspended: bool = False
    quit_request: bool = False
    abort_request: bool = False
    network_suspended: bool = False
    reread_init_data_file: bool = False
    """Preferences changed; parse init_data.xml again. Cleared by reading it once."""


@dataclass(frozen=True, slots=True)
class InitData:
    """The parts of init_data.xml that a wrapper uses (lib/app_ipc.h APP_INIT_DATA). Defaults: standalone."""

    project_dir: Path | None = None
    result_name: str = ""
    project_url: str = ""
    """master_url where the file has it, else the name of the project's folder, which the client makes from it."""
    slot: int = 0
    client_pid: int = 0
    ncpus: float = 1.0
    wu_cpu_time: float = 0.0
    """CPU seconds at the last checkpoint, as the client knows them."""
    starting_elapsed_time: float = 0.0
    checkpoint_period: float = 300.0
    rsc_fpops_est: float = 0.0
    rsc_memory_bound: float = 0.0
    rsc_disk_bound: float = 0.0
    gpu_device_num: int = -1
    no_priority_change: bool = False
    """The volunteer wants programs to keep the priority that they were started with."""
    process_priority: int = -1
    """CONFIG_PRIORITY_* of lib/common_defs.h: 0 lowest to 5 real time; -1: not set."""
    app_files: tuple[str, ...] = ()
    """Physical names of the files of the app version, which are code-signed. Empty: the client does not say."""
    cpu_usage_limit: float = 100.0
    """Percent, global_preferences/cpu_usage_limit."""
    app_version: int = 0
    plan_class: str = ""
    shm_key: int = -1
    """-1: the channels are in boinc_mmap_file (Unix clients since version 6)."""
    comm_obj_name: str = ""
    """Windows: name of the file mapping with the channels, without its prefix `shm_`."""


@dataclass(frozen=True, slots=True)
class AppStatus:
    """boinc_report_app_status and its _aux form. Times in CPU seconds, sizes in bytes."""

    cpu_time: float
    checkpoint_cpu_time: float
    fraction_done: float
    other_pid: int = 0
    working_set_bytes: float = 0.0


class UploadStatus(Enum):
    """boinc_upload_status."""

    NOT_READY = -142
    """ERR_IN_PROGRESS: no answer yet."""
    DONE = 0
    FAILED = -1


class Runtime(Protocol):
    """BOINC's runtime, for the main program of an app version (check_heartbeat and handle_process_control on)."""

    description: str
    """For the first line of stderr.txt: which runtime, which version, from where."""

    def init(self) -> None:
        """boinc_init_options. Once, from the main thread, before anything else.

        Raises SlotLocked when another process holds the slot for 35 s, and BoincError when init_data.xml is there but
        not whole. Without init_data.xml, or without the client's shared memory, the runtime is standalone.
        """

    def init_data(self) -> InitData:
        """As read by init, or by the last reread."""

    def reread_init_data(self) -> InitData: ...
    def get_status(self) -> Status: ...
    def report_app_status(self, status: AppStatus) -> None:
        """Send to the client; dropped when the last message is still unread, so send regularly."""

    def time_to_checkpoint(self) -> bool:
        """True begins a critical section, which checkpoint_completed ends."""

    def checkpoint_completed(self) -> None: ...
    def end_critical_section(self) -> None: ...
    def need_network(self) -> None: ...
    def network_done(self) -> None: ...
    def ops_cumulative(self, flops: float, iops: float) -> None: ...
    def send_trickle_up(self, variety: str, text: str) -> None: ...
    def receive_trickle_down(self) -> Path | None:
        """The name of a trickle-down file that has arrived, once each."""

    def sporadic_ca_state(self) -> int:
        """boinc_sporadic_get_ca_state: whether a sporadic app may compute (lib/common_defs.h, SPORADIC_CA_STATE)."""

    def set_sporadic_ac_state(self, state: int) -> None:
        """boinc_sporadic_set_ac_state: goes to the client with the next status."""

    def upload_file(self, logical: str) -> None: ...
    def upload_status(self, logical: str) -> UploadStatus: ...
    def web_graphics_url(self, url: str) -> None: ...
    def remote_desktop_addr(self, address: str) -> None: ...
    def finish(self, status: int, message: str = "", *, notice: bool = False) -> None:
        """Last status to the client, then the finish file, durable. Returns without sleeping: the caller exits."""

    def temporary_exit(self, delay_s: int, reason: str, *, notice: bool = False) -> None:
        """Write the temporary-exit file, durable, and return; the caller exits with 0. An empty reason is refused."""

    def deliver(self) -> None:
        """Before an exit: the newest status and trickle are in the channels, whatever the client has not read yet."""

    def close(self) -> None:
        """Stop timers, release the lock file and the shared memory. Harmless when repeated."""


class BoincError(Exception):
    """The runtime could not do it; `str` is BOINC's meaning of the error number, with the function's name."""


class SlotLocked(BoincError):  # noqa: N818 (the name says more without "Error")
    """Another process works in this slot (boinc_lockfile). It may end: try again later."""
