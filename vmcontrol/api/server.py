"""The XML-RPC server: HTTP in, method calls out. Knows nothing of VMs; the methods are those that it is given.

Serves /RPC2 and /. Owns the listening port and the wrapper's door (vmcontrol.common.door); who may call is
xmlrpcsite's. Never evaluates what it receives; document types and entities are refused.
"""

from __future__ import annotations

import logging
import re
import xmlrpc.client
from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, DeferredList, maybeDeferred
from twisted.python.failure import Failure
from twisted.web import http, resource, server

from vmcontrol.api import answer as xmlrpcanswer
from vmcontrol.api.calls import Method
from vmcontrol.api.site import Guard, Site, TrustingGuard
from vmcontrol.common import admission, eventloop
from vmcontrol.common.door import DoorListener
from vmcontrol.common.eventloop import Clock, LimitReached, with_limit
from vmcontrol.common.logthrottle import LogThrottle

log = logging.getLogger(__name__)

FLUSH_LIMIT_S = 2.0
"""Seconds that the last answers may take to leave when the server closes."""
ERROR = -1
"""The fault code of the original, for everything."""
NO_METHOD = 8001
"""As Twisted's, which the original used."""
_DOCUMENT_TYPE = re.compile(rb"<!\s*(DOCTYPE|ENTITY|ELEMENT|ATTLIST|NOTATION)|\0", re.IGNORECASE)

Fault = xmlrpc.client.Fault


class _Rpc(resource.Resource):
    """Answers calls, at / and /RPC2."""

    isLeaf = True  # noqa: N815

    def __init__(
        self,
        methods: Mapping[str, Method],
        to_fault: Callable[[Exception], Fault],
        busy: set[Deferred[Any]],
        refusals: LogThrottle,
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
            self._refusals.warning("XML-RPC request refused (%d): %s", status, text)
            request.close_after_answer()
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
        refusals = LogThrottle(log, reactor.seconds)
        root = _Rpc(methods, to_fault, self._busy, refusals, reactor)
        self._site = Site(root, reactor, Guard(secret, host), refusals)
        self._trusted = Site(root, reactor, TrustingGuard(), refusals)
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
