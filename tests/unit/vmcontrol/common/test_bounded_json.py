"""JSON that a guest may have written is measured before it becomes objects."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcontrol.link.errors import GuestRefused
from vmcontrol.link.listing import Entry, entries
from vmcontrol.protocol import messages
from vmcontrol.protocol.text import JSON_DEPTH, JSON_VALUES, BadMessage, bounded_json, check_cost

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


@given(VALUES)
def test_what_is_small_is_read_as_it_is(value: object) -> None:
    assert bounded_json(json.dumps(value).encode()) == json.loads(json.dumps(value))


MIB4 = 4 * 1024 * 1024
HOSTILE = {
    "nested": b'{"error": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    "empty lists": b'{"a": [' + b"[]," * (MIB4 // 3) + b"[]]}",
    "objects": b'{"a": [' + b'{"":0},' * (MIB4 // 7) + b"1]}",
    "numbers": b"[" + b"1," * (MIB4 // 2) + b"1]",
    "quotes without an end": b'["' + b'\\"' * (MIB4 // 2),
    "bracket in strings": b"[" + b'"[",' * (MIB4 // 4) + b"1]",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_would_cost_much_is_refused_soon_and_cheaply(kind: str) -> None:
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises((BadMessage, ValueError)):
            bounded_json(HOSTILE[kind])
        assert tracemalloc.get_traced_memory()[1] < 12_000_000
        with pytest.raises((BadMessage, ValueError)):
            messages.decode({"from": "A", "cmd-id": "1"}, "CMD_STATE " + HOSTILE[kind].decode())
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 2.0


def test_small_messages_are_measured_too() -> None:
    with pytest.raises(BadMessage, match="deep"):
        check_cost("[" * (JSON_DEPTH + 1), 0)


def test_what_is_for_guests_is_not_even_read_by_a_host() -> None:
    headers = {"to": "*", "cmd-id": "1", "cmd": "x", "args": "[" * 10 + "]" * 10}
    with pytest.raises(BadMessage, match="not for a host"):
        messages.decode(headers, "CMD_RUN", by_hostmain=True)
    with pytest.raises(BadMessage, match="not for a host"):
        messages.decode({}, "PING", by_hostmain=True)


def test_a_listing_is_what_makes_sense_in_it() -> None:
    said = [
        {"name": "a", "size": 5, "folder": False},
        {"name": "b", "size": {"x": []}, "folder": "yes"},
        {"name": ["c"]},
        {"name": "d" * 5000, "size": -1},
        {"name": "", "size": 1},
        7,
        {"name": "e", "size": True, "folder": True},
    ]
    assert entries(said, 10) == [
        Entry("a", 5, False),
        Entry("b", 0, False),
        Entry("d" * 255, 0, False),
        Entry("e", 0, True),
    ]
    assert entries(said, 1) == [Entry("a", 5, False)]
    assert entries({}, 10) == entries("text", 10) == entries(None, 10) == []


def test_a_refusal_quotes_text_only() -> None:
    assert "no reason" in str(GuestRefused(500, {"error": [[[]]]}, "GET"))
    assert len(str(GuestRefused(500, {"error": "x" * 10_000}, "GET"))) < 600


def test_a_host_reads_no_more_values_of_a_small_message_than_of_a_large_one() -> None:
    body = 'CMD_STATE {"state": "running", "x": [' + "[]," * JSON_VALUES + "1]}"
    headers = {"from": "A", "cmd-id": "1"}
    assert messages.decode(headers, body)
    with pytest.raises(BadMessage, match="values"):
        messages.decode(headers, body, by_hostmain=True)
