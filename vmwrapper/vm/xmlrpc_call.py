"""An XML-RPC call over HTTP: the documents are the standard library's, the HTTP client is Twisted's.

(twisted.web.xmlrpc.Proxy is built on twisted.web.http.HTTPClient, which Twisted is going to remove.) Each call has a
connection of its own and is made once. Owns nothing between two calls.
"""

from __future__ import annotations

import base64
import xmlrpc.client
from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import Agent, ResponseDone
from twisted.web.error import Error
from twisted.web.http_headers import Headers

from vmcontrol.common.eventloop import start
from vmcontrol.common.httpclient import BytesBody, OneEndpoint

_URL = b"http://localhost/RPC2"


class XmlRpc:
    """A server's methods."""

    def __init__(self, reactor: Any, endpoint: Any, *, user: str = "", password: str = "") -> None:
        """endpoint: IStreamClientEndpoint, where the server is. password: empty where none is asked."""
        self._headers = Headers({b"Content-Type": [b"text/xml"]})
        if password:
            token = base64.b64encode(f"{user}:{password}".encode())
            self._headers.addRawHeader(b"Authorization", b"Basic " + token)
        self._agent = Agent.usingEndpointFactory(reactor, OneEndpoint(endpoint))

    def call(self, method: str, arguments: Sequence[object]) -> Deferred[Any]:
        """The method's result. Cancelling it closes the connection.

        Errback: xmlrpc.client.Fault; twisted.web.error.Error for an HTTP status; ValueError for an answer that is no
        XML-RPC; Twisted's errors of the connection, in part wrapped (ResponseFailed).
        """
        asking = start(self._ask(method, arguments))

        def cancel(answer: Deferred[Any]) -> None:
            answer.errback(CancelledError())  # first, for Agent tells a cancellation as a broken connection
            asking.cancel()

        answer: Deferred[Any] = Deferred(cancel)

        def answered(outcome: object) -> None:
            if not answer.called:
                answer.errback(outcome) if isinstance(outcome, Failure) else answer.callback(outcome)

        asking.addBoth(answered)
        return answer

    async def _ask(self, method: str, arguments: Sequence[object]) -> Any:
        values: Any = tuple(arguments)
        request = xmlrpc.client.dumps(values, method, allow_none=True)
        body: Any = BytesBody(request.replace("\r", "&#13;").encode())  # XML reads a bare one as a newline
        response: Any = await self._agent.request(b"POST", _URL, self._headers, body)
        collector = _Collector()
        response.deliverBody(collector)
        await collector.whole
        if response.code != 200:
            raise Error(response.code, response.phrase)
        return collector.result()


class _Collector(Protocol):
    """The body of an answer, read as it comes: in one go a listing of 10 000 files would keep others waiting.

    (readBody of Twisted 26 warns of its own transport.)
    """

    transport: Any

    def __init__(self) -> None:
        self._parser, self._unmarshaller = xmlrpc.client.getparser()
        self._error: Exception | None = None
        self.whole: Deferred[None] = Deferred(lambda _: self.transport.loseConnection())

    def dataReceived(self, data: bytes) -> None:  # noqa: N802
        if self._error is None:
            try:
                self._parser.feed(data)
            except Exception as error:  # noqa: BLE001 (expat's, and whatever else xmlrpc.client stumbles over)
                self._error = error

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: N802
        if self.whole.called:
            return
        if reason.check(ResponseDone):
            self.whole.callback(None)
        else:
            self.whole.errback(reason)

    def result(self) -> Any:
        """What the method has answered. Raises xmlrpc.client.Fault, ValueError."""
        try:
            if self._error is not None:
                raise self._error
            self._parser.close()
            (result,) = self._unmarshaller.close()
        except xmlrpc.client.Fault:
            raise
        except Exception as error:
            raise ValueError(f"the answer is no XML-RPC: {error}") from error
        return result
