"""Signals to single processes. One that has gone, or is not ours to signal, is no error: nothing here raises."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Literal

_CONTINUE = getattr(signal, "SIGCONT", 0)
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


def send(pid: int, number: int) -> None:
    """Windows knows one thing only to do to a process: end it at once."""
    if sys.platform == "win32":
        _with_psutil("terminate", pid)
        return
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def ask_to_end(pid: int) -> None:
    """TERM, and let it go on: a stopped process would not see it."""
    send(pid, signal.SIGTERM)
    if _CONTINUE:
        send(pid, _CONTINUE)


def kill(pid: int) -> None:
    send(pid, _KILL)


def suspend(pid: int) -> None:
    if sys.platform == "win32":
        _with_psutil("suspend", pid)
    else:
        send(pid, signal.SIGSTOP)


def resume(pid: int) -> None:
    if sys.platform == "win32":
        _with_psutil("resume", pid)
    else:
        send(pid, signal.SIGCONT)


def _with_psutil(act: Literal["terminate", "suspend", "resume"], pid: int) -> None:
    import psutil

    with contextlib.suppress(psutil.Error):
        getattr(psutil.Process(pid), act)()
