"""What fails in the driver's own files is told as what the hypervisor itself complains about. Owns nothing.

A full disk meets QEMU or VirtualBox as often as it meets what is remembered of a VM; the caller is to see one problem.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from vmcontrol.hypervisors.interface import HypervisorError

P = ParamSpec("P")
R = TypeVar("R")
Operation = Callable[P, Coroutine[Any, Any, R]]


def told_by(
    explain: Callable[[str, str], HypervisorError],
) -> Callable[[str], Callable[[Operation[P, R]], Operation[P, R]]]:
    """A decorator for a driver's methods, given what they do: an OSError leaves them as the HypervisorError of
    `explain` for its words. The first argument after `self` is the VM's name."""

    def doing(what: str) -> Callable[[Operation[P, R]], Operation[P, R]]:
        def decorate(method: Operation[P, R]) -> Operation[P, R]:
            @functools.wraps(method)
            async def operation(*args: P.args, **kw: P.kwargs) -> R:
                try:
                    return await method(*args, **kw)
                except OSError as error:
                    where = f"{error.filename}: " if error.filename else ""
                    raise explain(f"{what} {args[1]}", f"{where}{error.strerror or error}") from error

            return operation

        return decorate

    return doing
