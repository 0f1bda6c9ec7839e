"""HTTP requests to an agent, over connections that `connect` has opened and authenticated. Twisted's client.

Owns a small pool of persistent connections. Nothing a guest answers is taken without a bound: what comes before a body
by HEAD_LIMIT, JSON by ANSWER_LIMIT and ANSWER_VALUES, time by the caller's limit, which counts un-paused time only.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import quote, urlencode

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure
from twisted.web.client import Agent, HTTPConnectionPool, ResponseDone
from twisted.web.http_headers import Headers
from twisted.web.iweb import IResponse

from vmcontrol.common.eventloop import Clock, LimitReached, start, with_limit
from vmcontrol.common.httpclient import BytesBody, OneEndpoint, why_failed
from vmcontrol.link.errors import GuestRefused, LinkDown, LinkError
from vmcontrol.link.streams import hand_over
from vmcontrol.protocol.text import BadMessage, bounded_json

log = logging.getLogger(__name__)

ANSWER_LIMIT = 4 * 1024 * 1024
"""Bytes of a JSON answer: a full listing fits (guest.downloads.LISTING_BYTES, and the folder's own name)."""
ANSWER_VALUES = 120_000
"""Values and keys of it: a full listing of 10 000 entries has 80 000."""
HEAD_LIMIT = 8 * 1024
"""Bytes of status lines and headers before a body; ours have 300. Twisted bounds a line and not their number."""
HEAD_SLICE = 1024
"""Bytes of them that are read in one go."""
IDLE_LIMIT_S = 120
"""Seconds after which an unused connection is closed."""

Connect = Callable[[], Awaitable[tuple[Any, bytes]]]


class _Endpoint:
    def __init__(self, connect: Connect) -> None:
        self._connect = connect

    def connect(self, factory: Any) -> Deferred[Any]:
        return start(self._open(factory))

    async def _open(self, factory: Any) -> Any:
        transport, rest = await self._connect()
        protocol = factory.buildProtocol(transport.getPeer())
        _bound_head(protocol)
        hand_over(transport, protocol, rest)
        return protocol


def _bound_head(protocol: Any) -> None:
    """Cut the connection when more than HEAD_LIMIT comes before a body. `_parser` is Twisted's HTTPClientParser.

    Twisted (26.10) has no such bound and no public place for one; tests/unit/vmcontrol/link/test_guest_http.py tells of
    a change.
    """
    receive, size = protocol.dataReceived, 0

    def in_head() -> bool:
        parser = protocol._parser
        return parser is not None and parser.state in ("STATUS", "HEADER")

    def data_received(data: bytes) -> None:
        nonlocal size
        while in_head() and data:
            size += min(len(data), HEAD_SLICE)
            if size > HEAD_LIMIT:
                size = 0
                protocol.transport.abortConnection()
                return
            receive(data[:HEAD_SLICE])
            data = data[HEAD_SLICE:]
        size = size if in_head() else 0
        if data:
            receive(data)

    protocol.dataReceived = data_received


class _Collector(Protocol):
    """A body of bounded size, whole."""

    transport: Any = None

    def __init__(self, done: Deferred[bytes]) -> None:
        self._done: Deferred[bytes] | None = done
        self._parts: list[bytes] = []
        self._size = 0

    def dataReceived(self, data: bytes) -> None:  # noqa: N802
        self._parts.append(data)
        self._size += len(data)
        if self._size > ANSWER_LIMIT:
            self._end(LinkDown("the guest's answer is too long"))
            self.close()

    def connectionLost(self, reason: Failure | None = None) -> None:  # noqa: N802
        if reason is not None and reason.check(ResponseDone):
            self._end(None)
        else:
            self._end(LinkDown("the connection broke in the middle of the guest's answer"))

    def close(self) -> None:
        if self.transport is not None:
            self.transport.loseConnection()

    def _end(self, error: Exception | None) -> None:
        done, self._done = self._done, None
        if done is not None and not done.called:
            if error is None:
                done.callback(b"".join(self._parts))
            else:
                done.errback(error)


class GuestHttp:
    """Requests to one agent."""

    def __init__(self, reactor: Any, clock: Clock, *, name: str, connect: Connect) -> None:
        self._reactor = reactor
        self._clock = clock
        self._name = name
        self._connect = connect
        self._new_pool()

    async def close(self) -> None:
        """Close the unused connections; those in use end with their requests. It can be used again afterwards."""
        pool = self._pool
        self._new_pool()
        await pool.closeCachedConnections()

    async def ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: bytes = b"",
        limit: float,
    ) -> dict[str, Any]:
        """A small request with a JSON answer. LinkDown, GuestRefused."""
        producer = BytesBody(body) if body or method in ("PUT", "POST") else None
        response = await self.send(method, path, query=query, body=producer, limit=limit)
        return await self.answer(response, f"{method} {path}", limit=limit)

    async def send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        limit: float | None,
    ) -> Any:
        """Send a request; the response's headers are there when it returns. LinkDown. limit None: the caller's."""
        target = quote(path)
        if query:
            target += "?" + urlencode(query, errors="surrogateescape")
        raw = Headers({name: [value] for name, value in (headers or {}).items()})
        # The host in the URI is the key of the pool, and what the guest sees as Host. It has no other meaning.
        uri = b"http://guest" + target.encode("ascii")
        request: Deferred[IResponse] = self._agent.request(method.encode("ascii"), uri, raw, body)
        what = f"{self._name}: {method} {path}"
        try:
            if limit is None:
                return await request
            return await with_limit(self._clock, limit, what, request)
        except LinkError:
            raise
        except LimitReached as error:
            raise LinkDown(str(error)) from error
        except Exception as error:
            raise LinkDown(f"{what}: {why_failed(error)}") from error

    async def answer(self, response: Any, what: str, *, limit: float) -> dict[str, Any]:
        """The JSON object that a response carries. LinkDown, GuestRefused."""
        done: Deferred[bytes] = Deferred()
        collector = _Collector(done)
        response.deliverBody(collector)
        try:
            content = await with_limit(self._clock, limit, f"{self._name}: {what}", done)
        except LimitReached as error:
            collector.close()
            raise LinkDown(str(error)) from error
        try:
            parsed = bounded_json(content, ANSWER_VALUES)
        except (ValueError, BadMessage):
            parsed = None
        if not isinstance(parsed, dict):
            if response.code >= 400:
                parsed = {}
            else:
                raise LinkDown(f"{self._name}: {what}: the guest's answer is no JSON object")
        if response.code >= 400:
            raise GuestRefused(response.code, parsed, f"{self._name}: {what}")
        return parsed

    def _new_pool(self) -> None:
        self._pool = HTTPConnectionPool(self._reactor, persistent=True)
        self._pool.maxPersistentPerHost = 2
        self._pool.cachedConnectionTimeout = IDLE_LIMIT_S
        self._agent = Agent.usingEndpointFactory(self._reactor, OneEndpoint(_Endpoint(self._connect)), self._pool)
