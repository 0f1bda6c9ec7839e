"""Our STOMP client against brokers that do something wrong, played by a script on a real socket."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, DeferredList, DeferredQueue
from twisted.internet.protocol import Factory, Protocol

from tests.support.brokers import free_port
from vmcontrol.broker.frames import Frame, FrameDecoder, Version, encode
from vmcontrol.common.eventloop import sleep, the_reactor, with_limit
from vmcontrol.protocol import text as wordtext
from vmcontrol.protocol.messages import StompMessage
from vmcontrol.stomp import session, unhandled
from vmcontrol.stomp.client import NotConnected, QueueFull, StompClient
from vmcontrol.stomp.unhandled import Unhandled

LIMIT_S = 15.0
WORDS = StompMessage("/topic/a", {"to": "x"}, "PING")


class Script(Protocol):
    """A broker's end of one connection: answers CONNECT unless told otherwise, keeps what it hears."""

    transport: Any

    def __init__(self, server: Server) -> None:
        self.heard: DeferredQueue[Frame] = DeferredQueue()
        self._server = server
        self._decoder = FrameDecoder()

    def connectionMade(self) -> None:
        self._server.tries.append(time.monotonic())
        self._server.open.add(self)
        self._server.connections.put(self)
        if self._server.slams:
            self.transport.loseConnection()

    def connectionLost(self, reason: object = None) -> None:
        self._server.open.discard(self)

    def dataReceived(self, data: bytes) -> None:
        self._decoder.receive(data)
        while (event := self._decoder.next_event()) is not None:
            if not isinstance(event, Frame):
                continue
            self.heard.put(event)
            if event.command == "CONNECT" and self._server.answer is not None:
                self._decoder.version = Version.V1_2
                self.say(self._server.answer)
            if event.command == "DISCONNECT" and self._server.answers_disconnect:
                self.say(Frame("RECEIPT", {"receipt-id": event.headers["receipt"]}))

    def say(self, frame: Frame) -> None:
        self.transport.write(encode(frame, Version.V1_2))

    async def hears(self, command: str) -> Frame:
        frame: Frame = await with_limit(the_reactor(), LIMIT_S, command, self.heard.get())
        assert frame.command == command
        return frame


class Server(Factory):
    """Where the scripts listen."""

    noisy = False

    def __init__(self) -> None:
        self.connections: DeferredQueue[Script] = DeferredQueue()
        self.tries: list[float] = []
        self.open: set[Script] = set()
        self.slams = False
        self.answers_disconnect = True
        self.answer: Frame | None = Frame("CONNECTED", {"version": "1.2", "heart-beat": "0,0"})
        self.port: Any = the_reactor().listenTCP(0, self, interface="127.0.0.1")
        self.number = int(self.port.getHost().port)

    def buildProtocol(self, addr: object) -> Script:
        return Script(self)

    async def connection(self) -> Script:
        return await with_limit(the_reactor(), LIMIT_S, "a connection", self.connections.get())

    async def close(self) -> None:
        for script in list(self.open):
            script.transport.abortConnection()
        await self.port.stopListening()


@pytest_twisted.async_yield_fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    yield server
    await server.close()


class Peer:
    def __init__(self, **options: Any) -> None:
        self.events: DeferredQueue[str] = DeferredQueue()
        self.client = StompClient(
            the_reactor(),
            name="peer",
            on_connected=lambda: self.events.put("connected"),
            on_disconnected=self.events.put,
            **options,
        )

    def connect(self, port: int) -> None:
        self.client.connect("127.0.0.1", port, "login", "the-passcode")

    async def event(self) -> str:
        return await with_limit(the_reactor(), LIMIT_S, "an event", self.events.get())


@pytest.fixture
def peers() -> Iterator[Callable[..., Peer]]:
    made: list[Peer] = []

    def make(**options: Any) -> Peer:
        made.append(Peer(**options))
        return made[-1]

    before = set(threading.enumerate())
    yield make
    pytest_twisted.blockon(DeferredList([peer.client.close() for peer in made]))
    left = [thread.name for thread in set(threading.enumerate()) - before if not thread.name.startswith("PoolThread")]
    assert left == []


@pytest_twisted.ensureDeferred
async def test_subscriptions_stand_before_what_is_sent_when_connected(
    server: Server, peers: Callable[..., Peer]
) -> None:
    peer = peers()
    peer.client.subscribe("/topic/a", lambda *_: None)
    sent: list[Deferred[None]] = []
    peer.client.on_connected = lambda: sent.append(peer.client.send(WORDS))
    peer.connect(server.number)
    script = await server.connection()
    connect = await script.hears("CONNECT")
    assert connect.headers["accept-version"] == "1.2"
    assert connect.headers["heart-beat"] == "5000,5000"
    assert (connect.headers["login"], connect.headers["passcode"]) == ("login", "the-passcode")
    assert (await script.hears("SUBSCRIBE")).headers["destination"] == "/topic/a"
    message = await script.hears("SEND")
    assert (message.headers["to"], message.body, message.headers["content-length"]) == ("x", b"PING", "4")
    await sent[0]


@pytest_twisted.ensureDeferred
async def test_a_broker_that_falls_silent_is_given_up(server: Server, peers: Callable[..., Peer]) -> None:
    server.answer = Frame("CONNECTED", {"version": "1.2", "heart-beat": "200,200"})
    peer = peers(heart_beat_ms=200)
    peer.connect(server.number)
    assert await peer.event() == "connected"
    began = time.monotonic()
    assert "heart-beat" in await peer.event()
    assert 0.5 < time.monotonic() - began < 5


@pytest_twisted.ensureDeferred
async def test_a_broker_that_does_not_answer(
    server: Server, peers: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "CONNECT_LIMIT_S", 0.3)
    server.answer = None
    peer = peers()
    peer.connect(server.number)
    assert "does not answer CONNECT within 0.3 s" in await peer.event()


@pytest_twisted.ensureDeferred
async def test_closing_does_not_wait_for_a_broker_that_does_not_answer(
    server: Server, peers: Callable[..., Peer]
) -> None:
    server.answer = None
    peer = peers()
    peer.connect(server.number)
    await (await server.connection()).hears("CONNECT")
    began = time.monotonic()
    await peer.client.close()
    assert time.monotonic() - began < 1
    with pytest.raises(ValueError, match="after close"):
        peer.connect(server.number)


@pytest_twisted.ensureDeferred
async def test_closing_sends_what_is_queued_and_waits_in_bounds_for_the_broker(
    server: Server, peers: Callable[..., Peer]
) -> None:
    server.answers_disconnect = False
    peer = peers()
    peer.connect(server.number)
    assert await peer.event() == "connected"
    script = await server.connection()
    sent = [peer.client.send(WORDS) for _ in range(20)]
    began = time.monotonic()
    await peer.client.close()
    assert time.monotonic() - began < 3
    assert all(deferred.called for deferred in sent)
    await script.hears("CONNECT")
    for _ in range(20):
        await script.hears("SEND")
    await script.hears("DISCONNECT")


@pytest_twisted.ensureDeferred
async def test_nobody_listens(peers: Callable[..., Peer]) -> None:
    peer = peers()
    peer.connect(free_port())
    assert "cannot be reached" in await peer.event()
    with pytest.raises(NotConnected):
        await peer.client.send(WORDS)


@pytest_twisted.ensureDeferred
async def test_tries_come_again_with_growing_pauses(server: Server, peers: Callable[..., Peer]) -> None:
    server.slams = True
    peer = peers(reconnect=True)
    peer.connect(server.number)
    for _ in range(5):
        await server.connection()
    pauses = [after - before for before, after in zip(server.tries, server.tries[1:], strict=False)]
    assert 0.09 < pauses[0] < 0.7
    assert 0.79 < pauses[3] < 3
    server.slams = False
    while await peer.event() != "connected":
        pass


@pytest_twisted.ensureDeferred
async def test_a_broker_that_does_not_read_neither_blocks_the_reactor_nor_fills_the_memory(
    server: Server, peers: Callable[..., Peer]
) -> None:
    peer = peers()
    peer.connect(server.number)
    assert await peer.event() == "connected"
    (await server.connection()).transport.pauseProducing()
    large = StompMessage("/topic/a", {}, "x" * 5_000_000)
    began = time.monotonic()
    outcomes: list[object] = []
    for _ in range(6):
        peer.client.send(large).addBoth(outcomes.append)
    assert time.monotonic() - began < 0.5
    await sleep(the_reactor(), 0)
    assert [type(getattr(outcome, "value", None)) for outcome in outcomes].count(QueueFull) == 2
    began = time.monotonic()
    await peer.client.close()
    assert time.monotonic() - began < 5
    assert len(outcomes) == 6
    assert NotConnected in [type(getattr(outcome, "value", None)) for outcome in outcomes]


@pytest_twisted.ensureDeferred
async def test_a_frame_without_end_is_not_read_for_ever(
    server: Server, peers: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "FRAME_LIMIT_BYTES", 300_000)
    peer = peers()
    peer.connect(server.number)
    assert await peer.event() == "connected"
    script = await server.connection()
    script.transport.write(b"MESSAGE\nsubscription:a\n\n" + b"x" * 500_000)
    assert "frame of more than 300000 bytes" in await peer.event()


@pytest_twisted.ensureDeferred
async def test_a_wide_body_is_dropped_and_the_next_is_not(
    server: Server, peers: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wordtext, "WIDE_BODY_BYTES", 1000)
    peer = peers()
    bodies: DeferredQueue[str] = DeferredQueue()
    peer.client.subscribe("a", lambda _, body: bodies.put(body))
    peer.connect(server.number)
    assert await peer.event() == "connected"
    script = await server.connection()
    for body in ("x" * 1000 + "😀", "x" * 1000 + "ü", "😀"):
        script.say(Frame("MESSAGE", {"subscription": "a", "destination": "a"}, body.encode()))
    assert await with_limit(the_reactor(), LIMIT_S, "a body", bodies.get()) == "x" * 1000 + "ü"
    assert await with_limit(the_reactor(), LIMIT_S, "a body", bodies.get()) == "😀"


BAD = [
    b"MESSAGE\nsubscription:a\n\xff\xfe:\xff\n\nx\0",
    b"MESSAGE\n\nno headers\0",
    b"MESSAGE\nsubscription:a\ncontent-length:999999999999999999999\n\nx\0" + b"\0" * 100,
    b"MESSAGE\nsubscription:a\ncontent-length:-5\n\nx\0",
    b"RECEIPT\n\n\0",
    b"RECEIPT\nreceipt-id:nobody's\n\n\0",
    b"CONNECTED\nheart-beat:x,y\n\n\0",
    b"CONNECTED\nheart-beat:1\n\n\0",
    b"ERROR\n\n\0",
    b"\0\0\0\n\r\n\0",
    b"\xff" * 1000 + b"\0",
    b"MESSAGE\nsubscription:a\n\n" + b"\xc3\xff" * 1000 + b"\0",
]


@pytest_twisted.ensureDeferred
async def test_whatever_a_broker_sends_the_client_goes_on_or_connects_again(
    server: Server, peers: Callable[..., Peer]
) -> None:
    chance = random.Random(2009)
    good = encode(Frame("MESSAGE", {"subscription": "a", "destination": "a", "message-id": "1"}, b"body"), Version.V1_2)
    broken = list(BAD)
    for _ in range(60):
        at, end = sorted(chance.choices(range(len(good)), k=2))
        broken.append(good[:at] + chance.randbytes(chance.randrange(6)) + good[end:] + b"\0")
    peer = peers(reconnect=True)
    bodies: list[str] = []
    peer.client.subscribe("a", lambda _, body: bodies.append(body))
    peer.connect(server.number)
    assert await peer.event() == "connected"
    for number, data in enumerate(broken):
        mark, again = f"mark {number}", 0
        for script in list(server.open):
            script.transport.write(data)
        while mark not in bodies:
            again += 1
            assert again < 400, data
            for script in list(server.open):
                script.say(Frame("MESSAGE", {"subscription": "a", "destination": "a"}, mark.encode()))
            await sleep(the_reactor(), 0.02)
            if again % 40 == 0:  # it waits for the rest of a frame that has no end
                for script in list(server.open):
                    script.transport.loseConnection()


@pytest_twisted.ensureDeferred
async def test_a_handler_that_fails_loses_one_message(server: Server, peers: Callable[..., Peer]) -> None:
    peer = peers()
    bodies: DeferredQueue[str] = DeferredQueue()

    def handle(_: object, body: str) -> None:
        if body == "bad":
            raise ValueError(body)
        bodies.put(body)

    peer.client.subscribe("a", handle)
    peer.connect(server.number)
    assert await peer.event() == "connected"
    script = await server.connection()
    for text in ("bad", "good"):
        script.say(Frame("MESSAGE", {"subscription": "a", "destination": "a"}, text.encode()))
    assert await with_limit(the_reactor(), LIMIT_S, "a body", bodies.get()) == "good"
    assert peer.client.connected


@pytest_twisted.ensureDeferred
async def test_an_error_ends_the_connection_with_the_brokers_words(server: Server, peers: Callable[..., Peer]) -> None:
    peer = peers()
    peer.connect(server.number)
    assert await peer.event() == "connected"
    (await server.connection()).say(Frame("ERROR", {"message": "you talk too much"}, b"details"))
    assert "you talk too much" in await peer.event()


@pytest_twisted.ensureDeferred
async def test_connecting_elsewhere_ends_the_first_connection(server: Server, peers: Callable[..., Peer]) -> None:
    second = Server()
    peer = peers()
    peer.connect(server.number)
    assert await peer.event() == "connected"
    script = await server.connection()
    peer.connect(second.number)
    await second.connection()
    while await peer.event() != "connected":
        pass
    await script.hears("CONNECT")
    await script.hears("DISCONNECT")
    await peer.client.close()
    await second.close()


@pytest_twisted.ensureDeferred
async def test_many_connections_leave_nothing_behind(server: Server, peers: Callable[..., Peer]) -> None:
    peer = peers()
    before = threading.active_count()
    for _ in range(20):
        peer.connect(server.number)
        assert await peer.event() == "connected"
        peer.client.disconnect()
        await peer.event()
    assert threading.active_count() <= before


@pytest_twisted.ensureDeferred
async def test_the_passcode_is_never_logged(
    server: Server, peers: Callable[..., Peer], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        peer = peers()
        peer.connect(server.number)
        assert await peer.event() == "connected"
        await peer.client.close()
    assert "connected to the broker" in caplog.text
    assert "the-passcode" not in caplog.text


@pytest_twisted.ensureDeferred
async def test_sending_takes_less_than_a_millisecond_when_idle(server: Server, peers: Callable[..., Peer]) -> None:
    peer = peers()
    peer.connect(server.number)
    assert await peer.event() == "connected"
    times = []
    for _ in range(50):
        began = time.perf_counter()
        await peer.client.send(WORDS)  # to the socket, and back to this thread
        times.append(time.perf_counter() - began)
    assert sorted(times)[len(times) // 4] < 0.001


def test_what_is_received_faster_than_it_is_handled_makes_the_receiver_wait() -> None:
    waiting = Unhandled()
    added: list[int] = []

    def receive() -> None:
        for number in range(unhandled.MESSAGES + 50):
            waiting.add_in_thread(1)
            added.append(number)

    thread = threading.Thread(target=receive)
    thread.start()
    thread.join(0.2)
    assert len(added) == unhandled.MESSAGES
    for _ in range(10):
        waiting.take(1)
    thread.join(0.2)
    assert len(added) == unhandled.MESSAGES + 10
    waiting.release()
    thread.join(5)
    assert len(added) == unhandled.MESSAGES + 50


def test_importing_it_looks_up_no_host_names() -> None:
    """Name service may take seconds in a guest without a network."""
    code = (
        "import socket\n"
        "def no(*_): raise SystemExit('a name was looked up')\n"
        "socket.gethostbyname = socket.getfqdn = no\n"
        "import vmcontrol.stomp.client"
    )
    environment = {name: value for name, value in os.environ.items() if name != "STOMP_SKIP_HOSTNAME_SCAN"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
