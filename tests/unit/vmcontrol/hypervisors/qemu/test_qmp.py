"""QMP: bytes in any portions, commands with limits, and a QEMU that goes away."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Mapping
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import task
from twisted.internet.defer import Deferred
from twisted.internet.testing import StringTransport

from vmcontrol.common.eventloop import start
from vmcontrol.hypervisors.qemu.qmp import (
    BadMessage,
    CommandFailed,
    ConnectionGone,
    Decoder,
    NoAnswer,
    QmpClient,
)

objects = st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=20), max_size=3), max_size=6)


@given(objects, st.lists(st.integers(0, 200), max_size=8), st.sampled_from([b"\n", b"\r\n"]))
def test_objects_arrive_whatever_the_portions(messages: list[dict[str, Any]], cuts: list[int], end: bytes) -> None:
    stream = b"".join(json.dumps(message).encode() + end for message in messages)
    decoder, seen = Decoder(), []
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    for begin, stop in itertools.pairwise(edges):
        seen += decoder.feed(stream[begin:stop])
    assert seen == messages


@given(st.binary(max_size=200))
def test_any_bytes_give_objects_or_the_documented_error(data: bytes) -> None:
    with contextlib.suppress(BadMessage):
        assert all(isinstance(value, dict) for value in Decoder().feed(data))


def test_a_line_without_end_is_refused() -> None:
    decoder = Decoder(line_limit=10)
    decoder.feed(b"123456")
    with pytest.raises(BadMessage):
        decoder.feed(b"7890a")


class Connection:
    """A client and what QEMU's side sees of it."""

    def __init__(self) -> None:
        self.clock = task.Clock()
        self.events: list[tuple[str, Mapping[str, Any]]] = []
        self.client = QmpClient(cast("Any", self.clock), lambda name, data: self.events.append((name, data)))
        self.transport = StringTransport()
        self.client.makeConnection(self.transport)  # type: ignore[no-untyped-call]

    def say(self, **message: Any) -> None:
        self.client.dataReceived(json.dumps(message).encode() + b"\r\n")

    def heard(self) -> list[dict[str, Any]]:
        lines = self.transport.value().splitlines()
        self.transport.clear()
        return [json.loads(line) for line in lines]


def result(deferred: Deferred[Any]) -> Any:
    seen: list[Any] = []
    deferred.addBoth(seen.append)
    assert seen, "no result yet"
    return getattr(seen[0], "value", seen[0])


def test_greeting_then_negotiation_then_commands() -> None:
    connection = Connection()
    connected = start(connection.client.connect())
    assert connection.heard() == []
    connection.say(QMP={"version": {}})
    (request,) = connection.heard()
    assert request["execute"] == "qmp_capabilities"
    connection.say(**{"return": {}, "id": request["id"]})
    assert result(connected) is None
    status = start(connection.client.execute("query-status", job_id="x"))
    (request,) = connection.heard()
    assert request["arguments"] == {"job-id": "x"}
    connection.say(event="STOP", data={"a": 1})
    connection.say(**{"return": {"status": "running"}, "id": request["id"]})
    assert result(status) == {"status": "running"}
    assert connection.events == [("STOP", {"a": 1})]


def test_answers_find_their_commands_in_any_order_and_errors_keep_qemus_words() -> None:
    connection = Connection()
    first, second = (start(connection.client.execute(name)) for name in ("one", "two"))
    a, b = connection.heard()
    connection.say(**{"return": 2, "id": b["id"]})
    connection.say(**{"error": {"class": "GenericError", "desc": "No space left on device"}, "id": a["id"]})
    assert result(second) == 2
    error = result(first)
    assert isinstance(error, CommandFailed)
    assert error.description == "No space left on device"


def test_no_answer_in_time_and_one_that_comes_late() -> None:
    connection = Connection()
    waiting = start(connection.client.execute("stop", limit_s=3))
    (request,) = connection.heard()
    connection.clock.advance(3.1)
    assert isinstance(result(waiting), NoAnswer)
    connection.say(**{"return": {}, "id": request["id"]})
    again = start(connection.client.execute("cont"))
    connection.say(**{"return": {}, "id": connection.heard()[0]["id"]})
    assert result(again) == {}


def test_when_qemu_goes_everything_that_waits_is_told_and_later_commands_too() -> None:
    connection = Connection()
    waiting = start(connection.client.execute("stop"))
    connecting = start(connection.client.connect())
    connection.client.connectionLost()
    for deferred in (waiting, connecting, start(connection.client.execute("cont"))):
        assert isinstance(result(deferred), ConnectionGone)


def test_nonsense_ends_the_connection() -> None:
    connection = Connection()
    waiting = start(connection.client.execute("stop"))
    connection.client.dataReceived(b"HTTP/1.1 400 Bad Request\r\n")
    assert isinstance(result(waiting), BadMessage)
    assert connection.transport.disconnecting
