"""One running QEMU: started, spoken to over QMP, and its end noticed. Owns the process and both ends' file descriptors.

The process dies with us (launch.py) and does not mind TERM; `quit`, then KILL, is how it ends. Knows nothing of files
or snapshots of a VM; that is vm.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import psutil
from twisted.internet import error, protocol
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from vmcontrol.common import birth, launch
from vmcontrol.common.eventloop import Event, LimitReached, with_limit
from vmcontrol.common.threads import defer_to_thread
from vmcontrol.hypervisors.common.console import ConsoleLog
from vmcontrol.hypervisors.common.tool import exit_status
from vmcontrol.hypervisors.qemu.command import CONSOLE_FD, QMP_FD
from vmcontrol.hypervisors.qemu.console import ConsolePipe
from vmcontrol.hypervisors.qemu.qmp import ConnectionGone, NoAnswer, OneConnection, QmpClient

log = logging.getLogger(__name__)

START_LIMIT_S = 30.0
"""Until QEMU greets. It takes 0.05 s; a computer that swaps may need long."""
QUIT_LIMIT_S = 5.0
KILL_LIMIT_S = 10.0
"""A killed process that has not gone after this is stuck in the kernel."""
OUTPUT_KEPT = 16 * 1024
"""Bytes of what QEMU says on stdout and stderr, the newest."""

LINES_NOTED = 200
"""Of what QEMU says, in our log."""

EventListener = Callable[[str, Mapping[str, Any]], None]


class Watch:
    """Events of one name, kept from `with` on, so that none is missed between a command and the wait for its end."""

    def __init__(self, process: QemuProcess, name: str) -> None:
        self._process = process
        self._name = name
        self._seen: list[Mapping[str, Any]] = []
        self._news = Event()

    def __enter__(self) -> Watch:
        self._process.watches.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.watches.remove(self)

    def feed(self, name: str, data: Mapping[str, Any]) -> None:
        if name == self._name:
            self._seen.append(data)
            self._news.set()

    def gone(self) -> None:
        self._news.set()

    async def until(self, wanted: Callable[[Mapping[str, Any]], bool], limit_s: float) -> Mapping[str, Any]:
        """The first event that `wanted` says yes to. Raises ConnectionGone if QEMU ends first, or NoAnswer."""

        async def look() -> Mapping[str, Any]:
            while True:
                while self._seen:
                    data = self._seen.pop(0)
                    if wanted(data):
                        return data
                if self._process.ended.is_set():
                    raise ConnectionGone(self._process.last_words())
                self._news.clear()
                await self._news.wait()

        try:
            return await with_limit(self._process.reactor, limit_s, f"QEMU's {self._name}", look())
        except LimitReached as problem:
            raise NoAnswer(str(problem)) from problem


class QemuProcess(protocol.ProcessProtocol):
    """`spawn` makes one. `ended` is set when it is gone and its exit status known."""

    transport: Any

    def __init__(self, reactor: Any, label: str, on_event: EventListener, console: ConsolePipe) -> None:
        self.reactor = reactor
        self.console = console
        self.label = label
        self.qmp = QmpClient(reactor, self._event)
        self.ended = Event()
        self.status: int | None = None
        """Exit status; negative: a signal. None while it runs."""
        self.pid = 0
        self.began = birth.UNKNOWN
        self.watches: list[Watch] = []
        self._on_event = on_event
        self._output = bytearray()
        self._lines_left = LINES_NOTED

    @classmethod
    def spawn(cls, reactor: Any, argv: Sequence[str], label: str, on_event: EventListener, console: ConsoleLog) -> Self:
        """Start QEMU with `argv`; call from the reactor's thread. console: where its guest prints. Raises OSError."""
        with contextlib.ExitStack() as undo:
            pipe = ConsolePipe(reactor, console)
            undo.callback(pipe.close)
            try:
                self = cls(reactor, label, on_event, pipe)
                self._spawn(argv)
            finally:
                os.close(pipe.theirs)
            undo.pop_all()
        log.info("%s: started QEMU, pid %d", label, self.pid)
        log.debug("%s: %s", label, list(argv))
        return self

    def _spawn(self, argv: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        null = os.open(os.devnull, os.O_RDONLY)
        try:
            launched, variables = launch.command(argv)
            descriptors: dict[int, Any] = {0: null, 1: "r", 2: "r", QMP_FD: theirs.fileno()}
            descriptors[CONSOLE_FD] = self.console.theirs
            environment = os.environ | {"LC_ALL": "C.UTF-8"} | variables
            transport = self.reactor.spawnProcess(self, launched[0], launched, environment, childFDs=descriptors)
            self.pid = transport.pid
            self.began = birth.of(self.pid)
            self.reactor.adoptStreamConnection(ours.fileno(), socket.AF_UNIX, OneConnection(self.qmp))
        finally:
            ours.close()  # adopting made a copy
            theirs.close()
            os.close(null)

    async def connect(self) -> None:
        """Wait until QMP is ready. Raises QmpError; if QEMU ended, its last words come with it."""
        try:
            await self.qmp.connect(START_LIMIT_S)
        except ConnectionGone as problem:
            await self._wait_end(KILL_LIMIT_S)
            raise ConnectionGone(self.last_words()) from problem

    def watch(self, event: str) -> Watch:
        return Watch(self, event)

    def last_words(self) -> str:
        """What QEMU said on its streams, and how it ended."""
        said = bytes(self._output).decode("utf-8", "replace").strip()
        how = "" if self.status is None else f"exit status {self.status}"
        if self.status is not None and self.status < 0:
            how = f"killed by signal {-self.status}"
        return "; ".join(filter(None, (said, how)))

    async def quit(self) -> None:
        """End it through QMP, flushing the disk; KILL if it does not. Returns when it is gone."""
        if not self.ended.is_set():
            with contextlib.suppress(Exception):  # gone, deaf or refusing: KILL settles it
                await self.qmp.execute("quit", limit_s=QUIT_LIMIT_S)
            if not await self._wait_end(QUIT_LIMIT_S):
                log.warning("%s: QEMU did not quit; killing it", self.label)
        await self.kill()

    async def kill(self) -> None:
        """End it at once. Returns when it is gone; raises NoAnswer if even that does not end it."""
        self.kill_now()
        if not await self._wait_end(KILL_LIMIT_S):
            raise NoAnswer(f"{self.label}: QEMU, pid {self.pid}, does not end although it was killed")

    def kill_now(self) -> None:
        """Send KILL, wait for nothing."""
        if not self.ended.is_set():
            with contextlib.suppress(error.ProcessExitedAlready):
                self.transport.signalProcess("KILL")

    async def _wait_end(self, limit_s: float) -> bool:
        try:
            await with_limit(self.reactor, limit_s, "the end of QEMU", self.ended.wait())
        except LimitReached:
            return False
        return True

    # Twisted's callbacks --------------------------------------------------------------------------------------------

    def childDataReceived(self, childFD: int, data: bytes) -> None:  # noqa: ARG002, N802, N803
        self._output += data
        del self._output[:-OUTPUT_KEPT]
        for line in data.decode("utf-8", "replace").splitlines():
            self._lines_left -= 1
            if self._lines_left >= 0:
                log.info("%s: QEMU says: %.1000s", self.label, line)
            elif self._lines_left == -1:
                log.info("%s: QEMU says more, which is not noted", self.label)  # a guest may make it complain for ever

    def processEnded(self, reason: Failure) -> None:  # noqa: N802
        self.status = exit_status(reason)
        log.info("%s: QEMU, pid %d, ended (%s)", self.label, self.pid, self.status)
        self.console.close()
        self.ended.set()
        for watch in list(self.watches):
            watch.gone()

    def _event(self, name: str, data: Mapping[str, Any]) -> None:
        log.debug("%s: QEMU event %s %s", self.label, name, data)
        for watch in list(self.watches):
            watch.feed(name, data)
        self._on_event(name, data)


def end_stale(reactor: Any, process: psutil.Process) -> Deferred[None]:
    """KILL a QEMU that an earlier HostMain of this slot left, and wait for its end in a thread."""

    def end() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            process.wait(KILL_LIMIT_S)

    return defer_to_thread(reactor, end)
