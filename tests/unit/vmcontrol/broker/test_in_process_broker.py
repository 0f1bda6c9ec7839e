"""HostMain's own client of its embedded broker, and agents that come over a link: no connection, the same words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport

from vmcontrol.broker.embedded import EmbeddedBroker
from vmcontrol.broker.frames import Frame, FrameDecoder, Version, encode
from vmcontrol.broker.inprocess import InProcessClient
from vmcontrol.common import eventloop
from vmcontrol.link.streams import RelayEnd
from vmcontrol.protocol import text
from vmcontrol.protocol.messages import StompMessage

TO_GUESTS, TO_HOST = "/topic/guests", "/topic/host"


class Guest:
    """An agent whose STOMP session comes over a carrier."""

    def __init__(self, clock: Any, broker: EmbeddedBroker, passcode: str = "secret") -> None:
        self.lost = False
        self.transport = StringTransport()
        self.carrier = RelayEnd(clock, lost=self._set_lost)
        self.carrier.makeConnection(self.transport)  # type: ignore[no-untyped-call]
        self.say("CONNECT", b"", login="u", passcode=passcode, host="x", **{"accept-version": "1.2"})
        assert self.transport.producerState == "paused"  # nothing more is read before it is carried
        eventloop.start(broker.carry(self.carrier, "worker"))

    def _set_lost(self) -> None:
        self.lost = True

    def say(self, command: str, body: bytes = b"", **headers: str) -> None:
        self.carrier.dataReceived(encode(Frame(command, headers, body), Version.V1_2))

    def heard(self) -> list[Frame]:
        decoder = FrameDecoder()
        decoder.version = Version.V1_2
        decoder.receive(self.transport.value())
        self.transport.clear()
        frames = []
        while (event := decoder.next_event()) is not None:
            if isinstance(event, Frame):
                frames.append(event)
        return frames


@pytest.fixture
def broker() -> EmbeddedBroker:
    return EmbeddedBroker(Clock(), login="u", passcode="secret")


@pytest.fixture
def heard() -> list[tuple[Mapping[str, str], str]]:
    return []


@pytest.fixture
def host(broker: EmbeddedBroker, heard: list[Any]) -> InProcessClient:
    client = InProcessClient(broker, name="HostMain")
    client.subscribe(TO_HOST, lambda headers, body: heard.append((headers, body)))
    client.join()
    return client


def test_words_go_both_ways_without_a_connection(
    broker: EmbeddedBroker, host: InProcessClient, heard: list[tuple[Mapping[str, str], str]]
) -> None:
    guest = Guest(broker.clock, broker)
    [connected] = guest.heard()
    assert connected.command == "CONNECTED"
    guest.say("SUBSCRIBE", destination=TO_GUESTS, id="s")
    guest.say("SEND", "é:\\ \n".encode(), destination=TO_HOST, id="a:b\\c")
    assert [(headers["id"], body) for headers, body in heard] == [("a:b\\c", "é:\\ \n")]
    sent: list[None] = []
    host.send(StompMessage(TO_GUESTS, {"to": "08:00:27"}, "hello")).addCallback(sent.append)
    assert sent == [None]
    [message] = guest.heard()
    assert (message.headers["to"], message.body) == ("08:00:27", b"hello")


def test_a_carried_agent_shows_login_and_passcode_too(broker: EmbeddedBroker) -> None:
    guest = Guest(broker.clock, broker, passcode="wrong")
    assert [frame.command for frame in guest.heard()] == ["ERROR"]
    assert guest.transport.disconnecting


def test_the_end_of_a_carrier_is_told_to_both(broker: EmbeddedBroker) -> None:
    guest = Guest(broker.clock, broker)
    assert broker.clients == 1
    guest.carrier.connectionLost()
    assert guest.lost
    assert broker.clients == 0


def test_what_a_handler_raises_ends_nothing(broker: EmbeddedBroker) -> None:
    client, later = InProcessClient(broker, name="HostMain"), []

    def handle(_: Mapping[str, str], body: str) -> None:
        later.append(body)
        raise ValueError(body)

    client.subscribe(TO_HOST, handle)
    client.join()
    guest = Guest(broker.clock, broker)
    for word in (b"one", b"two"):
        guest.say("SEND", word, destination=TO_HOST)
    assert later == ["one", "two"]
    assert broker.clients == 1


def test_text_that_would_cost_too_much_is_not_taken(
    broker: EmbeddedBroker, host: InProcessClient, heard: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "WIDE_BODY_BYTES", 100)
    guest = Guest(broker.clock, broker)
    guest.say("SEND", "\U0001f600".encode() * 30, destination=TO_HOST)
    guest.say("SEND", b"x" * 120, destination=TO_HOST)
    assert [body for _, body in heard] == ["x" * 120]


def test_nothing_is_sent_before_it_has_joined_or_after_it_has_left(broker: EmbeddedBroker) -> None:
    client, states = InProcessClient(broker, name="HostMain"), []
    client.on_connected = lambda: states.append(client.connected)
    failures: list[Any] = []
    client.send(StompMessage(TO_GUESTS, {}, "x")).addErrback(failures.append)
    client.join()
    client.send(StompMessage(TO_GUESTS, {}, "\ud800")).addErrback(failures.append)
    client.close()
    client.send(StompMessage(TO_GUESTS, {}, "x")).addErrback(failures.append)
    assert states == [True]
    assert [failure.type for failure in failures] == [ConnectionError, UnicodeEncodeError, ConnectionError]
