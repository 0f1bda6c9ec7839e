"""The embedded broker without sockets: what each command does, and who is dropped when."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from vmcontrol.broker.embedded import BrokerLimits, EmbeddedBroker
from vmcontrol.broker.frames import HEART_BEAT, Frame, FrameDecoder, FrameLimits, HeartBeat, Version, encode
from vmcontrol.broker.session import Session

TOPIC = "/topic/t"


class Transport(StringTransport):
    """Tells its protocol when the broker has ended the connection, as a real one would."""

    ended = ""

    def loseConnection(self) -> None:
        self._end("lost")

    def abortConnection(self) -> None:
        self._end("aborted")

    def fileno(self) -> int:
        return 9

    def _end(self, how: str) -> None:
        if not self.ended:
            self.ended = how
            assert isinstance(self.protocol, Session)
            self.protocol.connectionLost(Failure(ConnectionDone()))

    protocol: Any = None


class Client:
    """The other end of one connection."""

    def __init__(self, broker: EmbeddedBroker, version: Version = Version.V1_2) -> None:
        self.version = version
        address: Any = IPv4Address("TCP", "127.0.0.1", 50000)
        self.transport: Any = Transport(address)  # type: ignore[no-untyped-call]
        self.transport.peerAddr = address
        self.session = cast("Any", broker.factory().buildProtocol(address))
        self.transport.protocol = self.session
        self._decoder = FrameDecoder(version=version)
        self.session.makeConnection(self.transport)

    def say(self, command: str, body: bytes = b"", /, **headers: str) -> None:
        frame = Frame(command, {name.replace("_", "-"): value for name, value in headers.items()}, body)
        self.raw(encode(frame, self.version))

    def raw(self, data: bytes) -> None:
        self.session.dataReceived(data)

    def heard(self) -> list[Frame | HeartBeat]:
        self._decoder.receive(self.transport.value())
        self.transport.clear()
        events: list[Frame | HeartBeat] = []
        while (event := self._decoder.next_event()) is not None:
            events.append(event)
        return events

    def frame(self) -> Frame:
        [frame] = self.heard()
        assert isinstance(frame, Frame)
        return frame

    def connect(self, **headers: str) -> Client:
        given = {"login": "u", "passcode": "secret"}
        if self.version is not Version.V1_0:
            given |= {"accept-version": self.version.value, "host": "x"}
        self.say("CONNECT", b"", **(given | headers))
        assert self.frame().command == "CONNECTED"
        return self

    def subscribe(self, topic: str = TOPIC, **headers: str) -> Client:
        if self.version is not Version.V1_0:
            headers.setdefault("id", "s")
        self.say("SUBSCRIBE", b"", destination=topic, **headers)
        return self

    @property
    def ended(self) -> str:
        return str(self.transport.ended)

    def refused(self) -> str:
        """The text of the ERROR that ended the connection."""
        frame = self.frame()
        assert frame.command == "ERROR"
        assert self.ended == "lost"
        return frame.headers["message"]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def broker(clock: Clock) -> EmbeddedBroker:
    return make(clock)


def make(clock: Clock, **limits: Any) -> EmbeddedBroker:
    return EmbeddedBroker(clock, login="u", passcode="secret", limits=dataclasses.replace(BrokerLimits(), **limits))


# CONNECT


@pytest.mark.parametrize(
    ("offered", "agreed"), [("1.0,1.1,1.2", "1.2"), ("1.1", "1.1"), ("1.1,9.9", "1.1"), ("1.2, 1.0", "1.2")]
)
def test_the_highest_common_version_is_agreed(broker: EmbeddedBroker, offered: str, agreed: str) -> None:
    client = Client(broker)
    client.say("STOMP", login="u", passcode="secret", accept_version=offered)
    assert client.frame().headers["version"] == agreed


def test_a_client_of_1_0_is_told_no_version(broker: EmbeddedBroker) -> None:
    client = Client(broker, Version.V1_0)
    client.say("CONNECT", login="u", passcode="secret")
    frame = client.frame()
    assert frame.command == "CONNECTED"
    assert "version" not in frame.headers


def test_no_common_version(broker: EmbeddedBroker) -> None:
    client = Client(broker)
    client.say("CONNECT", login="u", passcode="secret", accept_version="2.0")
    frame = client.frame()
    assert frame.headers["version"] == "1.0,1.1,1.2"
    assert client.ended


@pytest.mark.parametrize(
    "shown",
    [{}, {"login": "u"}, {"login": "u", "passcode": ""}, {"login": "u", "passcode": "Secret"}, {"passcode": "secret"}],
)
def test_who_does_not_show_the_secret_is_refused(broker: EmbeddedBroker, shown: dict[str, str]) -> None:
    client = Client(broker)
    client.say("CONNECT", b"", accept_version="1.2", **shown)
    assert client.refused() == "login or passcode is wrong"


def test_nothing_is_done_before_connect(broker: EmbeddedBroker) -> None:
    listener = Client(broker).connect().subscribe()
    client = Client(broker)
    client.say("SEND", destination=TOPIC)
    assert "before CONNECT" in client.refused()
    assert listener.heard() == []


def test_who_has_not_shown_the_secret_is_not_read_for_long(broker: EmbeddedBroker) -> None:
    client = Client(broker)
    client.raw(b"CONNECT\n" + b"a" * 5000)
    assert client.ended


def test_who_says_nothing_is_sent_away(broker: EmbeddedBroker, clock: Clock) -> None:
    silent, quick = Client(broker), Client(broker).connect()
    clock.advance(10)
    assert "no CONNECT within 10 s" in silent.refused()
    assert not quick.ended


def test_the_number_of_clients_is_bounded(clock: Clock) -> None:
    broker = make(clock, clients=1)
    first, second = Client(broker).connect(), Client(broker)
    second.say("CONNECT", b"", login="u", passcode="secret", host="x", **{"accept-version": "1.2"})
    assert "too many" in second.refused()
    first.transport.loseConnection()
    assert not Client(broker).connect().ended


def test_who_has_not_shown_the_secret_is_in_a_pool_of_its_own(clock: Clock) -> None:
    broker = make(clock, clients=1, newcomers=2)
    inside = Client(broker).connect()
    oldest, idle = Client(broker), Client(broker)
    newest = Client(broker)
    assert "came after it" in oldest.refused()
    assert [client.ended for client in (idle, newest, inside)] == ["", "", ""]
    clock.advance(broker.limits.connect_s)
    assert [client.ended for client in (idle, newest, inside)] == ["lost", "lost", ""]
    assert broker.clients == 1


# topics


def test_a_message_reaches_every_subscriber_in_its_own_version(broker: EmbeddedBroker) -> None:
    old = Client(broker, Version.V1_0).connect().subscribe()
    middle = Client(broker, Version.V1_1).connect().subscribe(id="m:1")
    new = Client(broker).connect().subscribe(id="n", ack="client")
    other = Client(broker).connect().subscribe("/topic/t2")
    sender = Client(broker).connect()
    sender.say("SEND", b"hello", destination=TOPIC, custom="a:b\\n")
    assert old.transport.value() == (
        b"MESSAGE\ndestination:/topic/t\ncustom:a:b\\n\nmessage-id:1\n\nhello\0"  # as in the original: no length
    )
    assert middle.frame().headers["subscription"] == "m:1"
    frame = new.frame()
    assert frame.body == b"hello"
    assert frame.headers == {
        "subscription": "n",
        "ack": "1",
        "custom": "a:b\\n",
        "destination": TOPIC,
        "message-id": "1",
        "content-length": "5",
    }
    assert other.heard() == sender.heard() == []


def test_a_large_body_is_not_copied_for_each_subscriber(broker: EmbeddedBroker) -> None:
    body = b"x" * 1_000_000
    readers = [Client(broker).connect().subscribe() for _ in range(3)]
    for reader in readers:
        reader.session._outbox.pauseProducing()
    Client(broker).connect().say("SEND", body, destination=TOPIC)
    bodies = [
        piece.obj for reader in readers for piece in reader.session._outbox._queue if isinstance(piece, memoryview)
    ]
    assert len(bodies) == 3
    assert len({id(body) for body in bodies}) == 1


def test_names_are_exact(broker: EmbeddedBroker) -> None:
    assert "exact names" in Client(broker).connect().subscribe("/topic/*").refused()
    assert "/topic/" in Client(broker).connect().subscribe("/queue/a").refused()


def test_unsubscribe_by_id_and_in_1_0_by_destination(broker: EmbeddedBroker) -> None:
    new = Client(broker).connect().subscribe(id="a").subscribe(id="b")
    old = Client(broker, Version.V1_0).connect().subscribe().subscribe()
    new.say("UNSUBSCRIBE", id="a")
    old.say("UNSUBSCRIBE", destination=TOPIC)
    Client(broker).connect().say("SEND", b"x", destination=TOPIC)
    assert new.frame().headers["subscription"] == "b"
    assert old.heard() == []


@pytest.mark.parametrize(
    ("command", "headers", "why"),
    [
        ("SUBSCRIBE", {"destination": TOPIC}, "without an id"),
        ("SUBSCRIBE", {"destination": TOPIC, "id": "s"}, "already"),
        ("SUBSCRIBE", {"destination": TOPIC, "id": "t", "ack": "perhaps"}, "ack"),
        ("SUBSCRIBE", {"id": "t"}, "destination"),
        ("UNSUBSCRIBE", {"id": "other"}, "such"),
        ("SEND", {}, "destination"),
        ("SEND", {"destination": TOPIC, "transaction": "t"}, "transactions"),
        ("BEGIN", {"transaction": "t"}, "not supported"),
        ("COMMIT", {"transaction": "t"}, "not supported"),
        ("ABORT", {"transaction": "t"}, "not supported"),
        ("CONNECT", {"login": "u"}, "not supported"),
        ("DANCE", {}, "not supported"),
    ],
)
def test_what_cannot_be_done_is_answered_by_error(
    broker: EmbeddedBroker, command: str, headers: dict[str, str], why: str
) -> None:
    client = Client(broker).connect().subscribe()
    client.say(command, b"", receipt="r", **headers)
    frame = client.frame()
    assert (frame.command, frame.headers["receipt-id"]) == ("ERROR", "r")
    assert why in frame.headers["message"]
    assert client.ended == "lost"


def test_receipts_come_for_every_command(broker: EmbeddedBroker) -> None:
    client = Client(broker).connect()
    client.say("SUBSCRIBE", destination="/topic/other", id="1", receipt="a:1")
    client.say("SEND", destination=TOPIC, receipt="b")
    client.say("ACK", id="7", receipt="c")
    client.say("NACK", id="7", receipt="d")
    client.say("UNSUBSCRIBE", id="1", receipt="e")
    client.say("DISCONNECT", receipt="f")
    assert [f.headers["receipt-id"] for f in client.heard() if isinstance(f, Frame)] == ["a:1", "b", "c", "d", "e", "f"]
    assert client.ended == "lost"


def test_a_client_that_left_is_forgotten(broker: EmbeddedBroker, clock: Clock) -> None:
    client = Client(broker).connect(heart_beat="1000,1000").subscribe()
    client.transport.loseConnection()
    assert list(broker.topics) == []
    assert (broker.clients, broker.memory) == (0, 0)
    assert clock.getDelayedCalls() == []


def test_a_message_that_1_0_cannot_say_is_missed_by_that_client_alone(broker: EmbeddedBroker) -> None:
    old, new = Client(broker, Version.V1_0).connect().subscribe(), Client(broker).connect().subscribe()
    sender = Client(broker).connect()
    sender.say("SEND", b"1", destination=TOPIC, cmd="a\nb")
    sender.say("SEND", b"2", destination=TOPIC)
    assert [f.body for f in old.heard() if isinstance(f, Frame)] == [b"2"]
    assert [f.body for f in new.heard() if isinstance(f, Frame)] == [b"1", b"2"]


# heart-beats


def test_heart_beats_are_sent_as_often_as_asked(broker: EmbeddedBroker, clock: Clock) -> None:
    client = Client(broker).connect(heart_beat="0,2000")
    silence = longest = 0.0
    for _ in range(200):
        clock.advance(0.1)
        silence = 0.0 if client.heard() else silence + 0.1
        longest = max(longest, silence)
    assert 1 < longest <= 2


def test_heart_beats_are_not_sent_to_who_is_being_talked_to(broker: EmbeddedBroker, clock: Clock) -> None:
    client = Client(broker).connect(heart_beat="0,2000").subscribe()
    sender = Client(broker).connect()
    for _ in range(20):
        clock.advance(0.5)
        sender.say("SEND", b"x", destination=TOPIC)
    assert HEART_BEAT not in client.heard()


def test_who_does_not_want_heart_beats_gets_none(broker: EmbeddedBroker, clock: Clock) -> None:
    client = Client(broker).connect()
    clock.pump([5.0] * 20)
    assert client.heard() == []
    assert not client.ended


def test_a_client_that_falls_silent_is_dropped_after_three_intervals(broker: EmbeddedBroker, clock: Clock) -> None:
    client = Client(broker).connect(heart_beat="6000,0")
    clock.advance(17)
    client.raw(b"\n")
    clock.advance(17.9)
    assert client.ended == ""
    clock.advance(0.2)
    assert client.ended.startswith("aborted")


@pytest.mark.parametrize("heart_beat", ["", "1", "a,b", "-1,0", "1,2,3", "99999999999,0"])
def test_nonsense_heart_beats(broker: EmbeddedBroker, heart_beat: str) -> None:
    client = Client(broker)
    client.say("CONNECT", login="u", passcode="secret", accept_version="1.2", heart_beat=heart_beat)
    assert "heart-beat" in client.refused()


# clients that cost too much


def pause(client: Client) -> None:
    """The client reads no more: its transport's buffer is full."""
    client.session._outbox.pauseProducing()


def test_a_client_that_does_not_read_is_dropped_and_others_are_not(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    broker = make(clock, queue_bytes=10_000)
    lazy, good = Client(broker).connect().subscribe(), Client(broker).connect().subscribe()
    sender = Client(broker).connect()
    pause(lazy)
    with caplog.at_level(logging.WARNING):
        for _ in range(12):
            sender.say("SEND", b"x" * 1000, destination=TOPIC)
    assert lazy.ended == "aborted"
    assert "does not read" in caplog.text
    assert len(good.heard()) == 12
    assert broker.memory == 0


def test_one_message_of_any_allowed_size_waits_for_a_slow_client(clock: Clock) -> None:
    broker = make(clock, queue_bytes=1000)
    slow = Client(broker).connect().subscribe()
    pause(slow)
    Client(broker).connect().say("SEND", b"x" * 500_000, destination=TOPIC)
    assert broker.memory > 500_000
    slow.session._outbox.resumeProducing()
    assert len(slow.frame().body) == 500_000
    assert broker.memory == 0


def test_a_client_that_reads_nothing_for_long_is_dropped(broker: EmbeddedBroker, clock: Clock) -> None:
    client = Client(broker).connect().subscribe()
    sender = Client(broker).connect()
    pause(client)
    sender.say("SEND", b"x", destination=TOPIC)
    clock.advance(20)
    sender.say("SEND", b"x", destination=TOPIC)
    assert client.ended == ""
    clock.advance(10)
    assert client.ended.startswith("aborted")


def test_a_frame_must_become_complete(broker: EmbeddedBroker, clock: Clock) -> None:
    client = Client(broker).connect()
    for _ in range(6):
        client.raw(b"SEND\n" if _ == 0 else b"a:b\n")
        clock.advance(10)
    assert "not complete" in client.refused()


def test_the_memory_of_all_clients_together_is_bounded(clock: Clock) -> None:
    broker = make(clock, memory_bytes=100_000)
    clients = [Client(broker).connect() for _ in range(20)]
    for number, client in enumerate(clients):
        client.raw(b"SEND\ndestination:/topic/t\n\n" + b"x" * (9_000 + number))
        assert broker.memory <= 100_000
    dropped = [client for client in clients if client.ended]
    assert 5 < len(dropped) < 15


def test_the_number_of_subscriptions_is_bounded(clock: Clock) -> None:
    client = Client(make(clock, subscriptions=2)).connect()
    client.subscribe(id="1").subscribe(id="2").subscribe(id="3")
    assert "more than 2" in client.refused()


def test_the_last_frame_may_be_read_for_a_limited_time(broker: EmbeddedBroker, clock: Clock) -> None:
    client = Client(broker).connect()
    pause(client)
    client.say("DANCE")
    assert client.ended == ""
    clock.advance(5)
    assert client.ended.startswith("aborted")


def test_a_frame_beyond_the_limits(clock: Clock) -> None:
    client = Client(make(clock, frame=FrameLimits(body_bytes=100))).connect()
    client.raw(b"SEND\ncontent-length:101\n\n")
    assert "101 bytes" in client.refused()


@settings(max_examples=150)
@given(
    st.lists(
        st.sampled_from(
            [
                b"CONNECT\nlogin:u\npasscode:secret\naccept-version:1.1\n\n\0",
                b"SEND\ndestination:/topic/t\n\n\0",
                b"SUBSCRIBE\nid:1\ndestination:/topic/t\n\n\0",
                b"UNSUBSCRIBE\nid:1\n\n\0",
                b"DISCONNECT\n\n\0",
                b"\n",
                b"SEND\n",
                b"receipt:1\n",
                b"\n\n",
                b"\0",
                b"\\q:\\q\n",
                b"content-length:5\n",
            ]
        )
        | st.binary(max_size=20),
        max_size=12,
    )
)
def test_whatever_a_client_sends_the_others_are_served(chunks: list[bytes]) -> None:
    clock = Clock()
    broker = make(clock)
    good, bad = Client(broker).connect().subscribe("/topic/good"), Client(broker)
    for chunk in chunks:
        if not bad.ended:
            bad.raw(chunk)
    good.say("SEND", b"x", destination="/topic/good")
    assert good.frame().body == b"x"
    if not bad.ended:
        bad.transport.loseConnection()
    assert broker.memory == 0
