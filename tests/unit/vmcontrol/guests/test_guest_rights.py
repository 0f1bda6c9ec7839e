"""A guest at the embedded broker speaks for itself, hears what is meant for it, and cannot make others busy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest.mock import Mock

import pytest
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport

from vmcontrol.broker.embedded import EmbeddedBroker
from vmcontrol.broker.frames import Frame, FrameDecoder, Version, encode
from vmcontrol.broker.inprocess import InProcessClient
from vmcontrol.broker.rights import GUEST_FRAME
from vmcontrol.common import admission, eventloop
from vmcontrol.guests.registry import CHANGES_OF_ALL, CHANGES_OF_ONE, GUEST_LIMIT, Change, Guests
from vmcontrol.link.streams import RelayEnd
from vmcontrol.protocol import messages
from vmcontrol.protocol.messages import CONNECTIONS, REQUESTS, RESPONSES, Bye, Hello, StillAlive

A, B = "08:00:27:00:00:0A", "08:00:27:00:00:0B"


class Agent:
    """An agent that HostMain has dialled."""

    def __init__(self, broker: EmbeddedBroker, id: str) -> None:
        self.transport: Any = StringTransport()
        carrier = RelayEnd(broker.clock)
        carrier.makeConnection(self.transport)  # type: ignore[no-untyped-call]
        self._carrier = carrier
        connect = {"login": "u", "passcode": "secret", "host": "x", "accept-version": "1.2"}
        carrier.dataReceived(encode(Frame("CONNECT", connect), Version.V1_2))
        eventloop.start(broker.carry(carrier, "vm", id))

    def say(self, command: str, body: bytes = b"", **headers: str) -> list[Frame]:
        """What the broker answers."""
        self._carrier.dataReceived(encode(Frame(command, headers, body), Version.V1_2))
        return self.heard()

    def word(self, message: messages.Message, **more: str) -> list[Frame]:
        encoded = messages.encode(message)
        return self.say("SEND", encoded.body.encode(), destination=encoded.destination, **{**encoded.headers, **more})

    def heard(self) -> list[Frame]:
        decoder = FrameDecoder()
        decoder.version = Version.V1_2
        decoder.receive(self.transport.value())
        self.transport.clear()
        events = iter(decoder.next_event, None)
        return [event for event in events if isinstance(event, Frame)]


@pytest.fixture
def broker() -> EmbeddedBroker:
    clock: Any = Clock()
    return EmbeddedBroker(clock, login="u", passcode="secret")


@pytest.fixture
def heard(broker: EmbeddedBroker) -> list[tuple[Mapping[str, str], str]]:
    heard: list[tuple[Mapping[str, str], str]] = []
    host = InProcessClient(broker, name="HostMain")
    for topic in (CONNECTIONS, RESPONSES):
        host.subscribe(topic, lambda headers, body: heard.append((headers, body)))
    host.join()
    return heard


def test_a_guest_speaks_for_itself(broker: EmbeddedBroker, heard: list[Any]) -> None:
    agent = Agent(broker, A)
    assert [frame.command for frame in agent.heard()] == ["CONNECTED"]
    for message in (Hello(A.lower(), "10.0.2.15", 2, "x"), messages.Pong(A, "1"), messages.CommandForgotten(A, "c")):
        assert agent.word(message) == []
    assert len(heard) == 3


@pytest.mark.parametrize(
    ("what", "topic", "headers"),
    [
        ("for another in HELLO", CONNECTIONS, {"id": B}),
        ("for another in an answer", RESPONSES, {"from": B, "cmd-id": "c"}),
        ("for nobody, as an agent of protocol 1", RESPONSES, {"cmd-id": "c"}),
        ("as a host", REQUESTS, {"to": "*"}),
        ("on a topic of its own", "/topic/else", {"id": A}),
    ],
)
def test_a_guest_that_speaks(
    broker: EmbeddedBroker, heard: list[Any], what: str, topic: str, headers: dict[str, str]
) -> None:
    agent = Agent(broker, A)
    agent.heard()
    [error] = agent.say("SEND", b"CMD_RESULT {}", destination=topic, **headers)
    assert error.command == "ERROR", what
    assert heard == []


def test_a_guest_hears_what_is_meant_for_it(broker: EmbeddedBroker) -> None:
    agents = {id: Agent(broker, id) for id in (A, B)}
    for agent in agents.values():
        agent.say("SUBSCRIBE", destination=REQUESTS, id="1")
        agent.heard()
    for to in (A, B, "*"):
        broker.publish(REQUESTS, {"to": to}, b"PING")
    assert [frame.headers["to"] for frame in agents[A].heard()] == [A, "*"]
    assert [frame.headers["to"] for frame in agents[B].heard()] == [B, "*"]
    [error] = agents[A].say("SUBSCRIBE", destination=RESPONSES, id="2")
    assert error.command == "ERROR"


def test_a_guests_message_has_a_size(broker: EmbeddedBroker, heard: list[Any]) -> None:
    agent = Agent(broker, A)
    agent.heard()
    body = b"CMD_RESULT {}".ljust(GUEST_FRAME.body_bytes)
    assert agent.say("SEND", body, destination=RESPONSES, **{"from": A}) == []
    assert len(heard) == 1
    [error] = agent.say("SEND", body + b" ", destination=RESPONSES, **{"from": A})
    assert error.command == "ERROR"


def test_what_a_link_is_told_does_not_open_the_port(broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "listen", lambda *_, **__: Mock(**{"getHost.return_value.port": 1}))
    broker.listen()
    assert broker.credentials(carried=False) == (b"u", b"secret")
    assert broker.credentials(carried=True) == (broker.login.encode(), broker.passcode.encode())
    assert broker.passcode != "secret"


# how often guests come and go


def test_a_guest_that_comes_and_goes_all_the_time_is_not_told_of_each_time() -> None:
    guests = Guests(30.0)
    changes = [guests.heard(Hello(A, "", 2), 100.0) for _ in range(1000)]
    assert changes.count(Change.REGISTERED) == CHANGES_OF_ONE.burst
    assert guests.is_there(A)
    assert guests.heard(Bye(A, ""), 100.0) is Change.NONE
    assert guests.heard(Hello(B, "", 2), 100.0) is Change.REGISTERED
    assert guests.heard(Bye(A, ""), 100.0 + CHANGES_OF_ONE.every_s) is Change.GONE
    assert guests.heard(StillAlive(A, "", 2), 100.0 + 3 * CHANGES_OF_ONE.every_s) is Change.REGISTERED


def test_ever_new_ids_have_a_bound_together() -> None:
    guests = Guests(30.0)
    changes = 0
    for number in range(10 * GUEST_LIMIT):
        id = f"{number:012d}"
        changes += guests.heard(Hello(id, "", 2), 100.0) is not Change.NONE
        changes += guests.heard(Bye(id, ""), 100.0) is not Change.NONE
    assert changes <= CHANGES_OF_ALL.burst + 1
