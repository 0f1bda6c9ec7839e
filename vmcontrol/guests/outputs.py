"""The beginnings of files in a guest: what getCmdResults shows of outputs that stayed in the guest.

Owns nothing; whole files go by `vmcontrol.transfer.interface`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure
from twisted.web.http import OK

from vmcontrol.common.eventloop import LimitReached, with_limit
from vmcontrol.link.errors import GuestRefused, LinkDown
from vmcontrol.protocol.xmltext import SLICE, LongText, OutputText, xml_text

if TYPE_CHECKING:
    from vmcontrol.link.dialler import GuestLink

log = logging.getLogger(__name__)

LIMIT_S = 120.0
"""Seconds for 8 MiB from an emulated guest, generously."""


class _Beginning(Protocol):
    """Makes text of the first bytes of a body, and breaks the connection off when it has them."""

    transport: Any = None

    def __init__(self, done: Deferred[None]) -> None:
        self.text = OutputText()
        self._done = done

    def dataReceived(self, data: bytes) -> None:  # noqa: N802
        for start in range(0, len(data), SLICE):
            if not self.text.is_full:
                self.text.feed(data[start : start + SLICE])
        if self.text.is_full:
            self._end()
            self.transport.loseConnection()

    def connectionLost(self, reason: Failure | None = None) -> None:  # noqa: N802, ARG002
        self._end()

    def _end(self) -> None:
        if not self._done.called:
            self._done.callback(None)


async def output_text(link: GuestLink, path: str) -> LongText:
    """The beginning of an output, as text. Raises LinkDown, GuestRefused."""
    async with link.outputs:
        return await _output_text(link, path)


async def _output_text(link: GuestLink, path: str) -> LongText:
    response = await link.requests.send("GET", "/v1/files", query={"path": path}, limit=LIMIT_S)
    what = f"{link.name}: {path}"
    if response.code != OK:
        await link.requests.answer(response, what, limit=LIMIT_S)
        raise LinkDown(f"{what}: the guest's answer makes no sense")
    done: Deferred[None] = Deferred()
    beginning = _Beginning(done)
    response.deliverBody(beginning)
    try:
        await with_limit(link.clock, LIMIT_S, what, done)
    except LimitReached as error:
        raise LinkDown(str(error)) from error
    text = beginning.text
    size = response.length if isinstance(response.length, int) else text.taken
    if not text.is_full and text.taken < size:
        raise LinkDown(f"{what}: the connection broke")
    return LongText(text.end(size))


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
