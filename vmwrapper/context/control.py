"""What the client, or a signal, wants now: polled from BOINC's runtime, with a call to the listeners at each change.

Owns the work clock (it stands while we are suspended). Never decides how something is suspended or ended: listeners
compare what is wanted with what they do. BOINC's status is the one thing that must be polled (lib/app_ipc.h).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from twisted.internet.task import LoopingCall

from vmcontrol.common.clock import PausableClock
from vmcontrol.common.eventloop import Event
from vmcontrol.common.logthrottle import LAST, LogThrottle
from vmwrapper.boinc.runtime import Runtime, Status
from vmwrapper.errors import Aborted, Quit
from vmwrapper.process.patience import ABORT_S, QUIT_S, Patience

POLL_S = 0.1
"""As often as BOINC's own runtime looks (api/boinc_api.cpp, TIMER_PERIOD). Twice as often took another 0.2 % of a core,
most of it for waking up."""

log = logging.getLogger(__name__)


class Control:
    """The client's wishes, level by level: suspended or not, ending or not."""

    def __init__(self, runtime: Runtime, reactor: Any) -> None:
        self._runtime = runtime
        self._reactor = reactor
        self.work_clock = PausableClock(reactor)
        self.status = Status()
        """What the runtime said last."""
        self.suspended = False
        self.network_suspended = False
        self.ending: Quit | Aborted | None = None
        """Why everything is to end; the first reason stays."""
        self.patience: Patience | None = None
        """What programs and VMs get then, from the moment that the end was asked for."""
        self.end_asked = Event()
        self._may_work = Event()
        self._may_work.set()
        again = "again and again: it limits the processors' time; the next times are not noted"
        self._suspensions = LogThrottle(log, reactor.seconds, again)
        self._listeners: list[Callable[[], None]] = []
        self._loop = LoopingCall(self.poll)
        self._loop.clock = reactor

    def start(self) -> None:
        self._loop.start(POLL_S, now=True)

    def stop(self) -> None:
        if self._loop.running:
            self._loop.stop()

    def poll(self) -> None:
        """One look at what the client wants."""
        try:
            self.status = self._runtime.get_status()
            self._act(self.status)
        except Exception:  # the loop must go on, or nothing would obey the client any more
            log.exception("the client's wishes")

    def _act(self, status: Status) -> None:
        if status.abort_request:
            self.ask_to_end(Aborted("the client asked for the end of this task"))
        elif status.quit_request:
            self.ask_to_end(Quit("the client asked us to stop"))
        elif status.no_heartbeat:
            self.ask_to_end(Quit("the client is gone"))
        if status.suspended != self.suspended and self.ending is None:
            self._set_suspended(status.suspended)
        if status.network_suspended != self.network_suspended:
            self.network_suspended = status.network_suspended
            self._call_listeners()
        if status.reread_init_data_file:
            data = self._runtime.reread_init_data()
            log.info("preferences have changed: %g %% of the processors' time", data.cpu_usage_limit)
            self._call_listeners()

    def ask_to_end(self, why: Quit | Aborted) -> None:
        """Everything is to end. An abort after a quit still counts: less has to be kept then."""
        if self.ending is None or (isinstance(why, Aborted) and not isinstance(self.ending, Aborted)):
            log.info("ending: %s", why, extra=LAST)
            self.ending = why
            if self.patience is None:
                self.patience = Patience(self._reactor, QUIT_S)
            if isinstance(why, Aborted):
                self.patience.shorten(ABORT_S)
        self.end_asked.set()

    def _set_suspended(self, suspended: bool) -> None:
        what = "suspended by the client" if suspended else "resumed by the client"
        self._suspensions.write(logging.INFO, what)
        self.suspended = suspended
        if suspended:
            self.work_clock.pause()
            self._may_work.clear()
        else:
            self.work_clock.resume()
            self._may_work.set()
        self._call_listeners()

    def _call_listeners(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    async def may_work(self) -> None:
        """Wait while we are suspended; the step after this may use the computer."""
        while self.suspended:
            await self._may_work.wait()

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` now, and whenever suspension, network or preferences change. Returns how to stop that."""
        self._listeners.append(listener)
        listener()
        return lambda: self._listeners.remove(listener)
