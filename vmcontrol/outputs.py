"""The beginnings of files in a guest: what getCmdResults shows of outputs that stayed in the guest.

Owns nothing; whole files go by `vmcontrol.files`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure
from twisted.web.http import OK

from vmcontrol import eventloop
from vmcontrol.eventloop import LimitReached, with_limit
from vmcontrol.link.linkerrors import GuestRefused, LinkDown
from vmcontrol.xmltext import TEXT_LIMIT, LongText, output_slices, xml_text

if TYPE_CHECKING:
    from vmcontrol.link.dialler import GuestLink

log = logging.getLogger(__name__)

LIMIT_S = 120.0
"""Seconds for 8 MiB from an emulated guest, generously."""


TURN_S = 0.02
"""Seconds of work on a text after which others have their turn."""


class _Beginning(Protocol):
    """Keeps the first bytes of a body, and breaks the connection off when it has them."""

    transport: Any = None

    def __init__(self, limit: int, done: Deferred[bytearray]) -> None:
        self._limit = limit
        self._done = done
        self._content = bytearray()

    def dataReceived(self, data: bytes) -> None:  # noqa: N802
        self._content += data[: self._limit - len(self._content)]
        if len(self._content) >= self._limit:
            self._end()
            self.transport.loseConnection()

    def connectionLost(self, reason: Failure | None = None) -> None:  # noqa: N802, ARG002
        self._end()

    def _end(self) -> None:
        if not self._done.called:
            self._done.callback(self._content)


async def file_beginning(link: GuestLink, path: str, limit: int) -> tuple[bytearray, int]:
    """At most `limit` bytes of a file in the guest, and its size. Raises LinkDown, GuestRefused."""
    async with link.outputs:
        return await _file_beginning(link, path, limit)


async def _file_beginning(link: GuestLink, path: str, limit: int) -> tuple[bytearray, int]:
    response = await link.requests.send("GET", "/v1/files", query={"path": path}, limit=LIMIT_S)
    what = f"{link.name}: {path}"
    if response.code != OK:
        await link.requests.answer(response, what, limit=LIMIT_S)
        raise LinkDown(f"{what}: the guest's answer makes no sense")
    done: Deferred[bytearray] = Deferred()
    response.deliverBody(_Beginning(limit, done))
    try:
        content = await with_limit(link.clock, LIMIT_S, what, done)
    except LimitReached as error:
        raise LinkDown(str(error)) from error
    size = response.length if isinstance(response.length, int) else len(content)
    if len(content) < min(size, limit):
        raise LinkDown(f"{what}: the connection broke")
    return content, size


async def output_text(link: GuestLink, path: str) -> LongText:
    """The beginning of an output, as text. Raises LinkDown, GuestRefused."""
    content, size = await file_beginning(link, path, TEXT_LIMIT)
    text, began = bytearray(), time.monotonic()
    for piece in output_slices(content, size):
        text += piece.encode()
        if time.monotonic() - began > TURN_S:
            await eventloop.sleep(link.reactor, 0)
            began = time.monotonic()
    return LongText(text)


async def output_texts(link: GuestLink, result: Mapping[str, Any]) -> dict[str, LongText]:
    """`out` and `err` of a command's result, as in one that is asked for inline. Raises LinkDown."""
    texts = {"out": await _text(link, result, "stdout"), "err": await _text(link, result, "stderr")}
    error = result.get("error")
    if isinstance(error, str) and error:
        texts["err"] = LongText(bytes(texts["err"].content) + xml_text(error).encode() + b"\n")
    return texts


async def _text(link: GuestLink, result: Mapping[str, Any], stream: str) -> LongText:
    path = result.get(f"{stream}_path")
    if not isinstance(path, str) or not path or result.get(f"{stream}_size") == 0:
        return LongText(b"")
    try:
        return await output_text(link, path)
    except GuestRefused as error:
        if error.status >= 500:  # trouble of the agent's, which passes: it repeats its result, and this comes again
            raise LinkDown(str(error)) from error
        log.info("an output cannot be had: %s", error)  # the guest has deleted it, or was never able to write it
        return LongText(b"")
