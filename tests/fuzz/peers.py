"""Fuzzed: what comes over connections, from a guest or from whoever else is at their other end.

    handshake  both ends of VMLINK/1; neither opens for who does not know the secret
    http       a guest's answer to a request, in pieces as they may arrive
    broker     one client of the embedded broker: by its port, or a guest whose link was dialled

No sockets: connections are strings, time is a clock that is advanced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport

from vmcontrol.broker.embedded import EmbeddedBroker
from vmcontrol.broker.inprocess import InProcessClient
from vmcontrol.broker.rights import GuestRights
from vmcontrol.broker.session import Session
from vmcontrol.common.eventloop import start
from vmcontrol.link.errors import LinkError
from vmcontrol.link.guesthttp import GuestHttp
from vmcontrol.protocol.handshake import GuestHandshake, HostHandshake, Mode, Outcome
from vmcontrol.protocol.messages import CONNECTIONS, REQUESTS, RESPONSES

GUEST = "52:54:00:12:34:56"
LIMIT_S = 5.0
_SECRET = b"c0ffee" * 10


class _Transport(StringTransport):
    """A connection without a socket."""

    disconnecting: bool

    def abortConnection(self) -> None:
        self.disconnecting = True

    def fileno(self) -> int:
        return 0

    def setTcpNoDelay(self, _on: bool) -> None: ...


def _transport() -> Any:
    make: Any = _Transport  # Twisted's has no annotations
    return make()


def _pieces(data: bytes) -> list[bytes]:
    """First byte: how long the pieces are."""
    size = data[0] % 61 + 1 if data else 1
    return [data[at : at + size] for at in range(1, len(data), size)]


def handshake(data: bytes) -> None:
    ends = (
        HostHandshake(_SECRET, Mode.HTTP, token=b"once", nonce="0" * 32),
        GuestHandshake(_SECRET, nonce="1" * 32),
        GuestHandshake(b""),
    )
    for end in ends:
        for piece in _pieces(data):
            step = end.receive(piece)
            assert step.outcome is not Outcome.OPEN, "opened without the secret"
            assert len(step.send) < 1024


def http(data: bytes) -> None:
    clock: Any = Clock()
    transport = _transport()

    async def connect() -> tuple[Any, bytes]:
        return transport, b""

    guest = GuestHttp(clock, clock, name="a guest", connect=connect)
    asked = start(guest.ask("GET", "/v1/folder", limit=LIMIT_S))
    ended: list[object] = []
    asked.addBoth(ended.append)
    for piece in _pieces(data):
        if transport.disconnecting or ended:
            break
        transport.protocol.dataReceived(piece)
    clock.advance(LIMIT_S + 1)
    clock.advance(LIMIT_S + 1)
    assert len(ended) == 1, "a request that does not end"
    failure: Any = ended[0]
    if not isinstance(failure, dict):
        failure.trap(LinkError)
    for call in clock.getDelayedCalls():
        call.cancel()


def broker(data: bytes) -> None:
    """Its second byte: a guest, or a client of the port."""
    clock: Any = Clock()
    embedded = EmbeddedBroker(clock, host="127.0.0.1", port=0, login="a", passcode="b")
    host = InProcessClient(embedded, name="HostMain")
    heard: list[str] = []
    for topic in (CONNECTIONS, RESPONSES):
        host.subscribe(topic, lambda headers, _body: heard.append(headers.get("id") or headers.get("from") or ""))
    host.join()
    is_guest = data[1:2] > b"\x7f"
    rights = GuestRights(GUEST) if is_guest else None
    session: Any = Session(embedded, name="a guest" if is_guest else "", rights=rights)
    transport = _transport()
    session.makeConnection(transport)
    for piece in _pieces(data[:1] + data[2:]):
        if transport.disconnecting:
            break
        session.dataReceived(piece)
        clock.advance(0.01)
    assert session.held <= embedded.limits.memory_bytes
    if is_guest:
        assert {one.upper() for one in heard} <= {GUEST}, "it spoke for another guest"
    clock.advance(60)
    closed: Deferred[None] = embedded.close()
    clock.advance(60)
    session.connectionLost()
    clock.advance(60)
    assert closed.called
    for call in clock.getDelayedCalls():
        call.cancel()


def _answers() -> list[bytes]:
    body = b'{"entries": [{"name": "a", "size": 3, "folder": false}]}'
    plain = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    refused = b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}"
    return [b"\x3c" + one for one in (plain, chunked, refused, b"HTTP/1.1 100 Continue\r\n\r\n" + plain)]


def _frames() -> list[bytes]:
    connect = b"CONNECT\naccept-version:1.2\nlogin:a\npasscode:b\nheart-beat:1000,1000\nhost:x\n\n\0"
    guest = GUEST.encode().replace(b":", b"\\c")
    talk = (
        b"SUBSCRIBE\nid:1\ndestination:%b\nack:client\n\n\0"
        b"SEND\ndestination:%b\nid:%b\nip:1\n\nHELLO\0"
        b"SEND\ndestination:%b\nfrom:%b\nreceipt:q\n\nPONG\0"
        b"ACK\nid:1\n\n\0BEGIN\ntransaction:t\n\n\0"
        b"UNSUBSCRIBE\nid:1\n\n\0DISCONNECT\nreceipt:r\n\n\0"
    ) % (REQUESTS.encode(), CONNECTIONS.encode(), guest, RESPONSES.encode(), guest)
    return [bytes([40, who]) + connect + talk for who in (0, 255)]


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]], tuple[str, ...]]] = {
    "handshake": (
        handshake,
        lambda: [
            b"\x3cVMLINK/1 http %b\nPROOF %b\n" % (b"0" * 32, b"a" * 64),
            b"\x3cPROOF %b %b\nOK\n" % (b"1" * 32, b"a" * 64),
        ],
        ("vmcontrol.protocol.handshake",),
    ),
    "http": (http, _answers, ("vmcontrol.link.guesthttp",)),
    "broker": (broker, _frames, ("vmcontrol.broker.session", "vmcontrol.broker.rights")),
}  # fmt: skip
