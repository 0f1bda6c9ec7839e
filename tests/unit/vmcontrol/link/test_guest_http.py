"""Answers of an agent: what comes before a body has a bound, whatever pieces it comes in, and bodies pass."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionAborted
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from vmcontrol.common.eventloop import start
from vmcontrol.link.errors import GuestRefused, LinkDown
from vmcontrol.link.guesthttp import HEAD_LIMIT, HEAD_SLICE, GuestHttp


class Connection(StringTransport):
    """To an agent that says what it is told to."""

    protocol: Any
    aborted = False

    def abortConnection(self) -> None:
        self.aborted = True
        self.disconnecting = True

    def say(self, data: bytes, size: int) -> None:
        for first in range(0, len(data), size):
            if not self.disconnecting:
                self.protocol.dataReceived(data[first : first + size])
            if self.aborted:
                self.protocol.connectionLost(Failure(ConnectionAborted()))
                return


def asked() -> tuple[Connection, list[Any]]:
    """A GET of /v1/status under way, and its outcome when there is one."""
    connection: Any = Connection()  # type: ignore[no-untyped-call]
    outcome: list[Any] = []
    clock: Any = Clock()

    async def connect() -> tuple[Any, bytes]:
        return connection, b""

    http = GuestHttp(clock, clock, name="vm", connect=connect)
    asking: Deferred[Any] = start(http.ask("GET", "/v1/status", limit=10.0))
    asking.addBoth(lambda result: outcome.append(getattr(result, "value", result)))
    return connection, outcome


GOOD = b'HTTP/1.1 200 OK\r\nContent-Length: 100013\r\nX: y\r\n\r\n{"a": "' + b"x" * 100_000 + b'"}    '


@given(size=st.integers(1, 200_000))
def test_an_honest_answer_arrives_in_whatever_pieces(size: int) -> None:
    connection, outcome = asked()
    connection.say(GOOD, max(size, 50))
    assert outcome == [{"a": "x" * 100_000}]


ENDLESS = {
    "headers": b"HTTP/1.1 200 OK\r\n" + b"X-Y: zzzzzzzzzzzzzzzz\r\n" * 50_000,
    "one header": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1_000_000,
    "a header of many lines": b"HTTP/1.1 200 OK\r\nX: y\r\n" + b"  more of it\r\n" * 50_000,
    "a status line": b"HTTP/1.1 200 " + b"y" * 1_000_000,
    "100 Continue": b"HTTP/1.1 100 Continue\r\n\r\n" * 50_000,
}


@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("size", [7, 1000, 65536, 2_000_000])
def test_what_comes_before_a_body_has_a_bound(kind: str, size: int) -> None:
    connection, outcome = asked()
    taken = 0
    receive = connection.protocol.dataReceived

    def count(data: bytes) -> None:
        nonlocal taken
        taken += len(data)
        receive(data)

    connection.protocol.dataReceived = count
    connection.say(ENDLESS[kind], size)
    assert connection.disconnecting
    assert taken <= 3 * HEAD_LIMIT + max(size, HEAD_SLICE)
    if connection.aborted:
        assert isinstance(outcome[0], LinkDown)


def test_a_refusal_that_is_no_json_is_one_all_the_same() -> None:
    connection, outcome = asked()
    connection.say(b"HTTP/1.1 500 No\r\nContent-Length: 3\r\n\r\n[[[", 65536)
    assert isinstance(outcome[0], GuestRefused)
