"""The VMLINK/1 handshake: both ends show that they know the secret before anything else is said. Pure, no sockets.

    host:  VMLINK/1 <mode> <host nonce>
    guest: PROOF <guest nonce> <HMAC-SHA256(secret, "guest <mode> <host nonce> <guest nonce>")>
    host:  PROOF <HMAC-SHA256(secret, "host <mode> <host nonce> <guest nonce>")>
    guest: OK, and from there the bytes belong to the mode; or DENIED, and the connection is closed

Lines are ASCII and end with "\\n". Each end feeds what it receives to `receive` and does what the Step says. Anything
unexpected is answered by a denial that does not say why. Both nonces are in both proofs, so a recorded handshake
opens nothing; the words "guest" and "host" in them keep one end's proof from being the other's.

Memory is bounded by LINE_LIMIT. The time limit (HANDSHAKE_LIMIT_S) is the caller's to keep. The bytes after the
handshake are not encrypted: the link never leaves the computer. docs/internals/link.md.
"""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum

AGENT_PORT = 4616
"""The guest's TCP port on which the agent listens. Constant: a restored guest remembers no address."""
GUEST_STOMP_PORT = 61613
"""The guest's own loopback port to which the agent's STOMP client connects. STOMP's registered port."""
LINE_LIMIT = 512
"""Bytes of a line, its end included."""
HANDSHAKE_LIMIT_S = 10.0
"""Seconds from the connection to OK."""

NONCE_BYTES = 16
_OPENING = re.compile(rb"VMLINK/1 (stomp|http) ([0-9a-f]{32})\Z")
_GUEST_PROOF = re.compile(rb"PROOF ([0-9a-f]{32}) ([0-9a-f]{64})\Z")
_HOST_PROOF = re.compile(rb"PROOF ([0-9a-f]{64})\Z")
_DENIED = b"DENIED\n"


class Mode(StrEnum):
    """What the connection is for."""

    STOMP = "stomp"
    HTTP = "http"


class Outcome(StrEnum):
    """How it ended."""

    OPEN = "open"
    DENIED = "denied"


@dataclass(frozen=True, slots=True)
class Step:
    """What to do after bytes arrived: send these, and, with an outcome, go on with `rest` or close."""

    send: bytes = b""
    outcome: Outcome | None = None
    rest: bytes = b""
    """Bytes that came after the handshake's last line; they belong to the mode. Empty when denied."""


def _proof(secret: bytes, who: str, mode: str, host_nonce: str, guest_nonce: str) -> bytes:
    text = f"{who} {mode} {host_nonce} {guest_nonce}"
    return hmac.digest(secret, text.encode("ascii"), "sha256").hex().encode("ascii")


def _nonce() -> str:
    return secrets.token_hex(NONCE_BYTES)


class _Lines:
    """Bytes in, lines out; knows when a line is too long."""

    def __init__(self) -> None:
        self._buffer = b""

    def add(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> bytes | None:
        """The next line without its end, or None. ValueError: it is too long."""
        end = self._buffer.find(b"\n", 0, LINE_LIMIT)
        if end < 0:
            if len(self._buffer) >= LINE_LIMIT:
                raise ValueError("line too long")
            return None
        line, self._buffer = self._buffer[:end], self._buffer[end + 1 :]
        return line

    def take_rest(self) -> bytes:
        rest, self._buffer = self._buffer, b""
        return rest


class _Handshake:
    """What both ends share: lines are fed to `_line` until there is an outcome."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._lines = _Lines()
        self.outcome: Outcome | None = None

    def receive(self, data: bytes) -> Step:
        """Take bytes as they came, in pieces of any size. After an outcome, bytes are ignored."""
        if self.outcome is not None:
            return Step(outcome=self.outcome)
        self._lines.add(data)
        send = b""
        while True:
            try:
                line = self._lines.next()
            except ValueError:
                return self._denied()
            if line is None:
                return Step(send=send)
            answer, is_last = self._line(line)
            if answer is None:
                return self._denied()
            send += answer
            if is_last:
                self.outcome = Outcome.OPEN
                return Step(send, Outcome.OPEN, self._lines.take_rest())

    def _line(self, line: bytes) -> tuple[bytes | None, bool]:
        """The answer to a line (None: deny), and whether the handshake is complete with it."""
        raise NotImplementedError

    def _denied(self) -> Step:
        self.outcome = Outcome.DENIED
        self._lines.take_rest()
        return Step(self._denial, Outcome.DENIED)

    _denial = b""


class HostHandshake(_Handshake):
    """The dialling end. Send `opening` first. `nonce` is for tests only.

    token: what the agent may still know instead of the secret (VirtualBox's guests find it in SMBIOS); empty: nothing.
    """

    def __init__(self, secret: bytes, mode: Mode, *, token: bytes = b"", nonce: str | None = None) -> None:
        super().__init__(secret)
        self._token = token
        self.by_token = False
        """The agent has shown the token: the secret is still to be given to it."""
        self._mode = mode
        self._nonce = nonce or _nonce()
        self._proved = False
        self.opening = f"VMLINK/1 {mode} {self._nonce}\n".encode("ascii")

    @property
    def guest_proved(self) -> bool:
        """The other end has shown that it is the agent of this secret."""
        return self._proved

    def _line(self, line: bytes) -> tuple[bytes | None, bool]:
        if self._proved:
            return (b"", True) if line == b"OK" else (None, False)
        match = _GUEST_PROOF.match(line)
        if match is None or not self._secret:
            return None, False
        guest_nonce = match[1].decode("ascii")
        for known in filter(None, (self._secret, self._token)):
            expected = _proof(known, "guest", self._mode, self._nonce, guest_nonce)
            if hmac.compare_digest(expected, match[2]):
                self._proved, self.by_token = True, known is not self._secret
                return b"PROOF " + _proof(known, "host", self._mode, self._nonce, guest_nonce) + b"\n", False
        return None, False


class GuestHandshake(_Handshake):
    """The listening end. An empty secret denies everybody. `nonce` is for tests only."""

    _denial = _DENIED

    def __init__(self, secret: bytes, *, nonce: str | None = None) -> None:
        super().__init__(secret)
        self._nonce = nonce or _nonce()
        self._host_nonce = ""
        self.mode: Mode | None = None
        """What the host wants; to be believed only when the outcome is OPEN."""

    def _line(self, line: bytes) -> tuple[bytes | None, bool]:
        if not self._secret:
            return None, False
        if self.mode is None:
            match = _OPENING.match(line)
            if match is None:
                return None, False
            self.mode = Mode(match[1].decode("ascii"))
            self._host_nonce = match[2].decode("ascii")
            proof = _proof(self._secret, "guest", self.mode, self._host_nonce, self._nonce)
            return f"PROOF {self._nonce} ".encode("ascii") + proof + b"\n", False
        match = _HOST_PROOF.match(line)
        expected = _proof(self._secret, "host", self.mode, self._host_nonce, self._nonce)
        if match is None or not hmac.compare_digest(expected, match[1]):
            return None, False
        return b"OK\n", True
