"""The eight message channels between an application and the BOINC client, and the messages in them. Pure.

Facts: lib/app_ipc.h (SHARED_MEM, MSG_CHANNEL), api/boinc_api.cpp, client/app_control.cpp. A channel is 1024 bytes: a
flag that says "full", then text that ends with NUL. The writer writes the text, then sets the flag; the reader copies
the text, then clears it. A full channel is never overwritten, with one exception that `replace` explains.

Owns no memory: it is given a writable buffer, a mapped file as a rule.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from mmap import mmap

from vmwrapper.boinc.runtime import AppStatus

CHANNEL_BYTES = 1024
SEGMENT_BYTES = 8 * CHANNEL_BYTES

SUSPEND = "<suspend/>"
RESUME = "<resume/>"
QUIT = "<quit/>"
ABORT = "<abort/>"
REREAD_APP_INFO = "<reread_app_info/>"
HEARTBEAT = "<heartbeat/>"
HAVE_TRICKLE_DOWN = "<have_trickle_down/>"
HAVE_NEW_TRICKLE_UP = "<have_new_trickle_up/>\n"
HAVE_NEW_UPLOAD_FILE = "<have_new_upload_file/>\n"


class Channel(IntEnum):
    """In their order in the segment; the comment says who writes."""

    PROCESS_CONTROL_REQUEST = 0  # client
    PROCESS_CONTROL_REPLY = 1  # unused
    GRAPHICS_REQUEST = 2  # unused
    GRAPHICS_REPLY = 3  # application
    HEARTBEAT = 4  # client
    APP_STATUS = 5  # application
    TRICKLE_UP = 6  # application
    TRICKLE_DOWN = 7  # client


class Channels:
    """Both ends of the channels: an application uses it, and a test that plays the client."""

    def __init__(self, buffer: mmap | bytearray) -> None:
        if len(buffer) < SEGMENT_BYTES:
            raise ValueError(f"the shared memory has {len(buffer)} bytes instead of {SEGMENT_BYTES}")
        self._buffer = buffer

    def is_full(self, channel: Channel) -> bool:
        """Whether there is a message that its reader has not taken yet."""
        return self._buffer[channel * CHANNEL_BYTES] != 0

    def send(self, channel: Channel, text: str) -> bool:
        """Write a message; False, and nothing written, when the last one is still unread."""
        if self.is_full(channel):
            return False
        self._write(channel, text)
        return True

    def replace(self, channel: Channel, text: str) -> None:
        """Write a message in place of one that is still unread.

        For the very last status of a process only: the reader looks once a second, and an exit should not wait for it.
        The flag is cleared before the text changes, so the reader sees nothing, the old message or the new one, except
        in the microsecond in which it is just copying; both texts have the same form then.
        """
        self._buffer[channel * CHANNEL_BYTES] = 0
        self._write(channel, text)

    def receive(self, channel: Channel) -> str | None:
        """Take the message out; None when there is none."""
        if not self.is_full(channel):
            return None
        text = self.text(channel)
        self._buffer[channel * CHANNEL_BYTES] = 0
        return text

    def text(self, channel: Channel) -> str:
        """The text in the channel, be it new or taken already: taking leaves it there."""
        start = channel * CHANNEL_BYTES + 1
        content = bytes(self._buffer[start : start + CHANNEL_BYTES - 1])
        return content.split(b"\0", 1)[0].decode("utf-8", "replace")

    def _write(self, channel: Channel, text: str) -> None:
        start = channel * CHANNEL_BYTES
        # The last byte stays NUL for readers that look no further (strlcpy to MSG_CHANNEL_SIZE-1).
        content = text.encode("utf-8", "replace")[: CHANNEL_BYTES - 2] + b"\0"
        self._buffer[start + 1 : start + 1 + len(content)] = content
        self._buffer[start] = 1


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A message of the heartbeat channel."""

    is_beat: bool
    network_suspended: bool = False
    sporadic_ca: int = 0
    """SPORADIC_CA_STATE of lib/common_defs.h; 0: not said."""


def read_heartbeat(text: str) -> Heartbeat:
    """Never fails: what is not there has its default."""
    return Heartbeat(
        is_beat=HEARTBEAT in text,
        network_suspended=_boolean(text, "network_suspended"),
        sporadic_ca=int(_number(text, "sporadic_ca")),
    )


def app_status_text(status: AppStatus, *, want_network: bool) -> str:
    """The message of boinc_report_app_status. The client ignores a fraction of 0 and one that cannot be."""
    lines = [
        f"<current_cpu_time>{status.cpu_time:.9e}</current_cpu_time>",
        f"<checkpoint_cpu_time>{status.checkpoint_cpu_time:.9e}</checkpoint_cpu_time>",
        f"<fraction_done>{status.fraction_done:.9e}</fraction_done>",
    ]
    if status.other_pid:
        lines.append(f"<other_pid>{status.other_pid:d}</other_pid>")
    if status.working_set_bytes:
        lines.append(f"<wss>{status.working_set_bytes:f}</wss>")
    if want_network:
        lines.append("<want_network>1</want_network>")
    return "\n".join(lines) + "\n"


def _number(text: str, name: str) -> float:
    found = re.search(rf"<{name}>\s*([0-9.eE+-]+)\s*</{name}>", text)
    try:
        return float(found[1]) if found else 0.0
    except ValueError:
        return 0.0


def _boolean(text: str, name: str) -> bool:
    return f"<{name}/>" in text or _number(text, name) != 0
