"""In the frozen executables in place of asyncio: the three names that twisted.internet.defer imports.

Our programs run on Twisted's own reactor. The real package, with ssl, selectors and concurrent.futures behind it, would
be a tenth of the time until the first task starts, and 2 MB on the disk.
"""

from __future__ import annotations

from types import CoroutineType

__all__ = ["AbstractEventLoop", "Future", "iscoroutine"]


class AbstractEventLoop:
    """Named in annotations only."""


class Future:
    """Made by Deferred.asFuture alone, which nothing here calls."""

    def __init__(self, *, loop: object = None) -> None:
        raise NotImplementedError("there is no asyncio in the frozen executable")


def iscoroutine(value: object) -> bool:
    """As asyncio's, for what `async def` makes."""
    return isinstance(value, CoroutineType)
