"""How many files we may have open: all that we are allowed; programs of the job get the limit that we were given.

A client may be started with a low soft limit. It is meant for programs that break with many descriptors (select), and
ours does not.
"""

from __future__ import annotations

import contextlib
import os

ENOUGH = 1024
_given: tuple[int, int] | None = None
"""The limit that we were given, soft and hard, when we have raised it."""


def raise_limit() -> None:
    """Raise our soft limit if it is low. Raises nothing: without, a job with a VM may run short."""
    global _given  # noqa: PLW0603 (it is a fact about the process)
    if os.name != "posix":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(ENOUGH, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            _given = soft, hard


def give_back() -> None:
    """In a child, before its exec."""
    if _given is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, _given)
