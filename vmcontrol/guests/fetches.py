"""Outputs of commands that runCmd asked for, on their way from the guests to here.

Their files stay in the guest; getCmdResults shows the beginning of each as text. It is fetched as soon as the result
comes, and only then the result counts: what is listed as finished can be had, also when the VM is switched off.
Owns the fetches under way; what is done with them is for who begins them (vmcontrol.guests.commands).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from twisted.internet.defer import CancelledError, Deferred

from vmcontrol.common import eventloop
from vmcontrol.link.errors import LinkError
from vmcontrol.protocol.xmltext import TEXT_LIMIT, LongText

log = logging.getLogger(__name__)

Key = tuple[str, str]
"""(guest id, command id)"""
Fetch = Callable[[str, Mapping[str, Any]], Awaitable[Mapping[str, str | LongText]]]
"""Guest id and a command's result -> `out` and `err`. Raises LinkError."""


def expected(result: Mapping[str, Any]) -> int:
    """Bytes that would be fetched, as the agent says."""
    sizes = [result.get(name) for name in ("stdout_size", "stderr_size")]
    return sum(min(size, TEXT_LIMIT) for size in sizes if isinstance(size, int) and size > 0)


class Fetches:
    """At most one for each command."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._under_way: dict[Key, tuple[int, Deferred[Any]]] = {}

    def bytes_under_way(self, guest: str) -> int:
        return sum(size for key, (size, _) in self._under_way.items() if key[0] == guest)

    def begin(self, key: Key, result: Mapping[str, Any], done: Callable[[Mapping[str, Any]], None]) -> None:
        """`done` is called with the result and its `out` and `err`; never, if the way to the guest breaks before.

        That costs nothing: the agent repeats its result until it is told to forget it.
        """
        if key in self._under_way:
            return
        fetching: Deferred[Any] = eventloop.start(self._run(key, result, done))
        if not fetching.called:
            self._under_way[key] = expected(result), fetching
            fetching.addBoth(lambda _: self._under_way.pop(key, None))

    async def _run(self, key: Key, result: Mapping[str, Any], done: Callable[[Mapping[str, Any]], None]) -> None:
        try:
            outputs = await self.now(key[0], result)
        except CancelledError:
            return
        except LinkError as error:
            log.info("the output of command %s is not here yet: %s", key[1], error)
            return
        except Exception:
            log.exception("the output of command %s", key[1])
            return
        done({**result, **outputs})

    async def now(self, guest: str, result: Mapping[str, Any]) -> Mapping[str, str | LongText]:
        """`out` and `err` of a result. Raises LinkError."""
        return await self._fetch(guest, result)

    def cancel(self, guest: str | None = None) -> None:
        """What the guest (None: any) had to say does not count any more."""
        for key, (_, fetching) in list(self._under_way.items()):
            if guest is None or key[0] == guest:
                fetching.cancel()
