"""A short start: two packages that Twisted names and a host job never uses are not imported until something asks.

`http.cookiejar` (with urllib.request, email and ssl behind it) is passed on by twisted.python.compat; of asyncio,
twisted.internet.defer imports three names for annotations and `asFuture`. Together that is a twelfth of the time to a
job's first task. For our own programs alone (the wrapper, HostMain), before their first import of Twisted. The frozen
executable has no asyncio at all (packaging/stubs).
"""

from __future__ import annotations

import importlib.util
import sys
from types import CoroutineType, ModuleType


class _AbstractEventLoop:
    """Named in annotations only."""


class _Future:
    """Made by Deferred.asFuture alone, which nothing here calls."""

    def __init__(self, *, loop: object = None) -> None:
        raise NotImplementedError("Deferred.asFuture cannot be used in this program")


def _iscoroutine(value: object) -> bool:
    """As asyncio's, for what `async def` makes."""
    return isinstance(value, CoroutineType)


class _Later(ModuleType):
    """Stands for a module; the real one takes its place when a name is asked for that this one has not.

    Its submodules cannot be imported before that.
    """

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)  # who looks through all modules wants none of them
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def begin() -> None:
    """Put the stand-ins in place of what is not imported yet."""
    if "asyncio" not in sys.modules and not getattr(sys, "frozen", False):
        spec = importlib.util.find_spec("asyncio")
        asyncio = _Later("asyncio")
        asyncio.__path__ = list(spec.submodule_search_locations or ()) if spec is not None else []
        sys.modules["asyncio"] = asyncio
        asyncio.AbstractEventLoop = _AbstractEventLoop  # type: ignore[attr-defined]
        asyncio.Future = _Future  # type: ignore[attr-defined]
        asyncio.iscoroutine = _iscoroutine  # type: ignore[attr-defined]
    if "http.cookiejar" not in sys.modules:
        import http

        sys.modules["http.cookiejar"] = _Later("http.cookiejar")
        http.cookiejar = sys.modules["http.cookiejar"]  # type: ignore[attr-defined]
