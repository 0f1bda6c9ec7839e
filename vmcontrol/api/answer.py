"""The documents of XML-RPC answers, made piece by piece: an answer may carry 16 MiB of a program's output.

`document` is what the standard library's marshaller writes, without the whole of it in memory. `send` gives it to an
HTTP request: a short one at once, a long one as the client reads it.
"""

from __future__ import annotations

import time
import xmlrpc.client
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPullProducer
from zope.interface import implementer

from vmcontrol.common import eventloop
from vmcontrol.common.eventloop import Clock
from vmcontrol.protocol.xmltext import DEPTH_LIMIT, LongText, carried, text_slices, xml_text

SHORT = 256 * 1024
"""Bytes of an answer that is made and sent in one go."""
PIECE = 64 * 1024
TURN_S = 0.02
"""Seconds of work after which others have their turn."""


def document(value: object) -> Iterator[bytes]:
    """The response document of a result or a Fault, in pieces of about PIECE bytes."""
    pieces: list[str] = []
    size = 0
    for text in _texts(value):
        pieces.append(text)
        size += len(text)
        if size >= PIECE:
            yield "".join(pieces).encode()
            pieces, size = [], 0
    yield "".join(pieces).encode()


def _texts(value: object) -> Iterator[str]:
    yield "<?xml version='1.0'?>\n<methodResponse>\n"
    if isinstance(value, xmlrpc.client.Fault):
        yield "<fault>\n"
        yield from _value({"faultCode": value.faultCode, "faultString": value.faultString}, 0)
        yield "</fault>\n"
    else:
        yield "<params>\n<param>\n"
        yield from _value(value, 0)
        yield "</param>\n</params>\n"
    yield "</methodResponse>\n"


def _value(value: object, depth: int) -> Iterator[str]:
    if isinstance(value, str | LongText):
        yield "<value><string>"
        for text in text_slices(value):
            yield _escaped(text)
        yield "</string></value>\n"
    elif isinstance(value, Mapping) and depth < DEPTH_LIMIT:
        yield "<value><struct>\n"
        for key, item in value.items():
            yield f"<member>\n<name>{_escaped(xml_text(str(key)))}</name>\n"
            yield from _value(item, depth + 1)
            yield "</member>\n"
        yield "</struct></value>\n"
    elif isinstance(value, list | tuple) and depth < DEPTH_LIMIT:
        yield "<value><array><data>\n"
        for item in value:
            yield from _value(item, depth + 1)
        yield "</data></array></value>\n"
    else:
        yield _scalar(carried(value, depth))


def _scalar(value: Any) -> str:
    match value:
        case None:
            return "<value><nil/></value>"
        case bool():
            return f"<value><boolean>{int(value)}</boolean></value>\n"
        case int():
            return f"<value><int>{value}</int></value>\n"
        case float():
            return f"<value><double>{value!r}</double></value>\n"
        case _:
            return f"<value><string>{_escaped(str(value))}</string></value>\n"


def _escaped(text: str) -> str:
    """A bare carriage return would be read as a newline (XML 1.0, 2.11)."""
    return xmlrpc.client.escape(text).replace("\r", "&#13;")


async def send(clock: Clock, value: object, request: Any, is_gone: Callable[[], bool]) -> None:
    """Answer a request. Returns when a long answer has left, or its client is gone."""
    began, beginning, length = time.monotonic(), [b""], 0
    for piece in document(value):  # once for the length, which XML-RPC's clients may need; the pieces are not kept
        length += len(piece)
        if length <= SHORT:
            beginning.append(piece)
        elif time.monotonic() - began > TURN_S:
            beginning.clear()
            await eventloop.sleep(clock, 0)
            began = time.monotonic()
    if is_gone():
        return
    request.setHeader(b"content-type", b"text/xml")
    request.setHeader(b"content-length", b"%d" % length)
    if length <= SHORT:
        request.write(b"".join(beginning))
    else:
        beginning.clear()
        await _Producer(document(value), request).all_sent
    if not is_gone():
        request.finish()


@implementer(IPullProducer)
class _Producer:
    """Gives a request one piece whenever its client has read the last."""

    def __init__(self, pieces: Iterator[bytes], request: Any) -> None:
        self.all_sent: Deferred[None] = Deferred(lambda _: None)
        self._pieces = pieces
        self._request = request
        request.registerProducer(self, False)

    def resumeProducing(self) -> None:  # noqa: N802
        piece = next(self._pieces, None)
        if piece is None:
            self._request.unregisterProducer()
            self._end()
        else:
            self._request.write(piece)

    def stopProducing(self) -> None:  # noqa: N802
        self._end()

    def _end(self) -> None:
        self._pieces = iter(())
        if not self.all_sent.called:
            self.all_sent.callback(None)
