"""What goes out beside the reports: trickles of the run time, graphics_status.xml, and what a sporadic app and the
client say to each other.

Looked at once a second by `vmwrapper.run.reports`. Owns these files and nothing else; what goes wrong with one of them
never stops the job.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmcontrol.common.beneath import open_file
from vmcontrol.common.slotfiles import GRAPHICS_STATUS
from vmwrapper.boinc.runtime import BoincError, Runtime, Status
from vmwrapper.state.accounts import Accounts

TRICKLE_VARIETY = "cpu_time"
"""samples/wrapper/wrapper.cpp, check_trickle_period: the name is older than the content, which is the run time."""

_ANEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC

log = logging.getLogger(__name__)


class Trickles:
    """A trickle-up message each time another period of un-suspended run time is over, counted over all starts."""

    def __init__(self, runtime: Runtime, period_s: float, elapsed_s: float, note: Callable[[], bool]) -> None:
        """elapsed_s: run time at this start; what was due before it has been sent before it.

        note: has the run time written down before a message goes, so that no crash sends it again; False: not now.
        """
        self._runtime = runtime
        self._note = note
        self._period_s = period_s
        self._sent = self._periods(elapsed_s)

    def _periods(self, elapsed_s: float) -> int:
        return int(elapsed_s // self._period_s) if self._period_s > 0 else 0

    def look(self, elapsed_s: float) -> None:
        periods = self._periods(elapsed_s)
        if periods > self._sent and self._note():
            self._sent = periods
            try:
                self._runtime.send_trickle_up(TRICKLE_VARIETY, f"<cpu_time>{elapsed_s:f}</cpu_time>")
            except BoincError as error:
                log.warning("no trickle-up message: %s", error)


@dataclass(frozen=True, slots=True)
class GraphicsStatus:
    """boinc_write_graphics_status (api/graphics2_util.cpp): the file that a graphics program reads."""

    folder: Path

    def write(self, accounts: Accounts, fraction: float, status: Status) -> None:
        """Replaced at once, so that no reader sees half of it; not synced, a second later there is another."""
        flags = {
            "no_heartbeat": status.no_heartbeat,
            "suspended": status.suspended,
            "quit_request": status.quit_request,
            "abort_request": status.abort_request,
            "network_suspended": status.network_suspended,
        }
        text = (
            "<graphics_status>\n"
            f"    <updated_time>{time.time():f}</updated_time>\n"
            f"    <cpu_time>{accounts.cpu_time_s:f}</cpu_time>\n"
            f"    <elapsed_time>{accounts.elapsed_s:f}</elapsed_time>\n"
            f"    <fraction_done>{fraction:f}</fraction_done>\n"
            "    <boinc_status>\n"
            + "".join(f"        <{name}>{int(value)}</{name}>\n" for name, value in flags.items())
            + "    </boinc_status>\n</graphics_status>\n"
        )
        temporary = self.folder / f".{GRAPHICS_STATUS}"
        try:
            with os.fdopen(open_file(temporary, self.folder, _ANEW), "w") as file:
                file.write(text)
            temporary.replace(self.folder / GRAPHICS_STATUS)
        except OSError as error:
            log.debug("%s: %s", GRAPHICS_STATUS, error)


class SporadicFiles:
    """--sporadic: files `ca` (what the client says) and `ac` (what the app says), as boinc_sporadic_dir has them."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        self._folder = folder
        self._from_client = folder / "ca"
        self._from_app = folder / "ac"
        self._runtime = runtime
        self._told = 0
        self._read: int | None = None
        for path in (self._from_client, self._from_app):
            with contextlib.suppress(OSError):
                os.close(open_file(path, folder, os.O_WRONLY | os.O_CREAT))

    def look(self) -> None:
        try:
            state = self._runtime.sporadic_ca_state()
            if state != self._told:
                with os.fdopen(open_file(self._from_client, self._folder, _ANEW), "w") as file:
                    file.write(f"{state}\n")
                self._told = state
            changed = self._from_app.stat().st_mtime_ns
            text = self._from_app.read_bytes()[:100].strip() if changed != self._read else b""
            if text:
                self._read = changed
                self._runtime.set_sporadic_ac_state(int(text.split()[0]))
        except (OSError, ValueError) as error:
            log.warning("the files of the sporadic app: %s", error)
