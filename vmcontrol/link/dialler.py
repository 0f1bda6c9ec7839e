"""The host's end of the link to one guest: HostMain dials the agent, the agent never dials.

GuestLink keeps one connection (the carrier) dialled for the agent's STOMP session for as long as it is started, and
opens further ones for HTTP (`guesthttp`). It owns its connections and timers; it never starts or stops a VM and knows
no word of STOMP.

A port forward accepts connections long before anybody listens in the guest, and then hangs or closes. So the carrier
is dialled again every REDIAL_S without giving up the earlier tries, and the first that proves itself to be the agent
is taken: the agent is reached soon after it is up, and a slow one (an emulated guest under load) has time to answer.

    LinkError
    +-- LinkDown        the agent could not be reached
        +-- LinkEnded   nor will it be: the link was stopped
    +-- GuestRefused    it answered a request by an HTTP status of 400 or more
"""

from __future__ import annotations

import json
import logging
import math
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any
from typing import Protocol as Interface

from twisted.internet.defer import Deferred, DeferredSemaphore
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol

from vmcontrol.common import eventloop
from vmcontrol.common.clock import PausableClock
from vmcontrol.common.eventloop import Event, LimitReached, TimerHandle, with_limit
from vmcontrol.link.dialled import DialledTry
from vmcontrol.link.errors import LinkDown, LinkEnded, LinkError
from vmcontrol.link.guesthttp import GuestHttp
from vmcontrol.link.listing import entries
from vmcontrol.link.streams import RelayEnd, hand_over
from vmcontrol.protocol.handshake import HANDSHAKE_LIMIT_S, HostHandshake, Mode
from vmcontrol.protocol.text import number

log = logging.getLogger(__name__)

DIAL_EVERY_S = 0.15
"""Seconds between two tries while a guest may be booting."""
EAGER_S = 12.0
"""Seconds for which that is so; then the tries become rarer with the time waited, up to REDIAL_MOST_S. A guest that is
interpreted (VirtualBox without hardware) was kept busy for 147 s by tries that came faster than it could answer."""
TRIES_AT_ONCE = 40
"""Tries that wait for an answer at the same time: what is dialled in 6 s."""
REDIAL_S = 0.1
"""Seconds until the first try after a carrier that did not last; doubled each time, up to REDIAL_MOST_S."""
REDIAL_MOST_S = 2.0
GOOD_SESSION_S = 5.0
"""A carrier that lived as long is dialled again at once."""

COPIES_AT_ONCE = 4
"""Copies of files with one guest; others wait. Each has a connection, of which the agent has 8 (guest.linkserver), and
ends the oldest for a ninth: some are left for other requests, and for those that a restored guest takes for alive."""
OUTPUTS_AT_ONCE = 2
"""Likewise of outputs of commands, of which hundreds may end in one moment."""

LISTED = 10_000
"""Entries of a folder, as many as the agent lists (guest.downloads)."""


class Broker(Interface):
    """Where the agents' STOMP sessions are carried to: the embedded broker, or link.outerbroker."""

    login: str
    passcode: str

    async def carry(self, carrier: RelayEnd, name: str, guest: str = "") -> None:
        """Serve the agent at the other end of the carrier, which has begun to speak. name: of the VM, for the log.

        guest: the id of whom alone it may speak for; empty: whoever it says.
        """


class GuestLink:
    """The link to the agent of one VM.

    address: where the agent answers on this host, (host, port). secret: that of the slot and result. broker: asked
    each time a carrier is up; None while there is no broker, and `broker_changed()` tells when its answer is another.
    token: what an agent may know that was not told the secret yet; it is told before anything else is said.
    guest: the id of whom alone the agent may speak for at the broker.

    `on_up` and `on_down` are lists of callbacks without arguments. Up means: the agent has shown the secret and a
    carrier is there. All time limits count only while the link is not paused.
    """

    def __init__(
        self,
        reactor: Any,
        *,
        name: str,
        address: tuple[str, int],
        secret: bytes,
        broker: Callable[[], Broker | None],
        token: bytes = b"",
        guest: str = "",
    ) -> None:
        self.reactor = reactor
        self.name = name
        self._guest = guest
        self.clock = PausableClock(reactor)
        self.on_up: list[Callable[[], None]] = []
        self.on_down: list[Callable[[], None]] = []
        self._address = address
        self._secret = secret
        self._token = token
        self._by_token = False
        self._broker = broker
        self._broker_event = Event()
        self._up = Event()
        self._carrier: RelayEnd | None = None
        self._running: Deferred[object] | None = None
        self._stopped = False
        self._dials: set[DialledTry] = set()
        self._http_transports: weakref.WeakSet[Any] = weakref.WeakSet()
        self.copies = DeferredSemaphore(COPIES_AT_ONCE)
        """To be acquired by each copy of a file; LinkEnded when the link is stopped meanwhile."""
        self.outputs = DeferredSemaphore(OUTPUTS_AT_ONCE)
        """To be acquired by who reads an output (vmcontrol.guests.outputs)."""
        self.requests = GuestHttp(reactor, self.clock, name=name, connect=self.dial_http)

    # Life

    def start(self) -> None:
        """Dial until it is stopped. Nothing happens when it is started already."""
        self._stopped = False
        if self._running is None:
            self._running = eventloop.start_logged(self._keep_carrier(), f"link to {self.name}")

    async def stop(self) -> None:
        """Close everything. Requests under way fail with LinkDown, later ones with LinkEnded. Harmless when stopped."""
        self._stopped = True
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
        self.clock.resume()  # a VM that is switched off while paused: what waits for it is not to wait for ever
        waiting, self.copies.waiting = self.copies.waiting, []
        for copy in waiting:  # each would find out by itself only, one after the other
            copy.errback(LinkEnded(f"the link to {self.name} was stopped"))
        self._drop_connections()
        await self.requests.close()

    def set_address(self, address: tuple[str, int]) -> None:
        """The VM was started anew and its agent answers elsewhere: drop every connection and dial there."""
        self._address = address
        self.renew()

    def renew(self) -> None:
        """The guest is another than before (a restored one): drop every connection and dial at once."""
        self._drop_connections()
        eventloop.start_logged(self.requests.close(), f"link to {self.name}")
        if self._running is not None:
            self._running.cancel()
            self._running = None
            self.start()

    def broker_changed(self) -> None:
        """`broker()` has a new answer: the agent gets it on a new carrier, or at once when it still waits for one."""
        if self._carrier is not None and self._broker_event.is_set():
            self._carrier.abort()
        self._broker_event.pulse()

    def pause(self) -> None:
        """The VM is paused: nothing that waits for it runs into its time limit."""
        self.clock.pause()

    def resume(self) -> None:
        """The VM goes on."""
        self.clock.resume()

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    async def wait_up(self, limit: float) -> None:
        """Wait for the carrier. LinkDown after `limit` seconds."""
        try:
            await with_limit(self.clock, limit, f"the agent of {self.name}", self._up.wait())
        except LimitReached as error:
            raise LinkDown(str(error)) from error

    # Requests

    async def http(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: object = None,
        limit: float = 30.0,
    ) -> dict[str, Any]:
        """A request with a small JSON answer. `body` goes as JSON. LinkDown, GuestRefused."""
        content = b"" if body is None else json.dumps(body).encode("ascii")
        return await self.requests.ask(method, path, query=query, body=content, limit=limit)

    async def status(self, *, limit: float = 10.0) -> dict[str, Any]:
        """What the agent says of itself: agent, protocol, id, ip, uptime_s, time, base_folder."""
        return await self.http("GET", "/v1/status", limit=limit)

    async def set_clock(self, *, limit: float = 10.0) -> float:
        """Set the guest's clock to this computer's time; returns what the guest's clock says then."""
        answer = await self.http("POST", "/v1/clock", body={"time": time.time()}, limit=limit)
        said = number(answer.get("time"), math.nan)
        if math.isnan(said):
            raise LinkDown(f"{self.name}: POST /v1/clock: the guest's answer has no time")
        return said

    async def list_folder(self, path: str = "") -> list[dict[str, Any]]:
        """Names, sizes and whether it is a folder, of a folder of the guest; relative to the agent's base folder."""
        answer = await self.http("GET", "/v1/list", query={"path": path})
        found = entries(answer.get("listing"), LISTED)
        return [{"name": one.name, "size": one.size, "folder": one.folder} for one in found]

    async def replace_secret(self, secret: bytes) -> None:
        """Give the agent another secret (ASCII) in place of the one-time token, and use it from now on."""
        await self.http("PUT", "/v1/secret", body={"secret": secret.decode("ascii")})
        self._secret, self._token = secret, b""

    async def dial_http(self) -> tuple[Any, bytes]:
        """A connection whose handshake for HTTP is done: transport, bytes that came already. LinkDown."""
        if self._stopped:
            raise LinkEnded(f"{self.name}: the link to the agent was ended")
        done: Deferred[tuple[Any, bytes]] = Deferred()

        def opened(dialled: DialledTry, rest: bytes) -> None:
            self._dials.discard(dialled)
            self._http_transports.add(dialled.transport)
            if not done.called:
                done.callback((dialled.transport, rest))

        def failed(dialled: DialledTry) -> None:
            self._dials.discard(dialled)
            if not done.called:
                done.errback(LinkDown(f"{self.name}: the agent did not accept the connection"))

        dialled = self._dial(Mode.HTTP, opened, failed)
        try:
            return await with_limit(self.clock, HANDSHAKE_LIMIT_S, f"{self.name}: connection to the agent", done)
        except LimitReached as error:
            raise LinkDown(str(error)) from error
        finally:
            if not dialled.over:
                dialled.abort()

    # The carrier

    async def _keep_carrier(self) -> None:
        delay = 0.0
        while True:
            if delay:
                await eventloop.sleep(self.clock, delay)
            transport, rest = await self._reach()
            since = self.clock.seconds()
            if not self._by_token or await self._tell_secret():
                await self._serve(transport, rest)
            else:
                transport.abortConnection()
            lasted = self.clock.seconds() - since
            delay = 0.0 if lasted > GOOD_SESSION_S else min(max(REDIAL_S, 2 * delay), REDIAL_MOST_S)

    async def _tell_secret(self) -> bool:
        """The agent knows the token only: give it the secret. Whether that was done."""
        try:
            await self.replace_secret(self._secret)
        except LinkError as error:
            log.warning("%s: the agent could not be told the secret: %s", self.name, error)
            return False
        log.info("%s: the agent has the secret of this link now", self.name)
        return True

    async def _reach(self) -> tuple[Any, bytes]:
        """Dial until the agent has accepted one of the tries; the others are dropped."""
        reached: Deferred[tuple[Any, bytes]] = Deferred()
        started = self.clock.seconds()
        tries: list[DialledTry] = []
        timer: TimerHandle | None = None

        def opened(dialled: DialledTry, rest: bytes) -> None:
            tries.remove(dialled)
            self._dials.discard(dialled)
            self._by_token = dialled.by_token
            reached.callback((dialled.transport, rest))

        def failed(dialled: DialledTry) -> None:
            nonlocal timer
            tries.remove(dialled)
            self._dials.discard(dialled)
            if dialled.chosen and not reached.called:
                if timer is not None:
                    timer.cancel()
                timer = self.clock.callLater(DIAL_EVERY_S, dial)

        def proved(dialled: DialledTry) -> None:
            # This one it will be: each further handshake would cost an emulated guest time, and the agent would take
            # the last for a newer carrier. Only when it fails after all, dialling goes on.
            nonlocal timer
            dialled.chosen = True
            if timer is not None:
                timer.cancel()
            for other in [other for other in tries if other is not dialled]:
                other.abort()
            timer = self.clock.callLater(HANDSHAKE_LIMIT_S, dialled.abort)

        def dial() -> None:
            nonlocal timer
            waited = self.clock.seconds() - started
            delay = min(REDIAL_MOST_S, DIAL_EVERY_S * max(1.0, waited / EAGER_S))
            timer = self.clock.callLater(delay, dial)
            oldest = self.clock.seconds() - HANDSHAKE_LIMIT_S
            while tries and (len(tries) >= TRIES_AT_ONCE or tries[0].since < oldest):
                tries[0].abort()
            tries.append(self._dial(Mode.STOMP, opened, failed, proved))

        dial()
        try:
            return await reached
        finally:
            if timer is not None:
                timer.cancel()
            for dialled in list(tries):
                dialled.abort()

    def _dial(
        self,
        mode: Mode,
        opened: Callable[[DialledTry, bytes], None],
        failed: Callable[[DialledTry], None],
        proved: Callable[[DialledTry], None] | None = None,
    ) -> DialledTry:
        handshake = HostHandshake(self._secret, mode, token=self._token)
        dialled = DialledTry(handshake, opened, failed, since=self.clock.seconds(), proved=proved)
        self._dials.add(dialled)
        host, port = self._address
        endpoint = TCP4ClientEndpoint(self.reactor, host, port, timeout=HANDSHAKE_LIMIT_S)
        dialled.connecting = connectProtocol(endpoint, dialled)
        dialled.connecting.addErrback(lambda _: dialled.connectionLost())
        return dialled

    async def _serve(self, transport: Any, rest: bytes) -> None:
        """Carry one STOMP session; returns when the carrier is gone."""
        lost: Deferred[None] = Deferred()
        spoke = Event()
        carrier = RelayEnd(self.reactor, first_bytes=spoke.set, lost=lambda: lost.callback(None))
        hand_over(transport, carrier, rest)
        self._carrier = carrier
        session = eventloop.start_logged(self._session(carrier, spoke), f"link to {self.name}")
        self._set_up(True)
        try:
            if not carrier.is_lost:
                await lost
        finally:
            session.cancel()
            carrier.abort()
            self._carrier = None
            self._broker_event.clear()
            self._set_up(False)

    async def _session(self, carrier: RelayEnd, spoke: Event) -> None:
        """Offer the broker to the agent; when its STOMP client speaks, join it to a new connection there."""
        broker = self._broker()
        while broker is None:
            await self._broker_event.wait()
            broker = self._broker()
        self._broker_event.set()  # from here on a change of broker needs a new carrier
        offer = {"login": broker.login, "passcode": broker.passcode, "time": time.time()}
        carrier.write(json.dumps(offer).encode("ascii") + b"\n")
        await spoke.wait()
        try:
            await broker.carry(carrier, self.name, self._guest)
        except Exception as error:  # noqa: BLE001 (whatever it was: the agent is told by the end of its connection)
            log.info("%s: no connection to the broker: %s", self.name, error)
            carrier.abort()

    def _set_up(self, up: bool) -> None:
        if up == self._up.is_set():
            return
        if up:
            self._up.set()
        else:
            self._up.clear()
        log.info("link to %s is %s", self.name, "up" if up else "down")
        for callback in list(self.on_up if up else self.on_down):
            callback()

    def _drop_connections(self) -> None:
        for dialled in list(self._dials):
            dialled.abort()
        for transport in list(self._http_transports):
            transport.abortConnection()
        self._http_transports.clear()
        if self._carrier is not None:
            self._carrier.abort()
