"""The wrapper's XML-RPC calls, against servers that do all that a server can do."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import xmlrpc.client
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Factory, Protocol

from tests.support.brokers import free_port
from vmcontrol.common.eventloop import start, the_reactor, with_limit
from vmwrapper.vm.hostmain import HostMainClient
from vmwrapper.vm.trouble import (
    CallFailed,
    GuestSilent,
    HostMainError,
    HostMainGone,
    HostMainSilent,
    HypervisorTrouble,
    MissingFile,
)


class _Server(Protocol):
    """Answers the first whole request with what it was told, and closes (unless it `goes_on`); None: never."""

    factory: Any
    transport: Any

    def __init__(self) -> None:
        self._read = b""

    def dataReceived(self, data: bytes) -> None:
        self._read += data
        if b"</methodCall>" in self._read and self.factory.answer is not None:
            self.factory.requests.append(self._read)
            self.transport.write(self.factory.answer)
            if not self.factory.goes_on:
                self.transport.loseConnection()
        elif b"</methodCall>" in self._read:
            self.factory.asked.callback(None)

    def connectionLost(self, reason: object = None) -> None:
        if not self.factory.left.called:
            self.factory.left.callback(None)


def http(body: str, status: str = "200 OK") -> bytes:
    content = body.encode()
    return f"HTTP/1.1 {status}\r\nContent-Type: text/xml\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def fault(code: int, text: str) -> bytes:
    return http(xmlrpc.client.dumps(xmlrpc.client.Fault(code, text)))


def result(value: Any) -> bytes:
    return http(xmlrpc.client.dumps((value,), methodresponse=True, allow_none=True))


@asynccontextmanager
async def client(answer: bytes | None) -> AsyncIterator[tuple[HostMainClient, Any]]:
    reactor: Any = the_reactor()
    server: Any = Factory.forProtocol(_Server)
    server.goes_on = False
    server.answer, server.requests, server.asked, server.left = answer, [], Deferred(), Deferred()
    port = reactor.listenTCP(0, server, interface="127.0.0.1")
    try:
        yield HostMainClient(reactor, "127.0.0.1", port.getHost().port, "the secret: ü"), server
    finally:
        await port.stopListening()


@pytest.mark.filterwarnings("error")
@pytest_twisted.ensureDeferred
async def test_a_result_comes_back_and_the_arguments_arrive_as_they_were() -> None:
    async with client(result({"a": [1, None, "ü\n"]})) as (host, server):
        assert await host.call("method", "vm", ["line\r\nline\r", "<&>"], {"x": None}) == {"a": [1, None, "ü\n"]}
        head, _, body = server.requests[0].partition(b"\r\n\r\n")
        assert head.startswith(b"POST /RPC2 HTTP/1.1\r\n")
        token = base64.b64encode("vmwrapper:the secret: ü".encode())
        assert b"Authorization: Basic " + token in head.split(b"\r\n")
        assert xmlrpc.client.loads(body) == (("vm", ["line\r\nline\r", "<&>"], {"x": None}), "method")


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (fault(-1, "No VM by the name/id x found"), CallFailed, "No VM by the name"),
        (fault(1, json.dumps({"key": "k", "reason": "no room", "delay_s": 9})), HypervisorTrouble, "no room"),
        (fault(2, json.dumps({"path": "out", "listing": ["a", "b/"]})), MissingFile, "out is missing"),
        (fault(3, "the guest is silent"), GuestSilent, "silent"),
        (fault(1, "no JSON"), CallFailed, "no JSON"),
        (http("no", "401 Unauthorized"), HostMainGone, "401"),
        (http("<html>"), HostMainGone, "no XML-RPC"),
        (http("<methodResponse><params></params></methodResponse>"), HostMainGone, "no XML-RPC"),
        (http("<methodResponse><params><param><value><int>x</int></value></param></params></methodResponse>"),
         HostMainGone, "no XML-RPC"),
        (result("x" * 9000)[:5000], HostMainGone, "onnection"),
        (b"", HostMainGone, "onnection"),
        (b"nonsense\r\n\r\n", HostMainGone, "method"),
    ],
)  # fmt: skip
@pytest_twisted.ensureDeferred
async def test_whatever_goes_wrong_is_a_host_error(answer: bytes, error: type[HostMainError], text: str) -> None:
    async with client(answer) as (host, _):
        with pytest.raises(error, match=text):
            await host.call("method")


@pytest_twisted.ensureDeferred
async def test_a_server_that_does_not_answer_is_left_at_the_limit() -> None:
    async with client(None) as (host, server):
        with pytest.raises(HostMainSilent, match="method"):
            await host.call("method", limit_s=0.2)
        await with_limit(the_reactor(), 5, "the connection's end", server.left)


@pytest_twisted.ensureDeferred
async def test_a_call_that_is_cancelled_is_no_error_of_the_hosts() -> None:
    async with client(None) as (host, server):
        calling = start(host.call("method"))
        await with_limit(the_reactor(), 5, "the request", server.asked)
        calling.cancel()
        with pytest.raises(CancelledError):
            await calling
        await with_limit(the_reactor(), 5, "the connection's end", server.left)


@pytest_twisted.ensureDeferred
async def test_nobody_there() -> None:
    host = HostMainClient(the_reactor(), "127.0.0.1", free_port(), "secret")
    with pytest.raises(HostMainGone, match="refused"):
        await host.call("method")


@pytest_twisted.ensureDeferred
async def test_an_answer_that_stands_still_is_left_at_the_limit() -> None:
    async with client(result("x" * 9000)[:5000]) as (host, server):
        server.goes_on = True
        with pytest.raises(HostMainSilent, match="method"):
            await host.call("method", limit_s=0.5)
        await with_limit(the_reactor(), 5, "the connection's end", server.left)


def test_nothing_of_it_is_deprecated() -> None:
    program = "import vmwrapper.vm.hostmain, sys; assert 'twisted.web.xmlrpc' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning", "-c", program], check=True, timeout=60)
