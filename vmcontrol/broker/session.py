"""One client of the embedded broker: what each STOMP command means, heart-beats, and when a client is dropped.

Owns one connection and its timers. Subscriptions and limits are the broker's (embedded.py), bytes are frames.py's.
Sources: STOMP 1.0, 1.1, 1.2; section names are given where a rule is not obvious.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hmac import compare_digest
from typing import Any
from typing import Protocol as Interface

from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure

from vmcontrol.broker.frames import (
    BadFrame,
    CannotEncode,
    Frame,
    FrameDecoder,
    FrameLimits,
    Version,
    encode,
)
from vmcontrol.broker.outbox import Outbox
from vmcontrol.broker.rights import GUEST_FRAME, GuestRights
from vmcontrol.broker.topics import DuplicateSubscription, Listener, Message, Subscription, Topics
from vmcontrol.common.eventloop import Clock, TimerHandle
from vmcontrol.common.logthrottle import LogThrottle

log = logging.getLogger(__name__)

SERVER = "vmwrapper"
TOPIC = "/topic/"
_HEART_BEAT = re.compile(r" *(\d{1,9}) *, *(\d{1,9}) *")
_WILDCARDS = re.compile(r"[*>#]")
CONNECT_FRAME = FrameLimits(line_bytes=4096, header_bytes=8192, headers=16, body_bytes=0)
"""Who has not shown the secret yet is not read further than this."""


TURN_S = 0.02
"""Seconds for which frames of one client are handled before others have their turn."""


@dataclass(frozen=True, slots=True)
class BrokerLimits:
    """What clients may cost. Times in seconds."""

    clients: int = 512
    """Connections at the same time that have shown login and passcode."""
    newcomers: int = 256
    """Connections to the port that have not yet; guests of one host may all come back at the same moment."""
    connect_s: float = 10.0
    """From the connection to a complete CONNECT."""
    frame: FrameLimits = field(default_factory=FrameLimits)
    frame_s: float = 60.0
    """For one frame to become complete."""
    subscriptions: int = 64
    """Per client."""
    queue_bytes: int = 12 * 1024 * 1024
    """A client for which more than this waits unread is dropped at the next message."""
    queue_stalled_s: float = 30.0
    """A client that reads nothing for so long, while something waits for it, is dropped."""
    memory_bytes: int = 20_000_000
    """Unfinished frames and unread messages of all clients; above, whoever holds most is dropped."""
    heart_beat_send_ms: int = 1000
    """The shortest interval at which the broker sends heart-beats."""
    heart_beat_receive_ms: int = 5000
    """The shortest interval at which it asks for them."""
    heart_beat_tolerance: float = 3.0
    """A client is dropped after so many intervals of silence: guests run slowly under emulation."""
    close_s: float = 2.0
    """For a client to read the last frame (ERROR, RECEIPT) before its connection is cut."""


class Broker(Interface):
    """What a session needs of the broker."""

    @property
    def clock(self) -> Clock: ...
    @property
    def limits(self) -> BrokerLimits: ...
    @property
    def topics(self) -> Topics[Listener]: ...
    @property
    def complaints(self) -> LogThrottle: ...
    def credentials(self, *, carried: bool) -> tuple[bytes, bytes]: ...
    def connected(self, session: Session) -> None: ...
    def admit(self, session: Session) -> bool: ...
    def gone(self, session: Session) -> None: ...
    def held(self, session: Session, change: int) -> None: ...
    def publish(self, destination: str, headers: Mapping[str, str], body: bytes) -> None: ...


class Session(Protocol):
    """Created by the broker for each connection."""

    transport: Any

    def __init__(self, broker: Broker, *, name: str = "", rights: GuestRights | None = None) -> None:
        """name: of the guest at the other end of a link, whose agent has shown the secret of that; else empty.

        rights: of that guest. None: those of whoever knows the passcode.
        """
        self.name = name
        self.is_carried = bool(name)
        self._rights = rights
        self.version = Version.V1_0
        self.held = 0
        """Bytes of memory: unfinished frame and unread messages."""
        self._broker = broker
        self._decoder = FrameDecoder(CONNECT_FRAME)
        self._connected = False
        self._ending = False
        self._buffered = 0
        self._last_received = self._last_sent = 0.0
        self._timers: dict[str, TimerHandle] = {}

    # called by Twisted

    def connectionMade(self) -> None:  # noqa: N802
        if not self.is_carried:
            peer = self.transport.getPeer()
            self.name = f"client {getattr(peer, 'host', peer)}:{getattr(peer, 'port', '')}"
        self._outbox = Outbox(self.transport, changed=self._hold, progressed=self._progressed)
        if hasattr(self.transport, "setTcpNoDelay"):
            self.transport.setTcpNoDelay(True)
        limit = self._broker.limits.connect_s
        self._after("connect", limit, lambda: self.refuse(f"no CONNECT within {limit:g} s"))
        self._broker.connected(self)

    def dataReceived(self, data: bytes) -> None:  # noqa: N802
        if self._ending:
            return
        self._last_received = self._broker.clock.seconds()
        self._decoder.receive(data)
        self._read()

    def _read(self) -> None:
        """Handle what has come, for TURN_S; then others have their turn, and nothing more is read meanwhile."""
        until = self._broker.clock.seconds() + TURN_S
        try:
            while not self._is_ending() and (event := self._decoder.next_event()) is not None:
                if isinstance(event, Frame):
                    self._stop("frame")
                    self._count_buffered()
                    self._handle(event)
                if self._broker.clock.seconds() >= until and not self._is_ending():
                    self.transport.pauseProducing()
                    self._after("turn", 0.0, self._next_turn)
                    break
        except BadFrame as error:
            self.refuse(str(error))
        if self._is_ending():
            return
        if self._decoder.inside_frame and "frame" not in self._timers:
            limit = self._broker.limits.frame_s
            self._after("frame", limit, lambda: self.refuse(f"a frame was not complete after {limit:g} s"))
        self._count_buffered()

    def _next_turn(self) -> None:
        self.transport.resumeProducing()
        self._read()

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: N802
        for timer in list(self._timers):
            self._stop(timer)
        if self._connected and not self._ending:
            log.info("%s has gone: %s", self.name, reason.getErrorMessage())
        self._ending = True
        self._forget()
        self._broker.gone(self)

    # called by the broker

    def deliver(self, message: Message, subscription: Subscription[Any]) -> None:
        """Queue a message; drops the client instead when it does not read."""
        if self._ending or (self._rights is not None and not self._rights.may_hear(message.headers)):
            return
        waiting = self._outbox.waiting
        if waiting > self._broker.limits.queue_bytes:
            self.drop(f"it does not read: {waiting} bytes wait for it")
            return
        try:
            pieces = message.pieces(self.version, subscription)
        except CannotEncode as error:
            self._broker.complaints.warning("%s (STOMP %s) misses a message: %s", self.name, self.version.value, error)
            return
        self._write(*pieces)

    def drop(self, why: str) -> None:
        """Cut the connection at once."""
        if not self._ending or "close" in self._timers:
            log.warning("%s is dropped: %s", self.name, why)
        self._ending = True
        self._forget()
        self.transport.abortConnection()

    def end(self, why: str) -> None:
        """Let the client read what waits for it, for a limited time, then close."""
        if self._ending:
            return
        log.debug("%s: %s", self.name, why)
        self._ending = True
        self._broker.topics.drop(self)
        self._decoder.clear()
        self._count_buffered()
        for timer in list(self._timers):
            self._stop(timer)
        self._after("close", self._broker.limits.close_s, lambda: self.drop("it did not read the last frame"))
        self._close_when_read()

    # frames

    def _handle(self, frame: Frame) -> None:
        if not self._connected:
            if frame.command not in ("CONNECT", "STOMP"):
                self.refuse(f"{frame.command} before CONNECT", frame)
            else:
                self._connect(frame)
            return
        handler = _COMMANDS.get(frame.command)
        if handler is None:
            self.refuse(f"{frame.command} is not supported by this broker", frame)
            return
        try:
            handler(self, frame)
        except _Refused as error:
            self.refuse(str(error), frame)
            return
        receipt = frame.headers.get("receipt")
        if receipt is not None:
            self._send(Frame("RECEIPT", {"receipt-id": receipt}))
        if frame.command == "DISCONNECT":
            self.end("DISCONNECT")

    def _connect(self, frame: Frame) -> None:
        offered = frame.headers.get("accept-version")
        names = {"1.0"} if offered is None else {name.strip() for name in offered.split(",")}
        common = [version for version in Version if version.value in names]
        if not common:
            ours = ",".join(version.value for version in Version)
            self.refuse(f"no common version of STOMP: {ours} are spoken here", frame, {"version": ours})
            return
        self.version = common[-1]
        login, passcode = self._broker.credentials(carried=self.is_carried)
        shown = frame.headers.get("login", "").encode(), frame.headers.get("passcode", "").encode()
        if not (compare_digest(shown[0], login) & compare_digest(shown[1], passcode)):
            self.refuse("login or passcode is wrong", frame)
            return
        if not self._broker.admit(self):
            self.refuse("there are too many clients", frame)
            return
        send_s, receive_s, answer = self._negotiate(frame.headers.get("heart-beat", "0,0"))
        headers = {"session": self.name.removeprefix("client "), "server": SERVER}
        if offered is not None:
            headers = {"version": self.version.value, "heart-beat": answer, **headers}
        self._connected = True
        self._decoder.version = self.version
        self._decoder.set_limits(self._broker.limits.frame if self._rights is None else GUEST_FRAME)
        self._stop("connect")
        self._send(Frame("CONNECTED", headers))
        self._start_heart_beats(send_s, receive_s)
        log.info("%s has joined (STOMP %s)", self.name, self.version.value)

    def _negotiate(self, asked: str) -> tuple[float, float, str]:
        """Seconds between beats that we send and receive (0: none), and our answer (STOMP 1.2, "Heart-beating")."""
        match = _HEART_BEAT.fullmatch(asked)
        if match is None:
            raise BadFrame(f"CONNECT: the heart-beat is no pair of numbers: {asked[:40]!r}")
        client_sends, client_wants = int(match[1]), int(match[2])
        limits = self._broker.limits
        send = max(limits.heart_beat_send_ms, client_wants) / 1000 if client_wants else 0.0
        receive = max(limits.heart_beat_receive_ms, client_sends) / 1000 if client_sends else 0.0
        return send, receive, f"{limits.heart_beat_send_ms},{limits.heart_beat_receive_ms}"

    def _subscribe(self, frame: Frame) -> None:
        destination = self._topic(frame)
        id = frame.headers.get("id")
        if id is None and self.version is not Version.V1_0:
            raise _Refused("SUBSCRIBE without an id")
        if _WILDCARDS.search(destination):
            raise _Refused("SUBSCRIBE with a wildcard: this broker knows exact names only")
        ack = frame.headers.get("ack", "auto")
        if ack not in ("auto", "client", "client-individual"):
            raise _Refused(f"SUBSCRIBE with the unknown ack {ack[:40]!r}")
        if self._rights is not None and (why := self._rights.refusal_to_subscribe(destination)):
            raise _Refused(why)
        if self._broker.topics.count(self) >= self._broker.limits.subscriptions:
            raise _Refused(f"more than {self._broker.limits.subscriptions} subscriptions")
        try:
            self._broker.topics.subscribe(Subscription(self, destination, id, ack))
        except DuplicateSubscription as error:
            raise _Refused(f"there is a subscription {id!r} already") from error

    def _unsubscribe(self, frame: Frame) -> None:
        id = frame.headers.get("id")
        destination = frame.headers.get("destination", "")
        if not self._broker.topics.unsubscribe(self, id, destination):
            raise _Refused("UNSUBSCRIBE without such a subscription")

    def _publish(self, frame: Frame) -> None:
        destination = self._topic(frame)
        if "transaction" in frame.headers:
            raise _Refused("transactions are not supported by this broker")
        if self._rights is not None and (why := self._rights.refusal_to_send(destination, frame.headers)):
            raise _Refused(why)
        self._broker.publish(destination, frame.headers, frame.body)

    def _acknowledge(self, _: Frame) -> None:
        """Accepted, without consequence: topics do not redeliver."""

    @staticmethod
    def _topic(frame: Frame) -> str:
        destination = frame.headers.get("destination", "")
        if not destination.startswith(TOPIC) or destination == TOPIC:
            raise _Refused(f"{frame.command} needs a destination that begins with {TOPIC}")
        return destination

    # sending and ending

    def _send(self, frame: Frame) -> None:
        try:
            self._write(encode(frame, self.version))
        except CannotEncode as error:  # a header of the peer's that comes back to it
            self._broker.complaints.warning("%s gets no %s: %s", self.name, frame.command, error)

    def _write(self, *pieces: bytes) -> None:
        self._last_sent = self._broker.clock.seconds()
        self._outbox.send(pieces)
        if self._outbox.waiting and "stalled" not in self._timers and not self._ending:
            limit = self._broker.limits.queue_stalled_s
            self._after("stalled", limit, lambda: self.drop(f"it read nothing for {limit:g} s"))

    def refuse(self, why: str, frame: Frame | None = None, more: Mapping[str, str] | None = None) -> None:
        """ERROR, and the end of the connection (STOMP 1.2, "ERROR")."""
        self._broker.complaints.warning("%s is refused: %s", self.name, why)
        headers = {"message": why.replace("\n", " ").replace("\r", " "), "content-type": "text/plain", **(more or {})}
        if frame is not None and "receipt" in frame.headers:
            headers["receipt-id"] = frame.headers["receipt"]
        if not self._ending:
            self._send(Frame("ERROR", headers, why.encode(errors="replace")))
            self.end(why)

    def _progressed(self) -> None:
        self._stop("stalled")
        if self._ending:
            self._close_when_read()
        elif self._outbox.waiting:
            limit = self._broker.limits.queue_stalled_s
            self._after("stalled", limit, lambda: self.drop(f"it read nothing for {limit:g} s"))

    def _close_when_read(self) -> None:
        if not self._outbox.waiting:
            self.transport.loseConnection()

    def _forget(self) -> None:
        """Free the memory now: this object is part of cycles and stays until the next garbage collection."""
        self._broker.topics.drop(self)
        self._outbox.clear()
        self._decoder.clear()
        self._count_buffered()

    def _is_ending(self) -> bool:
        return self._ending

    def _count_buffered(self) -> None:
        buffered = self._decoder.buffered
        change, self._buffered = buffered - self._buffered, buffered
        if change:
            self._hold(change)

    def _hold(self, change: int) -> None:
        self.held += change
        self._broker.held(self, change)

    # time

    def _start_heart_beats(self, send_s: float, receive_s: float) -> None:
        if send_s:
            self._beat(send_s)
        if receive_s:
            self._listen(receive_s * self._broker.limits.heart_beat_tolerance)

    def _beat(self, interval_s: float) -> None:
        """Something is sent at least every interval; aimed at 0.8 of it, as timers are late under load."""
        idle = self._broker.clock.seconds() - self._last_sent
        if idle >= 0.79 * interval_s and not self._outbox.waiting:
            self._write(b"\n")
            idle = 0.0
        self._after("beat", max(0.8 * interval_s - idle, 0.1 * interval_s), lambda: self._beat(interval_s))

    def _listen(self, limit_s: float) -> None:
        silent = self._broker.clock.seconds() - self._last_received
        if silent >= limit_s:
            self.drop(f"nothing was heard from it for {silent:.0f} s (heart-beat)")
        else:
            self._after("listen", limit_s - silent, lambda: self._listen(limit_s))

    def _after(self, name: str, seconds: float, action: Callable[[], None]) -> None:
        self._stop(name)

        def run() -> None:
            del self._timers[name]
            action()

        self._timers[name] = self._broker.clock.callLater(seconds, run)

    def _stop(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None and timer.active():
            timer.cancel()


class _Refused(Exception):  # noqa: N818
    """A frame that is answered by ERROR."""


_COMMANDS: Mapping[str, Callable[[Session, Frame], None]] = {
    "SEND": Session._publish,
    "SUBSCRIBE": Session._subscribe,
    "UNSUBSCRIBE": Session._unsubscribe,
    "ACK": Session._acknowledge,
    "NACK": Session._acknowledge,
    "DISCONNECT": Session._acknowledge,
}
"""BEGIN, COMMIT and ABORT are not among them: nothing here uses transactions, and an ERROR says so."""
