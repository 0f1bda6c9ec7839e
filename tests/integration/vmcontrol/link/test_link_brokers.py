"""The link through real brokers: our client, the words, and clients of other times, against the embedded broker,
ActiveMQ and RabbitMQ alike."""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, DeferredList, DeferredQueue
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.protocol import Protocol

from tests.support.brokers import KINDS, KINDS_OF_2009, BrokerAddress, running_broker
from tests.unit.vmcontrol.protocol.test_messages import EVERY_MESSAGE, MAC
from vmcontrol.broker.frames import Frame, FrameDecoder, Version, encode
from vmcontrol.common.eventloop import the_reactor, with_limit
from vmcontrol.protocol import messages
from vmcontrol.protocol.messages import CommandResult, CommandRun, Message, Ping, Pong, decode
from vmcontrol.protocol.text import BODY_LIMIT
from vmcontrol.stomp.client import NotConnected, StompClient

LIMIT_S = 20.0
log = logging.getLogger(__name__)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def broker(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerAddress]:
    with running_broker(kind, tmp_path_factory.mktemp(kind), limits={"heart_beat_send_ms": 100}) as address:
        yield address


class Peer:
    """A StompClient whose events can be waited for, one after the other."""

    def __init__(self, name: str, *topics: str, **options: Any) -> None:
        self.messages: DeferredQueue[tuple[Mapping[str, str], str]] = DeferredQueue()
        self.events: DeferredQueue[str] = DeferredQueue()
        self.client = StompClient(
            the_reactor(),
            name=name,
            on_connected=lambda: self.events.put("connected"),
            on_disconnected=self.events.put,
            **options,
        )
        for topic in topics:
            self.client.subscribe(topic, lambda headers, body: self.messages.put((headers, body)))

    def connect(self, broker: BrokerAddress, passcode: str | None = None) -> None:
        self.client.connect(broker.host, broker.port, broker.login, passcode or broker.passcode)

    async def connected(self, broker: BrokerAddress) -> None:
        self.connect(broker)
        assert await self.event() == "connected"

    async def event(self, limit: float = LIMIT_S) -> str:
        return str(await within(self.events.get(), "an event", limit))

    async def message(self, limit: float = LIMIT_S) -> Message:
        return decode(*await within(self.messages.get(), "a message", limit))

    async def send(self, message: Message) -> None:
        await within(self.client.send(messages.encode(message)), "sending")

    async def reaches(self, other: Peer) -> None:
        """Until the broker has acted on the other's SUBSCRIBE (ActiveMQ does so a moment later)."""
        mark = Ping(MAC, str(time.monotonic_ns()))
        topic = next(iter(other.client._handlers))
        while True:
            sent = messages.encode(mark)
            await self.client.send(messages.StompMessage(topic, sent.headers, sent.body))
            try:
                while await other.message(0.2) != mark:
                    pass
            except AssertionError:
                continue
            break
        while other.messages.pending:  # more marks
            await other.message()


async def within(deferred: Deferred[Any], what: str, limit: float = LIMIT_S) -> Any:
    try:
        return await with_limit(the_reactor(), limit, what, deferred)
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error


class Raw(Protocol):
    """A client that says exactly what it is told to; `version` is how it reads."""

    transport: Any

    def __init__(self, version: Version = Version.V1_0) -> None:
        self.received: DeferredQueue[object] = DeferredQueue()
        self.beats = 0
        self.wire = b""
        self._decoder = FrameDecoder(version=version)

    def dataReceived(self, data: bytes) -> None:
        self.wire += data
        self._decoder.receive(data)
        while (event := self._decoder.next_event()) is not None:
            if isinstance(event, Frame):
                self.received.put(event)
            else:
                self.beats += 1
                if self.on_beat:
                    self.on_beat()

    on_beat: Callable[[], None] | None = None

    def connectionLost(self, reason: object = None) -> None:
        self.received.put("closed")

    def say(self, data: bytes) -> None:
        self.transport.write(data)

    async def frame(self, limit: float = LIMIT_S) -> Frame:
        event = await within(self.received.get(), "a frame", limit)
        assert isinstance(event, Frame), event
        return event

    async def closed(self) -> None:
        while await within(self.received.get(), "the end of the connection") != "closed":
            pass

    def leave(self) -> None:
        self.transport.abortConnection()


async def raw(broker: BrokerAddress, version: Version = Version.V1_0) -> Raw:
    endpoint = TCP4ClientEndpoint(the_reactor(), broker.host, broker.port, timeout=10)
    protocol: Raw = await connectProtocol(endpoint, Raw(version))
    return protocol


async def raw_session(broker: BrokerAddress, version: str = "1.2", **headers: str) -> Raw:
    client = await raw(broker, Version(version))
    connect = {"accept-version": version, "host": "/", "login": broker.login, "passcode": broker.passcode}
    client.say(
        encode(Frame("CONNECT", {**connect, **{k.replace("_", "-"): v for k, v in headers.items()}}), Version.V1_2)
    )
    assert (await client.frame()).command == "CONNECTED"
    return client


@pytest.fixture
def peers() -> Iterator[Callable[..., Peer]]:
    """Makes peers and closes them; afterwards no thread of theirs is left."""
    made: list[Peer] = []

    def make(name: str, *topics: str, **options: Any) -> Peer:
        made.append(Peer(name, *topics, **options))
        return made[-1]

    before = set(threading.enumerate())
    yield make
    pytest_twisted.blockon(DeferredList([peer.client.close() for peer in made]))
    left = [thread.name for thread in set(threading.enumerate()) - before if not thread.name.startswith("PoolThread")]
    assert left == []


def host(peers: Callable[..., Peer], **options: Any) -> Peer:
    return peers("host", messages.RESPONSES, messages.CONNECTIONS, **options)


def guest(peers: Callable[..., Peer], **options: Any) -> Peer:
    return peers("guest", messages.REQUESTS, **options)


@pytest_twisted.ensureDeferred
async def test_every_word_goes_both_ways_unchanged(broker: BrokerAddress, peers: Callable[..., Peer]) -> None:
    here, there = host(peers), guest(peers)
    await here.connected(broker)
    await there.connected(broker)
    await here.reaches(there)
    await there.reaches(here)
    whole = Pong(MAC, "1795338340720")  # ActiveMQ drops whoever sends a fraction
    for message in [whole if isinstance(message, Pong) else message for message in EVERY_MESSAGE]:
        to_guest = messages.encode(message).destination == messages.REQUESTS
        sender, receiver = (here, there) if to_guest else (there, here)
        await sender.send(message)
        assert await receiver.message() == message


@pytest_twisted.ensureDeferred
async def test_the_largest_message_arrives_whole_while_small_words_still_pass(
    broker: BrokerAddress, peers: Callable[..., Peer]
) -> None:
    here, there = host(peers), guest(peers)
    await here.connected(broker)
    await there.connected(broker)
    await there.reaches(here)
    large = CommandResult("c1", MAC, {"out": "x" * (BODY_LIMIT - 100)})
    assert len(messages.encode(large).body) > BODY_LIMIT - 1000
    began = time.monotonic()
    await there.send(large)
    await there.send(Pong(MAC, "1"))
    assert await here.message(60) == large
    assert await here.message() == Pong(MAC, "1")
    log.info("8 MB through the broker: %.2f s", time.monotonic() - began)
    assert here.client.connected
    assert there.client.connected


@pytest_twisted.ensureDeferred
async def test_a_wrong_secret_is_a_clear_failure(broker: BrokerAddress, peers: Callable[..., Peer]) -> None:
    peer = guest(peers)
    peer.connect(broker, passcode="wrong")
    reason = await peer.event()
    assert "refuses the connection" in reason
    assert any(word in reason for word in ("passcode", "password", "Access refused"))
    assert broker.passcode not in reason
    assert not peer.client.connected
    with pytest.raises(NotConnected):
        await peer.client.send(messages.encode(Ping(MAC, "1")))
    await peer.connected(broker)  # the same client, with the right one


@pytest_twisted.ensureDeferred
async def test_an_idle_connection_is_kept_by_heart_beats(broker: BrokerAddress, peers: Callable[..., Peer]) -> None:
    peer = guest(peers, heart_beat_ms=500)
    await peer.connected(broker)
    with pytest.raises(AssertionError, match="an event"):
        await peer.event(limit=4.5)  # stomp.py gives up after twice its tolerance, 3 s, when nothing comes
    assert peer.client.connected


@pytest_twisted.ensureDeferred
async def test_the_broker_sends_heart_beats_that_a_raw_client_asked_for(broker: BrokerAddress) -> None:
    client = await raw_session(broker, heart_beat="0,1000")
    beaten: Deferred[None] = Deferred()
    client.on_beat = lambda: None if beaten.called or client.beats < 2 else beaten.callback(None)
    await within(beaten, "two heart-beats", 6)
    client.leave()


@pytest_twisted.ensureDeferred
async def test_after_a_restart_of_the_broker_clients_come_back_and_are_subscribed(
    kind: str, tmp_path: Path, peers: Callable[..., Peer]
) -> None:
    here, there = host(peers, reconnect=True), guest(peers, reconnect=True)
    with running_broker(kind, tmp_path) as first:
        await here.connected(first)
        await there.connected(first)
        await here.reaches(there)
    for peer in (here, there):
        assert "connect" in await peer.event()
        assert not peer.client.connected
        with pytest.raises(NotConnected):
            await peer.client.send(messages.encode(Ping(MAC, "1")))
    with running_broker(kind, tmp_path, port=first.port) as second:
        for peer in (here, there):  # the secret has changed: they are refused until they are told
            peer.connect(second)
            while await peer.event() != "connected":
                pass
        await here.reaches(there)
        await there.send(Pong(MAC, "7"))
        assert await here.message() == Pong(MAC, "7")


@pytest_twisted.ensureDeferred
async def test_a_lost_connection_comes_back_by_itself(broker: BrokerAddress, peers: Callable[..., Peer]) -> None:
    here, there = host(peers), guest(peers, reconnect=True)
    await here.connected(broker)
    await there.connected(broker)
    await here.reaches(there)
    assert there.client._session is not None
    there.client._session._transport.cut()
    began = time.monotonic()
    assert await there.event() != "connected"
    assert await there.event() == "connected"
    assert time.monotonic() - began < 2
    await here.reaches(there)


# the wire of 2009


@pytest.mark.parametrize("kind", KINDS_OF_2009, indirect=True, scope="module")
@pytest_twisted.ensureDeferred
async def test_an_agent_of_2009_and_our_host(kind: str, broker: BrokerAddress, peers: Callable[..., Peer]) -> None:
    here = host(peers)
    await here.connected(broker)
    agent = await raw(broker)
    agent.say(f"CONNECT\nlogin: {broker.login}\npasscode: {broker.passcode}\n\n\0\n".encode())
    assert (await agent.frame()).command == "CONNECTED"
    agent.say(b"SUBSCRIBE\ndestination: /topic/cmd_requests\nack: auto\n\n\0\n")
    hello = f"SEND\ndestination: /topic/connections\nid: {MAC}\nip: 192.168.56.101\n\nHELLO\0\n".encode()
    agent.say(hello)
    while True:  # until our own subscription works
        try:
            assert await here.message(0.3) == messages.Hello(MAC, "192.168.56.101", 1, "")
            break
        except AssertionError:
            agent.say(hello)

    while True:  # and the agent's
        await here.send(Ping(MAC, "1795338340720"))
        try:
            ping = await agent.frame(0.5)
            break
        except AssertionError:
            continue
    assert ping.body == b"PING"
    assert (ping.headers["to"], ping.headers["timestamp"]) == (MAC, "1795338340720")
    agent.say(f"SEND\ndestination: /topic/cmd_responses\nfrom: {MAC}\ntimestamp: 1795338340720\n\nPONG\0\n".encode())
    while isinstance(message := await here.message(), messages.Hello):
        pass
    assert message == Pong(MAC, "1795338340720")

    await here.send(CommandRun(MAC, "u-1", "ls", ("a b", "c"), {"A": "1"}, "/usr", "in"))
    while (run := await agent.frame()).body == b"PING":
        pass
    assert run.body.split()[0] == b"CMD_RUN"
    assert {name: run.headers[name] for name in ("to", "cmd-id", "cmd", "args", "env", "path", "fileForStdin")} == {
        "to": MAC,
        "cmd-id": "u-1",
        "cmd": "ls",
        "args": "['a b', 'c']",
        "env": "{'A': '1'}",
        "path": "'/usr'",
        "fileForStdin": "in",
    }
    agent.say(
        b'SEND\ndestination: /topic/cmd_responses\ncmd-id: u-1\n\nCMD_RESULT {"cmd-id": "u-1", "out": "x\\n"}\0\n'
    )
    assert await here.message() == CommandResult("u-1", "", {"cmd-id": "u-1", "out": "x\n"})
    agent.leave()


@pytest.mark.parametrize("kind", KINDS_OF_2009, indirect=True, scope="module")
@pytest_twisted.ensureDeferred
async def test_a_host_of_2009_and_our_agent(kind: str, broker: BrokerAddress, peers: Callable[..., Peer]) -> None:
    there = guest(peers)
    await there.connected(broker)
    old = await raw(broker)
    old.say(f"CONNECT\nlogin: {broker.login}\npasscode: {broker.passcode}\n\n\0\n".encode())
    assert (await old.frame()).command == "CONNECTED"
    old.say(b"SUBSCRIBE\ndestination: /topic/connections\nack: auto\n\n\0\n")
    old.say(b"SUBSCRIBE\ndestination: /topic/cmd_responses\nack: auto\n\n\0\n")
    run = (
        f"SEND\ndestination: /topic/cmd_requests\nto: {MAC}\ncmd-id: u-2\ncmd: ls\nargs: ['1 ']\nenv: {{}}\n"
        "path: None\nfileForStdin: \n\nCMD_RUN\0\n"
    ).encode()
    while True:
        old.say(run)
        try:
            message = await there.message(0.5)
            break
        except AssertionError:
            continue
    assert message == CommandRun(MAC, "u-2", "ls", ("1 ",), {}, None, "", legacy=True)
    await there.send(messages.Hello(MAC, "10.0.2.15", 2, "vmmain"))
    hello = await old.frame()
    assert hello.body == b"HELLO"
    assert (hello.headers["id"], hello.headers["ip"]) == (MAC, "10.0.2.15")
    assert f"\nid:{MAC}\n".encode() in old.wire  # the colons are not escaped for a reader of 1.0
    old.leave()


# receipts, errors, bad behaviour


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2"])
@pytest_twisted.ensureDeferred
async def test_receipts_and_the_end(kind: str, broker: BrokerAddress, version: str) -> None:
    client = await raw_session(broker, version)
    topic = f"/topic/receipts-{version}-{time.monotonic_ns()}"
    how = Version(version)
    client.say(encode(Frame("SUBSCRIBE", {"destination": topic, "id": "s:1", "receipt": "r-1"}), how))
    assert (await client.frame()).headers["receipt-id"] == "r-1"
    client.say(encode(Frame("SEND", {"destination": topic, "custom": "a:b\\c", "receipt": "r-2"}, b"hello"), how))
    received = {frame.command: frame for frame in [await client.frame(), await client.frame()]}
    assert received["RECEIPT"].headers["receipt-id"] == "r-2"
    message = received["MESSAGE"]
    assert (message.body, message.headers["destination"]) == (b"hello", topic)
    # RabbitMQ escapes in 1.0 too, where that is not known
    assert message.headers["subscription"] == ("s\\c1" if (kind, version) == ("rabbitmq", "1.0") else "s:1")
    assert message.headers["custom"] == ("a:b\\c" if version != "1.0" else message.headers["custom"])
    assert message.headers["message-id"]
    client.say(encode(Frame("UNSUBSCRIBE", {"id": "s:1", "destination": topic, "receipt": "r-3"}), how))
    assert (await client.frame()).headers["receipt-id"] == "r-3"
    client.say(encode(Frame("SEND", {"destination": topic, "receipt": "r-4"}, b"nobody"), how))
    assert (await client.frame()).headers["receipt-id"] == "r-4"
    client.say(encode(Frame("DISCONNECT", {"receipt": "bye"}), how))
    assert (await client.frame()).headers["receipt-id"] == "bye"
    client.leave()
    await client.closed()


@pytest_twisted.ensureDeferred
async def test_an_unknown_command_is_answered_by_error(broker: BrokerAddress) -> None:
    client = await raw_session(broker)
    client.say(b"DANCE\n\n\0")
    frame = await client.frame()
    assert frame.command == "ERROR"
    assert frame.headers["message"]
    client.leave()


@pytest_twisted.ensureDeferred
async def test_a_frame_that_is_too_large_ends_its_sender_alone(
    kind: str, broker: BrokerAddress, peers: Callable[..., Peer]
) -> None:
    here, there = host(peers), guest(peers)
    await here.connected(broker)
    await there.connected(broker)
    await there.reaches(here)
    client = await raw_session(broker)
    client.say(b"SEND\ndestination:/topic/cmd_responses\ncontent-length:999999999\n\n" + b"x" * 100_000)
    client.say(b"x" * 17_000_000)
    if kind == "rabbitmq":  # 3.10 has no limit for a frame, but nobody else waits for its end
        await there.reaches(here)
        client.leave()
    await client.closed()
    await there.reaches(here)


@pytest_twisted.ensureDeferred
async def test_a_client_that_stops_reading_harms_nobody(
    kind: str, broker: BrokerAddress, peers: Callable[..., Peer]
) -> None:
    here, there = host(peers), guest(peers)
    await here.connected(broker)
    await there.connected(broker)
    await there.reaches(here)
    lazy = await raw_session(broker)
    lazy.say(b"SUBSCRIBE\nid:1\ndestination:/topic/cmd_responses\nreceipt:r\n\n\0")
    await lazy.frame()
    lazy.transport.pauseProducing()
    large = CommandResult("c1", MAC, {"out": "x" * (BODY_LIMIT - 100)})
    slowest = 0.0
    for _ in range(6):
        began = time.monotonic()
        await there.send(large)
        assert await here.message(60) == large
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < 10
    if kind == "embedded":  # ActiveMQ keeps a bounded number of messages for it instead
        lazy.transport.resumeProducing()
        await lazy.closed()
    lazy.leave()


@pytest_twisted.ensureDeferred
async def test_a_word_takes_milliseconds(broker: BrokerAddress, peers: Callable[..., Peer]) -> None:
    here, there = host(peers), guest(peers)
    await here.connected(broker)
    await there.connected(broker)
    await here.reaches(there)
    times = []
    for number in range(50):
        began = time.perf_counter()
        await here.send(Ping(MAC, str(number)))
        assert await there.message() == Ping(MAC, str(number))
        times.append(time.perf_counter() - began)
    median = statistics.median(times)
    log.info("one way through the broker: median %.2f ms", 1000 * median)
    assert median < 0.02  # 40 ms would be Nagle's algorithm waiting for an acknowledgement
