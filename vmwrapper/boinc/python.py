"""BOINC's runtime in pure Python, for where libboinc_api is not found (Windows, macOS, most computers) and on demand.

It has no thread and no timer: whoever uses it polls `get_status` ten to twenty times a second, and that is when
messages are taken and sent. Source of all rules: api/boinc_api.cpp.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable
from pathlib import Path

from vmwrapper.boinc import channels
from vmwrapper.boinc.base import RuntimeBase, process_exists
from vmwrapper.boinc.channels import Channel
from vmwrapper.boinc.lockfile import WAIT_S
from vmwrapper.boinc.runtime import Status

HEARTBEAT_GIVE_UP_S = 30.0
"""HEARTBEAT_GIVEUP_SECS; only for clients that did not tell their pid."""
CLIENT_CHECK_S = 10.0
"""client_dead: how often the client's pid is looked at."""
LONGEST_TICK_S = 1.0
"""A gap between two polls counts at most so much towards the give-up: a computer that slept lost no client."""

log = logging.getLogger(__name__)


class PureRuntime(RuntimeBase):
    """A `vmwrapper.boinc.runtime.Runtime`."""

    description = f"BOINC runtime in Python {platform.python_version()}"

    def __init__(
        self,
        folder: Path,
        *,
        lock_wait_s: float = WAIT_S,
        monotonic: Callable[[], float] = time.monotonic,
        client_exists: Callable[[int], bool] = process_exists,
    ) -> None:
        super().__init__(folder, lock_wait_s=lock_wait_s)
        self._monotonic = monotonic
        self._client_exists = client_exists
        self._suspended = self._quit = self._abort = self._reread = self._no_heartbeat = False
        self._network_off = False
        self._have_trickle_down = True  # one may be left from before a restart
        self._graphics: dict[str, str] = {}
        self._last_checkpoint = self._last_poll = self._last_client_check = 0.0
        self._without_heartbeat_s = 0.0

    def init(self) -> None:
        self._begin()
        self._last_checkpoint = self._last_poll = self._last_client_check = self._monotonic()

    def get_status(self) -> Status:
        self._poll()
        reread, self._reread = self._reread, False
        return Status(
            no_heartbeat=self._no_heartbeat,
            suspended=self._suspended,
            quit_request=self._quit,
            abort_request=self._abort,
            network_suspended=self._network_off,
            reread_init_data_file=reread,
        )

    def time_to_checkpoint(self) -> bool:
        return self._monotonic() - self._last_checkpoint >= self._init_data.checkpoint_period

    def checkpoint_completed(self) -> None:
        self._last_checkpoint = self._monotonic()

    def end_critical_section(self) -> None:
        """Nothing: no message is ever held back here."""

    def receive_trickle_down(self) -> Path | None:
        self._poll()
        if not self._have_trickle_down:
            return None
        found = self._unseen_trickle_down()
        self._have_trickle_down = found is not None
        return found

    def web_graphics_url(self, url: str) -> None:
        self._graphics["web"] = f"<web_graphics_url>{url}</web_graphics_url>"
        self._send_graphics()

    def remote_desktop_addr(self, address: str) -> None:
        self._graphics["desktop"] = f"<remote_desktop_addr>{address}</remote_desktop_addr>"
        self._send_graphics()

    def deliver(self) -> None:
        super().deliver()
        self._send_graphics()

    # --- polling

    def _poll(self) -> None:
        if self._channels is None:
            return
        self._take_process_control(self._channels.receive(Channel.PROCESS_CONTROL_REQUEST) or "")
        self._watch_client(self._channels.receive(Channel.HEARTBEAT) or "")
        if channels.HAVE_TRICKLE_DOWN in (self._channels.receive(Channel.TRICKLE_DOWN) or ""):
            self._have_trickle_down = True
        self._send_next_trickle_up()
        self._send_news()
        self._send_graphics()

    def _take_process_control(self, text: str) -> None:
        if channels.SUSPEND in text:
            self._suspended = True
        if channels.RESUME in text:
            self._suspended = False
        self._quit = self._quit or channels.QUIT in text
        self._abort = self._abort or channels.ABORT in text
        self._reread = self._reread or channels.REREAD_APP_INFO in text

    def _watch_client(self, heartbeat: str) -> None:
        now = self._monotonic()
        tick = min(now - self._last_poll, LONGEST_TICK_S)
        self._last_poll = now
        is_beat = False
        if heartbeat:
            beat = channels.read_heartbeat(heartbeat)
            is_beat, self._network_off = beat.is_beat, beat.network_suspended
        self._without_heartbeat_s = 0.0 if is_beat else self._without_heartbeat_s + tick
        pid = self._init_data.client_pid
        if not pid:
            if self._without_heartbeat_s > HEARTBEAT_GIVE_UP_S:
                self._lose_client(f"no heartbeat from the client for {HEARTBEAT_GIVE_UP_S:g} s")
        elif now - self._last_client_check >= CLIENT_CHECK_S:
            self._last_client_check = now
            if not self._client_exists(pid):
                self._lose_client(f"the client (process {pid}) no longer exists")

    def _lose_client(self, why: str) -> None:
        if not self._no_heartbeat:
            log.warning("%s", why)
        self._no_heartbeat = True

    def _send_graphics(self) -> None:
        for key, text in list(self._graphics.items()):
            if self._channels is not None and self._channels.send(Channel.GRAPHICS_REPLY, text):
                del self._graphics[key]
