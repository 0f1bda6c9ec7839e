"""STOMP 1.0, 1.1 and 1.2 frames: bytes in, typed frames out, and back. Pure: no sockets, no time, no meaning.

Used by the embedded broker (and by tests that play a client); what the commands mean is session.py's.

    FrameError
    |-- BadFrame       what the peer sent is no STOMP, or more than is read (the peer's fault)
    `-- CannotEncode   a frame that we wanted to send has no form in that version of STOMP (our fault)

The three versions differ in how a header is written (sources: the STOMP 1.0, 1.1 and 1.2 specifications, "Value
Encoding", and the programs of protocol 1):

    1.0   nothing is escaped; the first colon ends the name; blanks after it are not part of the value
    1.1   newline, colon and backslash are escaped; any other escape is an error
    1.2   carriage return too; lines may end CR LF
    CONNECT, STOMP and CONNECTED are never escaped, so that both sides can read them before they agreed
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class FrameError(Exception):
    """The two below."""


class BadFrame(FrameError):  # noqa: N818 (named for what arrived)
    """What the peer sent cannot be read; nothing after it on this connection means anything."""


class CannotEncode(FrameError):  # noqa: N818
    """This frame cannot be written in this version of STOMP."""


class Version(StrEnum):
    """The versions of STOMP, as they are named in `accept-version`."""

    V1_0 = "1.0"
    V1_1 = "1.1"
    V1_2 = "1.2"


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame. Of a header that was sent more than once the first counts (STOMP 1.2, "Repeated Header Entries")."""

    command: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


class HeartBeat:
    """A lone end of line between frames."""

    def __repr__(self) -> str:
        return "HEART_BEAT"


HEART_BEAT = HeartBeat()


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """What is read of a peer at most. A peer that sends more is at fault (BadFrame)."""

    line_bytes: int = 160 * 1024
    """Of one header. protocol.text.LITERAL_LIMIT in UTF-8, as an agent of protocol 1 may send it, fits."""
    header_bytes: int = 320 * 1024
    """Of command and headers together."""
    headers: int = 64
    body_bytes: int = 8 * 1024 * 1024
    """A little more than protocol.text.BODY_LIMIT."""


COMMAND_BYTES = 32
"""No command is longer; what is, is no STOMP (a browser, a port scanner)."""

_UNESCAPED = frozenset({"CONNECT", "STOMP", "CONNECTED"})
_ESCAPE = re.compile(r"\\(.?)", re.DOTALL)
_UNESCAPE: Mapping[Version, Mapping[str, str]] = {
    Version.V1_1: {"n": "\n", "c": ":", "\\": "\\"},
    Version.V1_2: {"n": "\n", "c": ":", "\\": "\\", "r": "\r"},
}
_ESCAPED: Mapping[Version, dict[int, str]] = {
    Version.V1_1: str.maketrans({"\\": "\\\\", "\n": "\\n", ":": "\\c"}),
    Version.V1_2: str.maketrans({"\\": "\\\\", "\n": "\\n", ":": "\\c", "\r": "\\r"}),
}


def encode(frame: Frame, version: Version) -> bytes:
    """The bytes of a frame. A content-length is added where it is needed. Raises CannotEncode."""
    return encode_head(frame, version) + frame.body + b"\0"


def encode_head(frame: Frame, version: Version) -> bytes:
    """Command, headers and the empty line: what stands before body and NUL. Raises CannotEncode.

    A body gets its content-length; for 1.0 only where it must have one, as the programs of protocol 1 send none.
    """
    lines = [frame.command, *encode_headers(frame.headers, version, frame.command)]
    needs_length = b"\0" in frame.body if version is Version.V1_0 else bool(frame.body)
    if needs_length and "content-length" not in frame.headers:
        lines.append(f"content-length:{len(frame.body)}")
    return ("\n".join(lines) + "\n\n").encode()


def encode_headers(headers: Mapping[str, str], version: Version, command: str) -> list[str]:
    """The header lines without their ends. Raises CannotEncode."""
    plain = version is Version.V1_0 or command in _UNESCAPED
    lines = []
    for name, value in headers.items():
        both = name + value
        if not name or "\0" in both:
            raise CannotEncode(f"{command}: a header without a name, or with a NUL: {name[:40]!r}")
        if plain:
            if "\n" in both or "\r" in both or ":" in name:
                raise CannotEncode(f"{command}: the header {name[:40]!r} cannot be written without escapes")
            lines.append(f"{name}:{value}")
        else:
            if version is Version.V1_1 and "\r" in both:
                raise CannotEncode(f"{command}: STOMP 1.1 has no escape for the carriage return in {name[:40]!r}")
            lines.append(f"{name.translate(_ESCAPED[version])}:{value.translate(_ESCAPED[version])}")
        try:
            lines[-1].encode()
        except UnicodeEncodeError as error:
            raise CannotEncode(f"{command}: the header {name[:40]!r} is no Unicode text") from error
    return lines


class FrameDecoder:
    """Turns the bytes of one connection into frames.

    Give it bytes with `receive`, take out frames with `next_event` until it says None; between two events the owner
    may set `version`. Keeps at most one unfinished frame within the limits plus what `receive` was given last. After
    BadFrame it must not be used any more.
    """

    def __init__(self, limits: FrameLimits | None = None, version: Version = Version.V1_0) -> None:
        self.version = version
        self._limits = limits or FrameLimits()
        self._buffer = bytearray()
        self._position = 0
        """Up to where the buffer was used."""
        self._scanned = 0
        """Up to where the buffer was searched in vain."""
        self._head: _Head | None = None

    def set_limits(self, limits: FrameLimits) -> None:
        """From the next frame on."""
        self._limits = limits

    def clear(self) -> None:
        """Forget what was received; for who has no more to read."""
        self._buffer = bytearray()
        self._position = self._scanned = 0
        self._head = None

    @property
    def buffered(self) -> int:
        """Bytes that are kept for a frame that is not complete."""
        return len(self._buffer) - self._position + (self._head.size if self._head else 0)

    @property
    def inside_frame(self) -> bool:
        """Whether a frame has begun and is not complete."""
        return self.buffered > 0

    def receive(self, data: bytes) -> None:
        """Take in what came from the peer."""
        if self._position:
            del self._buffer[: self._position]
            self._scanned = max(self._scanned - self._position, 0)
            self._position = 0
        self._buffer += data

    def next_event(self) -> Frame | HeartBeat | None:
        """The next frame or heart-beat, or None when more bytes are needed. Raises BadFrame."""
        while True:
            if self._head is not None and self._head.complete:
                return self._take_body(self._head)
            line = self._take_line(self._head)
            if line is None:
                return None
            if self._head is not None:
                self._head.add(line, self._limits)
            elif line in (b"", b"\r"):
                return HEART_BEAT
            else:
                self._head = _Head(line)

    def _take_line(self, head: _Head | None) -> bytes | None:
        end = self._buffer.find(b"\n", max(self._scanned, self._position))
        length = (end if end >= 0 else len(self._buffer)) - self._position
        if head is None and length > COMMAND_BYTES:
            raise BadFrame(f"no STOMP command: {bytes(self._buffer[self._position : self._position + 20])!r}")
        if length > self._limits.line_bytes:
            raise BadFrame(f"a header of more than {self._limits.line_bytes} bytes")
        if end < 0:
            if self._buffer.find(b"\0", max(self._scanned, self._position)) >= 0:
                raise BadFrame("a frame that ends within its headers")
            self._scanned = len(self._buffer)
            return None
        line = bytes(self._buffer[self._position : end])
        self._position = self._scanned = end + 1
        if b"\0" in line:
            raise BadFrame("a frame that ends within its headers")
        return line

    def _take_body(self, head: _Head) -> Frame | None:
        if head.headers is None:
            head.parse(self.version)
            head.length = self._content_length(head)
        if head.length is not None:
            end = self._position + head.length
            if len(self._buffer) <= end:
                return None
            if self._buffer[end]:
                raise BadFrame(f"{head.command}: no NUL after the {head.length} bytes of content-length")
        else:
            end = self._buffer.find(b"\0", max(self._scanned, self._position))
            length = (end if end >= 0 else len(self._buffer)) - self._position
            if length > self._limits.body_bytes:
                raise BadFrame(f"{head.command}: a body of more than {self._limits.body_bytes} bytes")
            if end < 0:
                self._scanned = len(self._buffer)
                return None
        with memoryview(self._buffer) as whole:
            body = bytes(whole[self._position : end])
        self._position = self._scanned = end + 1
        if self._position == len(self._buffer):
            self.clear()  # gives the memory of a large frame back before it is handled
        self._head = None
        return Frame(head.command, head.headers or {}, body)

    def _content_length(self, head: _Head) -> int | None:
        text = (head.headers or {}).get("content-length")
        if text is None:
            return None
        text = text.strip(" ")
        if not (text.isascii() and text.isdigit() and len(text) <= 12):
            raise BadFrame(f"{head.command}: content-length is no number: {text[:40]!r}")
        if int(text) > self._limits.body_bytes:
            raise BadFrame(f"{head.command}: a body of {int(text)} bytes; {self._limits.body_bytes} are read")
        return int(text)


class _Head:
    """Command and headers of the frame that is being read."""

    def __init__(self, line: bytes) -> None:
        line = line.removesuffix(b"\r")
        if not (line.isalpha() and line.isupper()):
            raise BadFrame(f"no STOMP command: {line!r}")
        self.command = line.decode("ascii")
        self.size = len(line)
        self.complete = False
        self.headers: dict[str, str] | None = None
        self.length: int | None = None
        self._lines: list[bytes] = []

    def add(self, line: bytes, limits: FrameLimits) -> None:
        if line in (b"", b"\r"):
            self.complete = True
            return
        self.size += len(line)
        if len(self._lines) >= limits.headers or self.size > limits.header_bytes:
            raise BadFrame(f"{self.command}: more than {limits.headers} headers or {limits.header_bytes} bytes of them")
        self._lines.append(line)

    def parse(self, version: Version) -> None:
        headers: dict[str, str] = {}
        connecting = self.command in _UNESCAPED
        old = version is Version.V1_0
        if connecting:  # before the versions are agreed only this tells a program of protocol 1
            old = not any(line.startswith((b"accept-version:", b"version:")) for line in self._lines)
        for line in self._lines:
            raw_name, colon, raw_value = line.partition(b":")
            if not colon or not raw_name:
                raise BadFrame(f"{self.command}: no header: {line[:40]!r}")
            if version is not Version.V1_1 or connecting:
                raw_value = raw_value.removesuffix(b"\r")
            if old:
                name, value = raw_name.decode(errors="replace"), raw_value.decode(errors="replace").lstrip(" \t")
            else:
                try:
                    name, value = raw_name.decode(), raw_value.decode()
                except UnicodeDecodeError as error:
                    raise BadFrame(f"{self.command}: a header that is no UTF-8: {line[:40]!r}") from error
                if not connecting:
                    name, value = self._unescape(name, version), self._unescape(value, version)
            headers.setdefault(name, value)
        self._lines.clear()
        self.headers = headers

    def _unescape(self, text: str, version: Version) -> str:
        if "\\" not in text:
            return text
        known = _UNESCAPE[version]

        def replace(match: re.Match[str]) -> str:
            try:
                return known[match[1]]
            except KeyError:
                raise BadFrame(f"{self.command}: {match[0]!r} is no escape of STOMP {version.value}") from None

        return _ESCAPE.sub(replace, text)
