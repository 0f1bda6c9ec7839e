"""The XML-RPC server: HTTP in, method calls out. Knows nothing of VMs; the methods are those that it is given.

Serves /RPC2 and /. Owns the listening port, the wrapper's door (vmcontrol.door) and their connections. Never evaluates
what it receives; bodies are bounded, document types and entities are refused. Who comes through the door is the wrapper
and needs nothing else. At the port a request that a browser sends for a web page is refused:
 - the content type must be text/xml or application/xml, which a page cannot send without asking first (and OPTIONS is
   never answered with a permission);
 - a request with an Origin or Sec-Fetch-Site header is refused;
 - without a secret the Host header must name this computer, so that no foreign name can be bent to point here.

With a secret every request must show it by HTTP Basic authentication (user `vmwrapper`). Connections that have not yet
are in a small pool of their own (vmcontrol.admission). Without a secret, as in 2009, there is one pool for all.
"""

from __future__ import annotations

import base64
import hmac
import io
import ipaddress
import logging
import re
import xmlrpc.client
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from twisted.internet.defer import CancelledError, Deferred, DeferredList, maybeDeferred
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web import http, resource, server

from vmcontrol import admission, eventloop, xmlrpcanswer
from vmcontrol.door import DoorListener
from vmcontrol.eventloop import Clock, Event, LimitReached, with_limit
from vmcontrol.flapping import Complaints

log = logging.getLogger(__name__)

USER = "vmwrapper"
BODY_LIMIT = 2 * 1024 * 1024
"""Bytes of a request; the longest legitimate one is a command line of 128 KiB with its environment."""
BODIES_LIMIT = 16 * 1024 * 1024
"""Bytes of requests that are not read yet, of all connections to the port together, and of all through the door."""
CONNECTIONS = 256
"""Connections at once to the port (with a secret: that have shown it), and through the door; each long poll holds one.
"""
NEWCOMERS = 32
"""Connections at once that have not shown the secret yet."""
SECRET_LIMIT_S = 5.0
"""From the connection to the end of the header that shows the secret."""
IDLE_LIMIT_S = 120
FLUSH_LIMIT_S = 2.0
"""Seconds that the last answers may take to leave when the server closes."""
ERROR = -1
"""The fault code of the original, for everything."""
NO_METHOD = 8001
"""As Twisted's, which the original used."""
_DOCUMENT_TYPE = re.compile(rb"<!\s*(DOCTYPE|ENTITY|ELEMENT|ATTLIST|NOTATION)|\0", re.IGNORECASE)

Method = Callable[..., Awaitable[object]]
"""With an attribute `given_up` that is true, it is cancelled when its caller goes away; else it is finished."""
Fault = xmlrpc.client.Fault


class Guard:
    """Who may call, of those that reach the port."""

    def __init__(self, secret: str | None, host: str) -> None:
        self.asks_secret = secret is not None
        self._expected = None if secret is None else f"{USER}:{secret}".encode()
        self._host = host

    def refusal(self, request: http.Request) -> tuple[int, str] | None:
        """HTTP status and text for a request that is not served; None when it is."""
        headers = request.requestHeaders
        if headers.hasHeader(b"origin") or headers.hasHeader(b"sec-fetch-site"):
            return http.FORBIDDEN, "requests of web pages are not served"
        if self._expected is not None:
            if not self.may_send(headers):
                return http.UNAUTHORIZED, "the secret of this run is needed"
        elif not self._names_us(headers.getRawHeaders(b"host") or []):
            return http.FORBIDDEN, "the Host header names another computer"
        return self.not_a_call(request)

    @staticmethod
    def not_a_call(request: http.Request) -> tuple[int, str] | None:
        """HTTP status and text for what cannot be an XML-RPC call."""
        headers = request.requestHeaders
        if request.method != b"POST":
            return http.NOT_ALLOWED, "XML-RPC: POST only"
        kind = (headers.getRawHeaders(b"content-type") or [b""])[0].split(b";")[0].strip().lower()
        if kind not in (b"text/xml", b"application/xml"):
            return http.UNSUPPORTED_MEDIA_TYPE, "XML-RPC: text/xml expected"
        return None

    def may_send(self, headers: Any) -> bool:
        """Whether a body is worth keeping: the secret is there, if one is needed."""
        if self._expected is None:
            return True
        return hmac.compare_digest(_basic(headers.getRawHeaders(b"authorization") or []), self._expected)

    def _names_us(self, hosts: Sequence[bytes]) -> bool:
        for value in hosts:
            try:
                name = urlsplit("//" + value.decode("ascii")).hostname or ""
            except ValueError:
                return False
            if name.rstrip(".") == "localhost" or name == self._host:
                continue
            try:
                if not ipaddress.ip_address(name).is_loopback:
                    return False
            except ValueError:
                return False
        return True


class TrustingGuard(Guard):
    """Of those that come through the door: each is the wrapper."""

    def __init__(self) -> None:
        super().__init__(None, "")

    def refusal(self, request: http.Request) -> tuple[int, str] | None:
        return self.not_a_call(request)


def _basic(values: Sequence[bytes]) -> bytes:
    if len(values) != 1 or values[0][:6].lower() != b"basic ":
        return b""
    try:
        return base64.b64decode(values[0][6:].strip(), validate=True)
    except ValueError:
        return b""


class _Request(server.Request):
    """A request whose body is kept in memory up to BODY_LIMIT, and refused beyond, or when all together are too much.

    Of who does not show the secret nothing is kept.
    """

    _refused = False
    _keeps = True
    _received = 0
    _kept = 0
    _site: _Site
    content: Any
    channel: Any

    def gotLength(self, length: int | None) -> None:  # noqa: N802
        self.content = io.BytesIO()
        self._site = self.channel.factory
        self._keeps = self._site.guard.may_send(self.requestHeaders)
        if self._keeps and not self._site.admit(self.channel):
            self._refuse(b"503 Service Unavailable")
            return
        if length is not None and length > BODY_LIMIT:
            self._refuse(b"413 Request Entity Too Large")

    def handleContentChunk(self, data: bytes) -> None:  # noqa: N802
        if self._refused:
            return
        self._received += len(data)
        if self._received > BODY_LIMIT:
            self._refuse(b"413 Request Entity Too Large")
        elif self._keeps and self._site.kept + len(data) > BODIES_LIMIT:
            self._site.refusals.warn("more than %d bytes of XML-RPC requests at once: one refused", BODIES_LIMIT)
            self._refuse(b"503 Service Unavailable")
        elif self._keeps:
            self.content.write(data)
            self._kept += len(data)
            self._site.kept += len(data)

    def refusal(self) -> tuple[int, str] | None:
        """HTTP status and text if it is not served."""
        return self._site.guard.refusal(self)

    def process(self) -> None:
        if not self._refused:
            super().process()  # type: ignore[no-untyped-call]

    def connectionLost(self, reason: Failure) -> None:  # noqa: N802
        self.release()
        super().connectionLost(reason)  # type: ignore[no-untyped-call]

    def release(self) -> None:
        """The body is not needed any more."""
        if self._kept:
            self._site.kept -= self._kept
            self._kept = 0
        self.content = io.BytesIO()

    def _refuse(self, status: bytes) -> None:
        self._refused = True
        self.release()
        self.channel.transport.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        self.channel.loseConnection()


class _Channel(http.HTTPChannel):
    """A connection that the server can end, and knows the end of."""

    transport: Any
    factory: Any

    def connectionMade(self) -> None:  # noqa: N802
        super().connectionMade()  # type: ignore[no-untyped-call]
        self.factory.channel_made(self)

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: N802
        super().connectionLost(reason)  # type: ignore[no-untyped-call]
        self.factory.channel_lost(self)


class _Site(server.Site):
    """The connections of the port, or of the door."""

    protocol: Any = _Channel
    requestFactory = _Request  # noqa: N815

    def __init__(self, root: resource.Resource, reactor: Any, guard: Guard, refusals: Complaints) -> None:
        super().__init__(root, timeout=IDLE_LIMIT_S, parsePOSTFormSubmission=False, reactor=reactor)  # type: ignore[no-untyped-call]
        self.guard = guard
        self.refusals = refusals
        self.kept = 0
        """Bytes of bodies."""
        self.channels: set[_Channel] = set()
        self.admitted: set[_Channel] = set()
        """Those that count for CONNECTIONS."""
        self.all_closed = Event()
        self._newcomers: admission.Newcomers[_Channel] = admission.Newcomers(
            reactor, most=NEWCOMERS, limit_s=SECRET_LIMIT_S, drop=self._drop
        )

    def channel_made(self, channel: _Channel) -> None:
        """It has just been connected."""
        self.channels.add(channel)
        if isinstance(self.guard, TrustingGuard):
            fits = self.admit(channel)
        elif admission.descriptors_are_short(channel.transport.fileno()):
            fits = False
            self.refusals.warn("the file descriptors of HostMain run out: a connection to the XML-RPC port refused")
        elif self.guard.asks_secret:
            fits = True
            self._newcomers.add(channel)
        else:
            fits = self.admit(channel)
        if not fits:
            channel.transport.abortConnection()

    def admit(self, channel: _Channel) -> bool:
        """Whether it may stay, now that it has shown all that is asked. Repeating it is harmless."""
        if channel not in self.admitted:
            if len(self.admitted) >= CONNECTIONS:
                self.refusals.warn("more than %d XML-RPC connections: one refused", CONNECTIONS)
                return False
            self._newcomers.discard(channel)
            self.admitted.add(channel)
        return True

    def _drop(self, channel: _Channel, why: str) -> None:
        self.refusals.warn("a connection to the XML-RPC port is dropped: %s", why)
        channel.transport.abortConnection()

    def channel_lost(self, channel: _Channel) -> None:
        self._newcomers.discard(channel)
        self.admitted.discard(channel)
        self.channels.discard(channel)
        if not self.channels:
            self.all_closed.pulse()

    def startFactory(self) -> None:  # noqa: N802
        """Twisted's keeps a timer for the dates of an access log, once a second."""

    def stopFactory(self) -> None:  # noqa: N802
        """Nothing was started."""

    def log(self, request: Any) -> None:
        """No access log: a wrapper's long polls would fill stderr."""


class _Rpc(resource.Resource):
    """Answers calls, at / and /RPC2."""

    isLeaf = True  # noqa: N815

    def __init__(
        self,
        methods: Mapping[str, Method],
        to_fault: Callable[[Exception], Fault],
        busy: set[Deferred[Any]],
        refusals: Complaints,
        clock: Clock,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._clock = clock
        self._methods = methods
        self._to_fault = to_fault
        self._busy = busy
        self._refusals = refusals

    def render(self, request: Any) -> bytes | int:
        body = request.content.read()
        request.release()
        refusal: tuple[int, str] | None = request.refusal()
        if refusal is None and request.path not in (b"/", b"/RPC2"):
            refusal = http.NOT_FOUND, "XML-RPC is served at /RPC2"
        if refusal is not None:
            status, text = refusal
            self._refusals.warn("XML-RPC request refused (%d): %s", status, text)
            request.setResponseCode(status)
            request.setHeader(b"content-type", b"text/plain")
            if status == http.UNAUTHORIZED:
                request.setHeader(b"www-authenticate", b'Basic realm="vmwrapper"')
            return text.encode() + b"\n"
        try:
            name, arguments = parse_call(body)
        except Fault as fault:
            self._answer(fault, request, [])
            return server.NOT_DONE_YET
        call = eventloop.start(self._call(name, arguments))
        gone: list[object] = []
        request.notifyFinish().addErrback(self._caller_gone, name, call, gone)
        if self._is_given_up(name):
            self._busy.add(call)
            call.addBoth(self._done, call)
        call.addCallbacks(self._answer, self._given_up, callbackArgs=(request, gone))
        return server.NOT_DONE_YET

    def _is_given_up(self, name: str) -> bool:
        return getattr(self._methods.get(name), "given_up", False)

    def _caller_gone(self, _: Failure, name: str, call: Deferred[Any], gone: list[object]) -> None:
        gone.append(True)
        if self._is_given_up(name):
            call.cancel()

    def _done(self, result: Any, call: Deferred[Any]) -> Any:
        self._busy.discard(call)
        return result

    def _given_up(self, failure: Failure) -> None:
        failure.trap(CancelledError)  # the caller went away: there is nobody to answer

    def _answer(self, value: object, request: Any, gone: list[object]) -> None:
        if not gone:
            eventloop.start_logged(xmlrpcanswer.send(self._clock, value, request, lambda: bool(gone)), "an answer")

    async def _call(self, name: str, arguments: tuple[Any, ...]) -> object:
        try:
            method = self._methods.get(name)
            if method is None:
                raise Fault(NO_METHOD, f"no such method {name[:80]!r}; `help` lists them")
            return await method(*arguments)
        except Fault as fault:
            return fault
        except CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 (every error is a fault of the call, never the end of HostMain)
            return self._to_fault(error)


def parse_call(body: bytes) -> tuple[str, tuple[Any, ...]]:
    """Method name and arguments. Raises Fault for what is no XML-RPC call."""
    if _DOCUMENT_TYPE.search(body):
        raise Fault(ERROR, "not an XML-RPC call: document types and entities are refused")
    try:
        arguments, name = xmlrpc.client.loads(body, use_builtin_types=True)
    except Exception as error:  # (the reader raises whatever the content brings about)
        raise Fault(ERROR, f"not an XML-RPC call: {error}") from error
    if not isinstance(name, str) or not isinstance(arguments, tuple):
        raise Fault(ERROR, "not an XML-RPC call: no method name")
    return name, arguments


def answer(value: object) -> bytes:
    """The response document: a result or a fault."""
    return b"".join(xmlrpcanswer.document(value))


class XmlRpcServer:
    """The service. `open_door` and `listen`, each at most once, `close` at the end."""

    def __init__(
        self,
        reactor: Any,
        *,
        methods: Mapping[str, Method],
        to_fault: Callable[[Exception], Fault],
        secret: str | None,
        host: str,
        port: int,
    ) -> None:
        self._reactor = reactor
        self._host = host
        self._wanted_port = port
        self._busy: set[Deferred[Any]] = set()
        refusals = Complaints(log, reactor.seconds)
        root = _Rpc(methods, to_fault, self._busy, refusals, reactor)
        self._site = _Site(root, reactor, Guard(secret, host), refusals)
        self._trusted = _Site(root, reactor, TrustingGuard(), refusals)
        self._listening: Any = None
        self._door: DoorListener | None = None

    def open_door(self, fd: int) -> None:
        """Serve the wrapper over the socket that it handed down. Raises OSError."""
        self._door = DoorListener(self._reactor, fd, self._trusted)
        self._door.start()

    def listen(self) -> int:
        """Listen; the port. Raises twisted.internet.error.CannotListenError."""
        self._listening = admission.listen(self._reactor, self._wanted_port, self._site, interface=self._host)
        port: int = self._listening.getHost().port
        return port

    async def close(self) -> None:
        """Take no more calls, end those that wait (their callers see a closed connection), let answers leave."""
        listening, self._listening = self._listening, None
        if listening is not None:
            await maybeDeferred(listening.stopListening)
        if self._door is not None:
            self._door.stop()
        for call in list(self._busy):
            call.cancel()
        await self._close_channels()

    async def _close_channels(self) -> None:
        sites = (self._site, self._trusted)
        for site in sites:
            for channel in list(site.channels):
                channel.loseConnection()  # type: ignore[no-untyped-call]
        left = [site.all_closed.wait() for site in sites if site.channels]
        if not left:
            return
        try:
            await with_limit(self._reactor, FLUSH_LIMIT_S, "XML-RPC clients", DeferredList(left))
        except LimitReached:
            for site in sites:
                for channel in list(site.channels):
                    channel.transport.abortConnection()
