"""The words: every message survives the wire, the forms of 2009 are read as recorded, and nothing else gets in."""

from __future__ import annotations

import contextlib
import json
import sys
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmcontrol.protocol import messages
from vmcontrol.protocol.command import CommandState, CommandStatus
from vmcontrol.protocol.messages import (
    Bye,
    CommandCancel,
    CommandForget,
    CommandForgotten,
    CommandList,
    CommandQuery,
    CommandResult,
    CommandRun,
    CommandTable,
    Hello,
    Message,
    Ping,
    Pong,
    StillAlive,
    addressed_to,
    decode,
    encode,
)
from vmcontrol.protocol.text import BODY_LIMIT, LITERAL_LIMIT, BadMessage, literal

MAC = "08:00:27:AA:BB:CC"

EVERY_MESSAGE: list[Message] = [
    Hello(MAC, "10.0.2.15", 2, "vmmain 0.1"),
    StillAlive(MAC, "10.0.2.15", 2, "vmmain 0.1"),
    Bye(MAC, "10.0.2.15"),
    Ping(MAC, "1795338340720"),
    Pong(MAC, "1795338340.72"),
    CommandRun(MAC, "c1", "./worker", ("a b", "q\"'", "x\ny", "ü€😀", "\\n:c", ""), {"A": "1\n2"}, "/tmp/ü", "in", 3),
    CommandResult("c1", MAC, {"out": "a\nb\u2028😀", "exit_status": 0, "resources": {"ru_utime": 0.5}}),
    CommandStatus("c1", MAC, CommandState.RUNNING, 2, 4711, 0.5, 1.25, 2**40, "half"),
    CommandStatus("c1", MAC, CommandState.UNKNOWN),
    CommandQuery(MAC, "c1"),
    CommandCancel("*", "c1", 0.125),
    CommandForget(MAC, "c1"),
    CommandForgotten(MAC, "c1"),
    CommandList(MAC, "token"),
    CommandTable(MAC, "token", (CommandStatus("c1", MAC, CommandState.FINISHED, 1),)),
    CommandTable(MAC, "token", ()),
]

header_text = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=40).filter(
    lambda text: text == text.strip()
)
any_text = st.text(max_size=60)  # lone surrogates included: Python makes them of bytes that are no UTF-8
no_nul = st.text(st.characters(exclude_characters="\0"), max_size=60)
ids = header_text.map(str.upper).filter(lambda text: text == text.upper() and text == text.strip())


@pytest.mark.parametrize("message", EVERY_MESSAGE, ids=lambda message: type(message).__name__)
def test_every_message_survives_the_wire(message: Message) -> None:
    sent = encode(message)
    assert decode(sent.headers, sent.body) == message


@given(
    st.builds(
        CommandRun,
        to=header_text,
        id=header_text,
        command=no_nul,
        arguments=st.lists(no_nul, max_size=5).map(tuple),
        environment=st.dictionaries(no_nul, no_nul, max_size=4),
        folder=st.none() | no_nul,
        stdin=no_nul,
        attempt=st.integers(0, 2**31 - 1),
        inline_output=st.booleans(),
        fraction_done_file=any_text,
    )
)
def test_any_command_survives_the_wire(run: CommandRun) -> None:
    sent = encode(run)
    assert decode(sent.headers, sent.body) == run


@given(ids, header_text, st.dictionaries(any_text, st.none() | st.booleans() | st.integers() | any_text, max_size=5))
def test_any_result_survives_the_wire(sender: str, id: str, body: dict[str, Any]) -> None:
    result = CommandResult(id, sender, body)
    sent = encode(result)
    assert decode(sent.headers, sent.body) == result


@given(
    st.builds(
        CommandStatus,
        id=header_text,
        sender=ids,
        state=st.sampled_from(CommandState),
        attempt=st.integers(0, 2**31 - 1),
        pid=st.none() | st.integers(0, 2**31 - 1),
        fraction_done=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        cpu_time_s=st.floats(allow_nan=False, allow_infinity=False),
        memory_bytes=st.integers(0, 2**63 - 1),
        detail=any_text,
    )
)
def test_any_status_survives_the_wire(status: CommandStatus) -> None:
    sent = encode(status)
    assert decode(sent.headers, sent.body) == status


# the wire of 2009, as recorded


def test_hello_of_2009() -> None:
    assert decode({"id": "08:00:27:aa:bb:cc", "ip": "192.168.56.101"}, "HELLO") == Hello(MAC, "192.168.56.101", 1, "")


def test_beacon_and_bye_of_2009() -> None:
    assert decode({"id": MAC, "ip": "1.2.3.4"}, "STILL_ALIVE") == StillAlive(MAC, "1.2.3.4")
    assert decode({"id": MAC, "ip": "1.2.3.4"}, "BYE") == Bye(MAC, "1.2.3.4")


def test_ping_of_2009_has_a_fraction_and_is_echoed_as_it_was() -> None:
    assert decode({"to": MAC, "timestamp": "1795338340.72"}, "PING") == Ping(MAC, "1795338340.72")
    assert encode(Pong(MAC, "1795338340.72")).headers == {"from": MAC, "timestamp": "1795338340.72"}


def test_our_ping_has_whole_milliseconds_because_activemq_drops_the_connection_otherwise() -> None:
    with pytest.raises(ValueError, match="milliseconds"):
        encode(Ping(MAC, "1795338340.72"))


@pytest.mark.parametrize(
    ("path", "folder"), [("None", None), ("'/usr'", "/usr"), ("", None)], ids=["none", "quoted", "missing"]
)
def test_command_of_2009(path: str, folder: str | None) -> None:
    headers = {"to": MAC, "cmd-id": "u-1", "cmd": "ls", "args": "['1 ']", "env": "{}", "path": path, "fileForStdin": ""}
    expected = CommandRun(MAC, "u-1", "ls", ("1 ",), {}, folder, "", legacy=True)
    assert decode(headers, "CMD_RUN") == expected


def test_command_of_2009_with_a_tuple_and_an_environment() -> None:
    headers = {"to": "*", "cmd-id": "u", "cmd": "ls", "args": "('a', 'b')", "env": "{'HOME': '/'}", "path": "None"}
    message = decode(headers, "CMD_RUN")
    assert isinstance(message, CommandRun)
    assert (message.arguments, message.environment) == (("a", "b"), {"HOME": "/"})


def test_our_command_can_be_read_by_an_agent_of_2009() -> None:
    sent = encode(CommandRun(MAC, "c1", "ls", ("a b", "c\nd"), {"A": "1"}, "/usr", "in"))
    assert sent.body.split()[0] == "CMD_RUN"
    assert sent.headers == {
        "to": MAC,
        "cmd-id": "c1",
        "cmd": "ls",
        "args": "['a b', 'c\\nd']",
        "env": "{'A': '1'}",
        "path": "'/usr'",
        "fileForStdin": "in",
    }


def test_result_of_2009() -> None:
    body = {"cmd-id": "u", "out": "x", "err": "", "finished": True, "exitCodeOrSignal": 0, "resources": {}}
    assert decode({"cmd-id": "u"}, f"CMD_RESULT {json.dumps(body)}") == CommandResult("u", "", body)


# what cannot be sent


@pytest.mark.parametrize(
    "message",
    [
        CommandRun(MAC, "c", "a\0b"),
        CommandRun(MAC, "c", "a", ("\0",)),
        CommandQuery(MAC, "line\nbreak"),
        CommandQuery(" blank", "c"),
        CommandQuery(MAC, "\udc80"),
        CommandQuery(MAC, "x" * 9000),
        CommandResult("c", MAC, {"cpu": float("nan")}),
        CommandResult("c", MAC, {"set": {1}}),
        CommandResult("c", MAC, {"out": "x" * BODY_LIMIT}),
        CommandResult("c", MAC, {"out": "x" * 9_000_000 + "😀"}),
        CommandResult("c", MAC, {"out": [[]] * 600_000}),
        CommandRun(MAC, "c", "a\nb", legacy=True),
    ],
)
def test_what_cannot_be_carried_is_refused_before_it_is_sent(message: Message) -> None:
    with pytest.raises(ValueError, match=r".+"):
        encode(message)


@pytest.mark.parametrize("argument", ["x" * 9000, "€" * 3000, "\\" * 2500])
def test_what_is_too_long_for_activemqs_headers_goes_in_the_body_alone(argument: str) -> None:
    run = CommandRun(MAC, "c", "ls", (argument,))
    sent = encode(run)
    assert "args" not in sent.headers
    assert decode(sent.headers, sent.body) == run


# what is none of ours


@given(st.dictionaries(st.sampled_from(["id", "ip", "to", "from", "cmd-id", "args", "env", "path", "cmd"]), any_text))
def test_any_text_is_a_message_or_a_bad_word(headers: dict[str, str]) -> None:
    for word in (*messages._READERS, "NONSENSE", ""):
        with contextlib.suppress(BadMessage):
            decode(headers, word)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
keys = ["cmd", "args", "env", "path", "stdin", "attempt", "inline-output", "state", "pid", "cpu-time", "memory"]


@settings(max_examples=200)
@given(
    st.sampled_from(sorted(messages._READERS)),
    st.dictionaries(st.sampled_from([*keys, "detail", "fraction-done", "cmd-id"]), json_values)
    | st.lists(st.dictionaries(st.sampled_from([*keys, "cmd-id"]), json_values, max_size=4), max_size=3)
    | json_values,
)
def test_any_json_is_a_message_that_can_be_sent_on_or_a_bad_word(word: str, value: object) -> None:
    headers = {"id": MAC, "to": MAC, "from": MAC, "cmd-id": "c", "token": "t", "timestamp": "1", "cmd": "x"}
    try:
        message = decode(headers, f"{word} {json.dumps(value)}")
    except BadMessage:
        return
    if not isinstance(message, CommandResult):  # whose body may be anything that JSON can say
        sent = encode(message)
        assert decode(sent.headers, sent.body) == message


@given(st.text(max_size=200))
def test_any_body_is_a_message_or_a_bad_word(body: str) -> None:
    for word in ("CMD_RUN ", "CMD_STATE ", "CMD_TABLE ", "CMD_RESULT ", ""):
        with contextlib.suppress(BadMessage):
            decode({"to": "*", "cmd-id": "c", "from": MAC, "token": "t", "cmd": "ls"}, word + body)


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, "HELLO"),
        ({"id": MAC, "protocol": "²"}, "HELLO"),
        ({"to": MAC}, "PING"),
        ({"to": MAC, "cmd-id": "c", "grace": "nan"}, "CMD_CANCEL"),
        ({"to": MAC, "cmd-id": "c", "grace": "-1"}, "CMD_CANCEL"),
        ({"cmd-id": "c", "from": MAC}, 'CMD_STATE {"state": "running", "pid": 1e999}'),
        ({"cmd-id": "c", "from": MAC}, 'CMD_STATE {"state": "running", "memory": true}'),
        ({"cmd-id": "c", "from": MAC}, 'CMD_STATE {"state": "running", "fraction-done": NaN}'),
        ({"cmd-id": "c", "from": MAC}, 'CMD_STATE {"state": "running", "fraction-done": 1e999}'),
        ({"cmd-id": "c", "from": MAC}, 'CMD_STATE {"state": "dancing"}'),
        ({"cmd-id": "c", "from": MAC}, "CMD_STATE {} x"),
        ({"to": MAC, "cmd-id": "c", "cmd": "x"}, 'CMD_RUN {"args": ["\\u0000"]}'),
        ({"to": MAC, "cmd-id": "c", "cmd": "x", "args": "__import__('os')"}, "CMD_RUN"),
        ({"to": MAC, "cmd-id": "c", "cmd": "x", "env": "{1: 2}"}, "CMD_RUN"),
        ({"from": MAC, "token": "t"}, 'CMD_TABLE [{"state": "running"}]'),
        ({"from": MAC, "token": "t"}, 'CMD_TABLE [{"state": "running", "cmd-id": "a\\nb"}]'),
        ({"to": MAC, "cmd-id": "c\n1", "cmd": "x"}, "CMD_RUN"),
        ({"to": MAC, "cmd-id": "c\x13"}, "CMD_FORGET"),
        ({"to": MAC, "cmd-id": "x" * 9000}, "CMD_QUERY"),
        ({"to": MAC, "token": "t\r"}, "CMD_LIST"),
        ({"to": MAC, "timestamp": "1\n2"}, "PING"),
        ({"id": "52:54\n"}, "HELLO"),
        ({"cmd-id": "c"}, "CMD_RESULT " + "[" * 100_000),
        ({"cmd-id": "c"}, "AINT"),
        ({"cmd-id": "c"}, "X" * 100_000),
    ],
)
def test_bad_words(headers: dict[str, str], body: str) -> None:
    with pytest.raises(BadMessage):
        decode(headers, body)


@pytest.mark.parametrize(
    "text",
    [
        "os",
        "f'{1}'",
        "[" * 17 + "]" * 17,
        "-" * 60000,
        "1" + "+1" * 30000,
        "a" + ".a" * 30000,
        "'\\d",
        "\0",
        "1e",
        "0777",
    ],
)
def test_literals_are_read_and_nothing_is_evaluated(text: str) -> None:
    with pytest.raises(BadMessage):
        literal(text)


def test_long_literals_are_not_read() -> None:
    assert literal("'" + "x" * (LITERAL_LIMIT - 2) + "'")
    with pytest.raises(BadMessage):
        literal("'" + "x" * LITERAL_LIMIT + "'")


def test_a_pattern_reaches_many_guests() -> None:
    assert addressed_to("08:00:27:*", MAC)
    assert addressed_to(MAC.lower(), MAC)
    assert not addressed_to("08:00:28:*", MAC)
    assert not addressed_to("*" * 5000, MAC)


# memory

LARGE = BODY_LIMIT - 100


@pytest.mark.parametrize(
    ("what", "text", "is_read"),
    [
        ("output", json.dumps({"out": "x, [" * (LARGE // 4 - 10)}), True),
        ("output full of escapes", json.dumps({"out": "\n" * (LARGE // 2 - 10)}), True),
        ("a character outside the first plane", '{"out": "' + "x" * (LARGE - 50) + '\\ud83d\\ude00"}', False),
        ("a character outside the first plane as it is", '{"out": "' + "x" * (LARGE - 50) + '😀"}', False),
        ("small values", "{" + '"":[],' * (LARGE // 6 - 10) + '"x":1}', False),
        ("nothing but small values, below the limit", '{"x":[' + "[]," * 340_000 + "1]}", True),
        ("numbers", '{"x":[' + "12345.5," * (LARGE // 8 - 10) + "1]}", False),
    ],
    ids=lambda value: value.replace(" ", "-")[:40] if isinstance(value, str) and len(value) < 60 else "",
)
def test_no_message_costs_more_than_64_mb(what: str, text: str, is_read: bool) -> None:
    body = "CMD_RESULT " + text
    tracemalloc.start()
    try:
        try:
            message = decode({"cmd-id": "c"}, body)
        except BadMessage:
            assert not is_read, what
        else:
            assert isinstance(message, CommandResult)
            assert is_read is ("was too large" not in str(message.body.get("err"))), what
        cost = tracemalloc.get_traced_memory()[1] + sys.getsizeof(body)
    finally:
        tracemalloc.stop()
    assert cost < (64_000_000 if is_read else sys.getsizeof(body) + 1_000_000), (what, cost)


def test_a_result_that_is_too_large_still_tells_the_end() -> None:
    """An agent of protocol 1 says it once: nobody is to wait for ever."""
    body = "CMD_RESULT " + json.dumps({"out": "x" * BODY_LIMIT, "finished": True, "exitCodeOrSignal": 0})
    message = decode({"cmd-id": "c"}, body)
    assert isinstance(message, CommandResult)
    assert (message.id, message.body["finished"], message.body["exitCodeOrSignal"]) == ("c", False, -1)
    assert "too large: a body of 80000" in message.body["err"]
    with pytest.raises(BadMessage):  # nothing else of that size is a message
        decode(
            {"cmd-id": "c", "from": MAC},
            "CMD_STATE " + json.dumps({"state": "running", "x": "x" * BODY_LIMIT}),
        )


def test_what_only_we_can_say_is_not_from_2009() -> None:
    """Found by atheris: it could be read, and not be said again."""
    body = 'CMD_RUN {"cmd": "x", "fraction-done-file": "f"}'
    message = decode({"to": MAC, "cmd-id": "c"}, body)
    again = encode(message)
    assert decode(again.headers, again.body) == message
