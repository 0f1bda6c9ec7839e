"""Who may call HostMain, and the connections over which that is done: the port's, and those through the door.

Who comes through the door (vmcontrol.common.door) is the wrapper and needs nothing else. At the port a request that a
browser sends for a web page is refused:
 - the content type must be text/xml or application/xml, which a page cannot send without asking first (and OPTIONS is
   never answered with a permission);
 - a request with an Origin or Sec-Fetch-Site header is refused;
 - without a secret the Host header must name this computer, so that no foreign name can be bent to point here.

With a secret every request must show it by HTTP Basic authentication (user `vmwrapper`). Connections that have not yet
are in a small pool of their own (vmcontrol.common.admission). Without a secret there is one pool for all.
"""

from __future__ import annotations

import base64
import hmac
import io
import ipaddress
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web import http, resource, server

from vmcontrol.common import admission
from vmcontrol.common.eventloop import Event
from vmcontrol.common.logthrottle import LogThrottle

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
    _site: Site
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
            self._site.refusals.warning("more than %d bytes of XML-RPC requests at once: one refused", BODIES_LIMIT)
            self._refuse(b"503 Service Unavailable")
        elif self._keeps:
            self.content.write(data)
            self._kept += len(data)
            self._site.kept += len(data)

    def refusal(self) -> tuple[int, str] | None:
        """HTTP status and text if it is not served."""
        return self._site.guard.refusal(self)

    def close_after_answer(self) -> None:
        """Close the connection when this request is answered; of thousands behind it, sent at once, none is read."""
        self.channel.persistent = False
        self.setHeader(b"connection", b"close")  # type: ignore[no-untyped-call]

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


class Site(server.Site):
    """The connections of the port, or of the door."""

    protocol: Any = _Channel
    requestFactory = _Request  # noqa: N815

    def __init__(self, root: resource.Resource, reactor: Any, guard: Guard, refusals: LogThrottle) -> None:
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
            self.refusals.warning("the file descriptors of HostMain run out: a connection to the XML-RPC port refused")
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
                self.refusals.warning("more than %d XML-RPC connections: one refused", CONNECTIONS)
                return False
            self._newcomers.discard(channel)
            self.admitted.add(channel)
        return True

    def _drop(self, channel: _Channel, why: str) -> None:
        self.refusals.warning("a connection to the XML-RPC port is dropped: %s", why)
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
