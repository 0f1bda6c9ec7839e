"""A VM process that does not end is told, and not taken for one that has."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from twisted.internet.task import Clock

from vmcontrol.common.eventloop import Event, start
from vmcontrol.hypervisors.interface import HostProblem
from vmcontrol.hypervisors.virtualbox.monitor import END_LIMIT_S, VmMonitor
from vmcontrol.hypervisors.virtualbox.watch import FolderWatch, VmProcess


class Process:
    """One that minds KILL, or does not."""

    def __init__(self, *, immortal: bool) -> None:
        self.pid, self.ended, self._immortal = 4711, Event(), immortal

    def kill(self) -> None:
        if not self._immortal:
            self.ended.set()

    def close(self) -> None: ...


def waited_for(process: Process) -> list[object]:
    clock = Clock()
    monitor = VmMonitor(
        clock, cast(FolderWatch, None), "one", "uuid", Path("log"), on_change=lambda: None, on_end=lambda: None
    )
    monitor.process = cast(VmProcess, process)
    results: list[Any] = []
    start(monitor.gone()).addBoth(results.append)
    clock.pump([END_LIMIT_S + 0.1] * 2)
    return results


def test_one_that_is_killed_at_the_limit_is_gone() -> None:
    assert waited_for(Process(immortal=False)) == [None]


def test_one_that_even_that_does_not_end_is_told() -> None:
    (failure,) = waited_for(Process(immortal=True))
    error = cast(Any, failure).value
    assert isinstance(error, HostProblem)
    assert error.key == "process-stuck"
    assert "4711" in error.reason
