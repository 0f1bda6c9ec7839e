"""One try to be connected to a broker: a stomp.py connection and the threads that belong to it.

The only module that imports stomp.py. Owns the connection, a worker thread (connects, sends) and stomp.py's own threads
(receive; heart-beats). The reactor thread never waits for any of them, and they hand over to it by `callFromThread`
alone. A session that ended is never used again, so nothing of stomp.py's state (listeners, heart-beats, receipts)
survives into the next. Never tries again by itself: that is client.py's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any, Protocol

from twisted.internet.defer import Deferred, fail

from vmcontrol.common.eventloop import TimerHandle
from vmcontrol.common.ownbroker import JobsPrograms, NotOurBroker
from vmcontrol.protocol.messages import StompMessage
from vmcontrol.protocol.text import text_of
from vmcontrol.stomp.unhandled import Unhandled

# It would look up this computer's names, which takes seconds where name service is slow.
os.environ.setdefault("STOMP_SKIP_HOSTNAME_SCAN", "1")
import stomp.connect
import stomp.exception
import stomp.listener
import stomp.protocol
import stomp.transport

log = logging.getLogger(__name__)
# At debug level it writes the passcode into the log; and what it warns about, the session reports as its end.
logging.getLogger("stomp.py").setLevel(logging.CRITICAL)


HEART_BEAT_MS = 5000
VIRTUAL_HOST = "/"
"""Header `host` of CONNECT: RabbitMQ has a virtual host of this name and no other; others ignore the header."""
HEART_BEAT_TOLERANCE = 3
"""ActiveMQ may send at almost twice the agreed interval; stomp.py's own 1.5 drops healthy connections."""
CONNECT_LIMIT_S = 10.0
"""For the TCP connection, and again for the broker to answer CONNECT."""
DISCONNECT_LIMIT_S = 1.0
"""For the broker to confirm that it has read everything; then the connection is cut."""
QUEUE_MESSAGES = 1000
QUEUE_CHARACTERS = 16 * 1024 * 1024
FRAME_LIMIT_BYTES = 9 * 1024 * 1024
"""What is read as one frame (stomp.py has no limit of its own): all that a broker carries, else a guest could end the
host's connection. The largest is the embedded broker's: a body of 8 MiB and headers of 320 KiB, each byte escaped."""
RECEIVE_BYTES = 64 * 1024


class StompError(Exception):
    """The two below."""


class NotConnected(StompError):  # noqa: N818
    """There is no connection, or it ended before the message was handed to the socket."""


class QueueFull(StompError):  # noqa: N818
    """Too much waits to be sent."""


class Owner(Protocol):
    """Who is told what becomes of a session, on the reactor thread."""

    def session_connected(self, session: Session) -> None: ...
    def session_message(self, session: Session, destination: str, headers: Mapping[str, str], body: str) -> None: ...
    def session_ended(self, reason: str) -> None: ...


class Session:
    """One try: a stomp.py connection and the thread that works for it. `start`, `send`, `subscribe` and `end` are the
    reactor's; everything with `_in_thread` in its name belongs to the worker or to stomp.py's threads."""

    def __init__(
        self,
        owner: Owner,
        reactor: Any,
        name: str,
        target: tuple[str, int, str, str],
        heart_beat_ms: int,
        *,
        programs: JobsPrograms | None = None,
    ) -> None:
        """programs: whose broker it has to be."""
        self.target = target
        self._owner = owner
        self._reactor = reactor
        self._name = name
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._waiting: dict[int, tuple[Deferred[None], int]] = {}
        self._waiting_characters = 0
        self._counter = 0
        self._ending = False
        self._cut_timer: TimerHandle | None = None
        self._received: list[tuple[str, Mapping[str, str], str]] = []
        self._transport = _Transport(target[:2], self._hand_over_messages_in_thread, programs)
        self._connection = _Connection(self._transport, heart_beat_ms)
        self._listener = _Listener(self)
        # stomp.py calls listeners in the order of their names; its own is called protocol-listener and has to be first.
        self._connection.set_listener("session", self._listener)
        self._unhandled = Unhandled()
        self._connected = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run_in_thread, name=f"{name}-stomp", daemon=True)

    # the reactor's

    def start(self) -> None:
        self._thread.start()

    def send(self, message: StompMessage) -> Deferred[None]:
        size = len(message.body)
        if self._ending:
            return fail(NotConnected(f"{self._name}: the connection to the broker is ending"))
        if len(self._waiting) >= QUEUE_MESSAGES or (self._waiting and self._waiting_characters > QUEUE_CHARACTERS):
            return fail(
                QueueFull(f"{self._name}: {len(self._waiting)} messages wait already; the broker does not read")
            )
        self._counter += 1
        key = self._counter
        sent: Deferred[None] = Deferred(lambda _: None)
        self._waiting[key] = (sent, size)
        self._waiting_characters += size

        def send_in_thread() -> None:
            self._connection.send(message.destination, message.body, headers=dict(message.headers))
            self._hand_over(self._sent, key)

        self._work.put(send_in_thread)
        return sent

    def subscribe(self, destination: str) -> None:
        self._work.put(lambda: self._connection.subscribe(destination, id=destination, ack="auto"))

    def end(self) -> None:
        """Send what is queued, say DISCONNECT, close; whatever hangs is cut after a limit."""
        if self._ending:
            return
        self._ending = True
        self._work.put(None)
        if not self._connected.is_set():
            self._transport.cut()
            return
        self._cut_timer = self._reactor.callLater(2 * DISCONNECT_LIMIT_S, self._transport.cut)

    def _sent(self, key: int) -> None:
        deferred, size = self._waiting.pop(key)
        self._waiting_characters -= size
        if not deferred.called:
            deferred.callback(None)

    def _message(self, destination: str, headers: Mapping[str, str], body: str) -> None:
        self._unhandled.take(len(body))
        self._owner.session_message(self, destination, headers, body)

    def _finished(self, reason: str) -> None:
        self._thread.join(1.0)  # handing this over was the last thing that it did
        if self._cut_timer is not None and self._cut_timer.active():
            self._cut_timer.cancel()
        self._ending = True
        waiting, self._waiting = self._waiting, {}
        for deferred, _ in waiting.values():
            if not deferred.called:
                deferred.errback(NotConnected(f"{self._name}: {reason}"))
        self._owner.session_ended(reason)

    # the threads'

    def connected_in_thread(self) -> None:
        self._connected.set()
        self._hand_over(self._owner.session_connected, self)

    def message_in_thread(self, frame: Any) -> None:
        headers: Mapping[str, str] = frame.headers
        body, frame.body = frame.body, b""
        destination = headers.get("subscription") or headers.get("destination", "")
        text = text_of(body)
        if text is None:
            log.warning("%s: a message of %d bytes on %s was dropped", self._name, len(body), destination)
            return
        del body
        self._received.append((destination, headers, text))

    def _hand_over_messages_in_thread(self) -> None:
        """Not from within stomp.py's call: it would still hold the bytes while the reactor thread handles the text."""
        received, self._received = self._received, []
        for destination, headers, text in received:
            self._unhandled.add_in_thread(len(text))
            self._hand_over(self._message, destination, headers, text)

    def over_in_thread(self) -> None:
        """The connection has ended, or an ERROR has come: wake the worker up."""
        if not self._over.is_set():
            self._over.set()
            self._unhandled.release()
            self._connected.set()
            self._work.put(None)

    def _run_in_thread(self) -> None:
        host, port, login, passcode = self.target
        broker = f"the broker at {host}:{port}"
        reason = f"the connection to {broker} has ended"
        try:
            self._connection.connect(login, passcode, with_connect_command=True)
            if not self._connected.wait(CONNECT_LIMIT_S):
                reason = f"{broker} does not answer CONNECT within {CONNECT_LIMIT_S:g} s"
            else:
                while not self._over.is_set() and (work := self._work.get()) is not None:
                    work()
                if not self._over.is_set():
                    self._disconnect_in_thread()
        except NotOurBroker as error:
            reason = str(error)
        except (OSError, stomp.exception.StompException) as error:
            if not self._transport.reached:
                reason = f"{broker} cannot be reached: {error}"
        except Exception as error:
            log.exception("%s: the connection to the broker failed", self._name)
            reason = f"the connection to {broker} has ended: {error!r}"
        finally:
            self._tidy_up_in_thread()
        self._hand_over(self._finished, self._listener.reason or self._transport.reason or reason)

    def _disconnect_in_thread(self) -> None:
        self._connection.disconnect_politely()
        self._over.wait(DISCONNECT_LIMIT_S)

    def _tidy_up_in_thread(self) -> None:
        """Close the socket and wait for stomp.py's threads, which end with it."""
        self._over.set()
        self._unhandled.release()
        beat = self._connection.heartbeat_thread
        self._connection.heartbeat_terminate_event.set()
        self._transport.cut()
        for thread in (self._transport.io_thread, beat):
            if thread is not None and thread is not threading.current_thread():
                thread.join(HEART_BEAT_MS / 1000 * 2)
        self._transport.close()

    def _hand_over(self, function: Callable[..., None], *arguments: object) -> None:
        self._reactor.callFromThread(function, *arguments)


class _Transport(stomp.transport.Transport):  # type: ignore[misc]
    """stomp.py's, with a limit for what is received, no delay for what is sent, and an end that can be forced."""

    socket: Any

    def __init__(
        self, address: tuple[str, int], before_receive: Callable[[], None], programs: JobsPrograms | None
    ) -> None:
        super().__init__([address], auto_decode=False, recv_bytes=RECEIVE_BYTES, vhost=VIRTUAL_HOST)
        self._before_receive = before_receive
        self.reason = ""
        self.reached = False
        """Whether there was a TCP connection."""
        self._address = address
        self._programs = programs
        self._cut = threading.Event()
        self._unfinished = 0

    def attempt_connection(self) -> None:
        """One try, no sleeps. Raises OSError, of which NotOurBroker before anything is sent."""
        self.connection_error = False
        self.socket = socket.create_connection(self._address, CONNECT_LIMIT_S)
        self.reached = True
        self.socket.settimeout(None)
        # Without it a small frame waits up to 40 ms for the acknowledgement of the one before.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.current_host_and_port = self._address
        if self._cut.is_set():
            self.cut()
        elif self._programs is not None:
            self._programs.wait_in_thread(self.socket.getsockname()[:2], self.socket.getpeername()[:2], self._cut)

    def receive(self) -> bytes:
        self._before_receive()
        try:
            data = self.socket.recv(RECEIVE_BYTES) if self.socket is not None else b""
        except OSError:
            data = b""
        self._unfinished += len(data)
        if self._unfinished > FRAME_LIMIT_BYTES:
            self.reason = f"the broker sent a frame of more than {FRAME_LIMIT_BYTES} bytes"
            data = b""
        return data  # nothing: the end, for stomp.py

    def process_frame(self, frame: Any, raw: bytes) -> None:
        self._unfinished = 0
        super().process_frame(frame, raw)

    def cut(self) -> None:
        """End the connection now, from any thread: whoever waits in it is woken up."""
        self._cut.set()
        connection = self.socket
        if connection is not None:
            with contextlib.suppress(OSError):  # it had ended already
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        connection, self.socket = self.socket, None
        if connection is not None:
            connection.close()


class _Connection(stomp.connect.BaseConnection, stomp.protocol.Protocol12):  # type: ignore[misc]
    """stomp.py's StompConnection12, over our transport."""

    def __init__(self, transport: _Transport, heart_beat_ms: int) -> None:
        stomp.connect.BaseConnection.__init__(self, transport)
        stomp.protocol.Protocol12.__init__(
            self, transport, (heart_beat_ms, heart_beat_ms), heart_beat_receive_scale=HEART_BEAT_TOLERANCE
        )

    def connect(self, *args: Any, **kw: Any) -> None:
        self.transport.start()
        stomp.protocol.Protocol12.connect(self, *args, **kw)

    def disconnect_politely(self) -> None:
        stomp.protocol.Protocol12.disconnect(self)


def _said(message: str, body: str) -> str:
    """What an ERROR says, in one line: some brokers have the reason in the header, some in the body's first line."""
    message, _, _ = message.strip().partition("\n")
    first, _, _ = body.strip().partition("\n")
    parts = [message] if not first or (message and message in first) or first in message else [message, first]
    return ": ".join(filter(None, parts))[:500]


class _Listener(stomp.listener.ConnectionListener):  # type: ignore[misc]
    """Called by stomp.py's threads."""

    def __init__(self, session: Session) -> None:
        self.reason = ""
        self._session = session
        self._connected = False

    def on_connected(self, frame: Any) -> None:  # noqa: ARG002
        self._connected = True
        self._session.connected_in_thread()

    def on_message(self, frame: Any) -> None:
        self._session.message_in_thread(frame)

    def on_error(self, frame: Any) -> None:
        text = _said(frame.headers.get("message") or "", frame.body.decode(errors="replace"))
        what = "has sent an error" if self._connected else "refuses the connection"
        self.reason = f"the broker {what}: {text}"
        self._session.over_in_thread()

    def on_heartbeat_timeout(self) -> None:
        self.reason = "nothing was heard from the broker for too long (heart-beat)"
        self._session.over_in_thread()

    def on_disconnected(self) -> None:
        self._session.over_in_thread()
