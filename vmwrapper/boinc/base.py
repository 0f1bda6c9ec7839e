"""What both runtimes do in the same way: files of the slot, the channels' memory, and what libboinc does not (well) do.

Owns the slot's lock and one mapping of the client's shared memory. The differences are in `library` and `python`.
"""

from __future__ import annotations

import logging
import mmap
import os
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from vmcontrol.common import slotfiles
from vmwrapper.boinc import channels, files, initdata
from vmwrapper.boinc.channels import Channel, Channels
from vmwrapper.boinc.lockfile import WAIT_S, SlotLock
from vmwrapper.boinc.runtime import AppStatus, BoincError, InitData, UploadStatus

WINDOWS_SEGMENT_PREFIX = "shm_"

log = logging.getLogger(__name__)
WAITING_TRICKLES_LIMIT = 1 << 20
"""Characters of messages that wait: a client that takes none must not make us grow."""
SPORADIC_DO_NOT_COMPUTE = 1
"""lib/common_defs.h, CA_DONT_COMPUTE: what counts until the client says something else."""


@dataclass(slots=True)
class Operations:
    """What a status message has beside an AppStatus: operations (boinc_ops_cumulative: gone from the libraries, still
    read by the client) and the state of a sporadic app (client 8)."""

    flops: float = 0.0
    iops: float = 0.0
    sporadic_ac: int = 0

    def text(self) -> str:
        numbers = {"fpops_cumulative": self.flops, "intops_cumulative": self.iops}
        text = "".join(f"<{name}>{number:.9e}</{name}>\n" for name, number in numbers.items() if number)
        return text + (f"<sporadic_ac>{self.sporadic_ac}</sporadic_ac>\n" if self.sporadic_ac else "")


class RuntimeBase:
    """The common half of a `vmwrapper.boinc.runtime.Runtime`."""

    description = ""

    def __init__(self, folder: Path, *, lock_wait_s: float = WAIT_S) -> None:
        self._folder = folder
        self._lock = SlotLock(folder)
        self._lock_wait_s = lock_wait_s
        self._init_data = InitData()
        self._memory: mmap.mmap | None = None
        self._channels: Channels | None = None
        self._last_status: AppStatus | None = None
        self._last_status_sent = False
        self._want_network = False
        self._operations = Operations()
        self._trickles_up: deque[tuple[str, str]] = deque()
        self._trickle_trouble = False
        self._news: set[str] = set()
        self._trickles_seen: set[str] = set()

    # --- start and end

    def _begin(self) -> bool:
        """Lock the slot, read init_data.xml, map the channels. True when there is a client to talk to."""
        self._lock.acquire(self._lock_wait_s)
        try:
            data = initdata.read(self._folder / slotfiles.INIT_DATA)
        except BoincError:
            self._lock.release()
            raise
        if data is None:
            return False
        self._init_data = data
        try:
            self._memory = _map_segment(self._folder, data)
            self._channels = Channels(self._memory)
        except (OSError, ValueError) as error:
            log.warning("the client's shared memory cannot be used, running without a client: %s", error)
            return False
        return True

    def finish(self, status: int, message: str = "", *, notice: bool = False) -> None:
        self.deliver()
        files.write_finish_file(self._folder, status, message, notice=notice)

    def temporary_exit(self, delay_s: int, reason: str, *, notice: bool = False) -> None:
        self.deliver()
        files.write_temporary_exit_file(self._folder, delay_s, reason, notice=notice)

    def close(self) -> None:
        self._channels = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        self._lock.release()

    def deliver(self) -> None:
        """The client reads the channels once more after our exit; so they must hold what is newest."""
        if self._channels is not None and self._last_status is not None and not self._last_status_sent:
            self._channels.replace(Channel.APP_STATUS, self._status_text(self._last_status))
        self._send_next_trickle_up()
        if self._trickles_up:
            log.warning("%d trickle messages were never sent", len(self._trickles_up))
        self._send_news()

    # --- init_data.xml and files

    def init_data(self) -> InitData:
        return self._init_data

    def reread_init_data(self) -> InitData:
        """The client rewrites the file in place; while it is half written the former data count."""
        try:
            data = initdata.read(self._folder / slotfiles.INIT_DATA)
        except BoincError as error:
            log.warning("%s; the former values count", error)
            data = None
        if data is not None:
            self._init_data = data
        return self._init_data

    # --- status to the client

    def report_app_status(self, status: AppStatus) -> None:
        self._last_status = status
        self._last_status_sent = self._channels is None or self._channels.send(
            Channel.APP_STATUS, self._status_text(status)
        )

    def _status_text(self, status: AppStatus) -> str:
        return channels.app_status_text(status, want_network=self._want_network) + self._operations.text()

    def ops_cumulative(self, flops: float, iops: float) -> None:
        self._operations.flops, self._operations.iops = flops, iops

    def sporadic_ca_state(self) -> int:
        text = self._channels.text(Channel.HEARTBEAT) if self._channels is not None else ""
        return channels.read_heartbeat(text).sporadic_ca or SPORADIC_DO_NOT_COMPUTE

    def set_sporadic_ac_state(self, state: int) -> None:
        self._operations.sporadic_ac = state

    # --- network

    def need_network(self) -> None:
        self._want_network = True

    def network_done(self) -> None:
        self._want_network = False

    # --- trickles and uploads

    def send_trickle_up(self, variety: str, text: str) -> None:
        """A trickle that the client has not taken yet is not overwritten: the next waits for it.

        One that cannot be written now (a full disk) waits too, with a warning. Raises BoincError for a NUL in it, and
        when more than WAITING_TRICKLES_LIMIT would wait.
        """
        if "\0" in variety + text:
            raise BoincError("boinc_send_trickle_up: a NUL in the message")
        if self._trickles_up and sum(len(one) for _, one in self._trickles_up) + len(text) > WAITING_TRICKLES_LIMIT:
            raise BoincError("boinc_send_trickle_up: the client has not taken those before")
        self._trickles_up.append((variety, text))
        self._send_next_trickle_up()

    def _send_next_trickle_up(self) -> None:
        somebody_takes_it = self._channels is not None
        if not self._trickles_up or (somebody_takes_it and files.trickle_up_waits(self._folder)):
            return
        try:
            files.write_trickle_up(self._folder, *self._trickles_up[0])
        except OSError as error:
            if not self._trickle_trouble:
                log.warning("a trickle message cannot be written now: %s", error)
            self._trickle_trouble = True
        else:
            self._trickles_up.popleft()
            self._trickle_trouble = False
            self._news.add(channels.HAVE_NEW_TRICKLE_UP)
            self._send_news()

    def _send_news(self) -> None:
        """Tell the client of files for it, as soon as it has taken what it was told last."""
        text = "".join(sorted(self._news))
        if text and self._channels is not None and self._channels.send(Channel.TRICKLE_UP, text):
            self._news.clear()

    def _unseen_trickle_down(self) -> Path | None:
        for name in files.trickles_down(self._folder):
            if name not in self._trickles_seen:
                self._trickles_seen.add(name)
                return Path(name)
        return None

    def upload_status(self, logical: str) -> UploadStatus:
        return files.upload_status(self._folder, logical)

    def upload_file(self, logical: str) -> None:
        try:
            files.request_upload(self._folder, logical)
        except OSError as error:
            raise BoincError(f"boinc_upload_file: {error.strerror}") from error
        self._news.add(channels.HAVE_NEW_UPLOAD_FILE)
        self._send_news()


def process_exists(pid: int) -> bool:
    """Whether the client is there; one of another user is."""
    if sys.platform == "win32":
        import psutil

        return psutil.pid_exists(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _map_segment(folder: Path, data: InitData) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, channels.SEGMENT_BYTES, tagname=WINDOWS_SEGMENT_PREFIX + data.comm_obj_name)
    if data.shm_key != -1:
        raise ValueError("it is that of a version 5 client")
    with (folder / slotfiles.MMAP_FILE).open("r+b") as file:
        return mmap.mmap(file.fileno(), channels.SEGMENT_BYTES)
