"""The beginning of a file in a guest, as bytes: what getCmdResults shows of an output that stayed in the guest.

Owns nothing; whole files go by `vmcontrol.files`.
"""

from __future__ import annotations

import re
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure

from vmcontrol.eventloop import LimitReached, with_limit
from vmcontrol.link.dialler import GuestLink, GuestRefused, LinkDown

LIMIT_S = 120.0
"""Seconds for 8 MiB from an emulated guest, generously."""
NO_SUCH_RANGE = 416
"""The status for an empty file (RFC 9110, 15.5.17)."""


class _Beginning(Protocol):
    """Keeps the first bytes of a body."""

    def __init__(self, limit: int, done: Deferred[bytes]) -> None:
        self._limit = limit
        self._done = done
        self._content = bytearray()

    def dataReceived(self, data: bytes) -> None:  # noqa: N802
        self._content += data[: self._limit - len(self._content)]

    def connectionLost(self, reason: Failure | None = None) -> None:  # noqa: N802, ARG002
        if not self._done.called:
            self._done.callback(bytes(self._content))


async def file_beginning(link: GuestLink, path: str, limit: int) -> tuple[bytes, int]:
    """At most `limit` bytes of a file in the guest, and its size. Raises LinkDown, GuestRefused."""
    response = await link.requests.send(
        "GET", f"/v1/files/{path}", headers={"Range": f"bytes=0-{limit - 1}"}, limit=LIMIT_S
    )
    done: Deferred[bytes] = Deferred()
    response.deliverBody(_Beginning(limit, done))
    try:
        content = await with_limit(link.clock, LIMIT_S, f"{link.name}: {path}", done)
    except LimitReached as error:
        raise LinkDown(str(error)) from error
    if response.code == NO_SUCH_RANGE:
        return b"", 0
    if response.code >= 400:
        raise GuestRefused(response.code, {}, f"{link.name}: {path}")
    return content, _size(response) or len(content)


def _size(response: Any) -> int | None:
    values = response.headers.getRawHeaders("content-range") or [""]
    found = re.fullmatch(r"bytes \d+-\d+/(\d{1,18})", values[0].strip())
    return int(found[1]) if found else None
