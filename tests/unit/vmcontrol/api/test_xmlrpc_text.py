"""What XML-RPC carries: text, large numbers, calls that are none; and the argument forms of 2009."""

from __future__ import annotations

import contextlib
import json
import time
import xmlrpc.client
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmcontrol.api.answer import document
from vmcontrol.api.arguments import BadArgument, argument_list, environment, seconds, text, working_folder
from vmcontrol.api.faults import to_fault
from vmcontrol.api.server import answer, parse_call
from vmcontrol.guests.repeater import Dropped, NoAnswer
from vmcontrol.guests.vms import GuestSilent
from vmcontrol.hypervisors.interface import HostProblem, VmExists
from vmcontrol.link.listing import Entry
from vmcontrol.protocol.text import BadMessage
from vmcontrol.protocol.xmltext import (
    SLICE,
    TEXT_LIMIT,
    LongText,
    OutputText,
    carried,
    cut_text,
    output_text,
    xml_text,
)
from vmcontrol.transfer.interface import FileMissing, FileUnusable, LocalFileMissing

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(value=values)
def test_every_value_arrives_as_what_carried_says(value: Any) -> None:
    (arrived,), _ = xmlrpc.client.loads(answer(value))
    assert arrived == carried(value)


def test_text_that_xml_cannot_carry_is_escaped() -> None:
    assert xml_text("bell \a, nul \0, surrogate \ud800, \ufffe") == "bell \\x07, nul \\x00, surrogate \\ud800, \\ufffe"
    plain = "tab\t newline\n return\r back\\slash ünï©ode 🐍 <&>]]>"
    assert xml_text(plain) == plain
    assert xmlrpc.client.loads(answer(plain))[0] == (plain,)


def test_output_is_utf8_with_the_rest_escaped_and_cut_with_a_mark() -> None:
    assert output_text(b"caf\xc3\xa9 \xff\x01") == "café \\xff\\x01"
    assert output_text(b"x" * TEXT_LIMIT) == "x" * TEXT_LIMIT
    cut = output_text(b"x" * (TEXT_LIMIT + 1))
    assert cut == "x" * TEXT_LIMIT + f"\n[cut at {TEXT_LIMIT} bytes; {TEXT_LIMIT + 1} in all]\n"
    assert "2147483648 in all" in output_text(b"x" * TEXT_LIMIT, 2**31)
    escaped = output_text(bytes(TEXT_LIMIT))
    assert escaped.startswith("\\x00" * 100)
    assert len(escaped) < TEXT_LIMIT + 100, "what is kept is bounded with its escapes"
    assert escaped.endswith(f"[cut at {TEXT_LIMIT} bytes; {TEXT_LIMIT} in all]\n")
    assert cut_text("y" * (TEXT_LIMIT + 5)).endswith(f"{TEXT_LIMIT + 5} in all]\n")


def test_integers_beyond_32_bits_are_doubles() -> None:
    assert xmlrpc.client.loads(answer({"size": 2**31, "small": 2**31 - 1}))[0] == (
        {"size": 2.0**31, "small": 2**31 - 1},
    )
    assert carried(10**400) == "a number that is too large"


def test_deep_values_are_cut() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    assert b"..." in answer(deep)


@given(body=st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_what_is_no_call_is_a_fault(body: bytes) -> None:
    try:
        name, arguments = parse_call(body)
    except xmlrpc.client.Fault as fault:
        assert fault.faultCode == -1  # noqa: PT017
    else:
        assert isinstance(name, str)
        assert isinstance(arguments, tuple)


@pytest.mark.parametrize(
    "body",
    [
        b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x "y">]><methodCall><methodName>&x;</methodName></methodCall>',
        '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a><methodCall/>'.encode("utf-16"),
        b"<a>" * 100_000,
        b"<methodCall><methodName>x</methodName><params><param><value><int>"
        + b"9" * 5000
        + b"</int></value></param></params></methodCall>",
        b"<methodResponse><params/></methodResponse>",
        b"",
    ],
)
def test_hostile_calls_are_faults(body: bytes) -> None:
    with pytest.raises(xmlrpc.client.Fault):
        parse_call(body)


def test_the_argument_forms_of_2009() -> None:
    assert argument_list(["1 "]) == ("1 ",), "one string with a trailing blank goes over as it is"
    assert argument_list(()) == argument_list([]) == argument_list("") == argument_list(None) == ()
    assert argument_list("['a b', 'c']") == ("a b", "c")
    assert argument_list("('a',)") == ("a",)
    assert argument_list("-x 1") == ("-x 1",)
    assert argument_list([1, 2.5]) == ("1", "2.5")
    assert environment("{}") == environment({}) == environment(None) == environment("") == {}
    assert environment("{'A': 'b'}") == environment({"A": "b"}) == {"A": "b"}
    assert working_folder("None") is working_folder(None) is working_folder("") is None
    assert working_folder("'/usr'") == working_folder("/usr") == "/usr"


@pytest.mark.parametrize("bad", [{"a": 1}, 5, [["nested"]], ["nul\0"], "[1"])
def test_arguments_that_are_none(bad: object) -> None:
    with pytest.raises((BadArgument, BadMessage)):
        argument_list(bad)


@given(value=st.text(max_size=300) | st.text(alphabet="[](){}'\",:\\ abNone1_", max_size=60))
def test_nothing_is_evaluated(value: str) -> None:
    for reader in (argument_list, environment, working_folder):
        with contextlib.suppress(BadArgument, BadMessage):
            reader(value)


def test_expressions_are_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    for reader, form in ((argument_list, "[{}]"), (environment, "{{'a': {}}}"), (working_folder, "'' + {}")):
        with pytest.raises((BadArgument, BadMessage)):
            reader(form.format(f"__import__('os').mknod({str(witness)!r})"))
    assert not witness.exists()


def test_limits_of_times_and_texts() -> None:
    assert seconds(5, "t") == 5.0
    for bad in (-1, float("nan"), float("inf"), True, "5", None, 1e9):
        with pytest.raises(BadArgument, match="t: expected seconds"):
            seconds(bad, "t")
    for no_text in ("a\0b", 5, None, "x" * 5000):
        with pytest.raises(BadArgument):
            text(no_text, "t")


def test_the_faults() -> None:
    trouble = to_fault(HostProblem("no room", key="disk-full", delay_s=None))
    assert (trouble.faultCode, json.loads(trouble.faultString)) == (
        1,
        {"key": "disk-full", "reason": "no room", "delay_s": None},
    )
    missing = to_fault(FileMissing("out", "/home/vm", [Entry("in", 5, False), Entry("d", 0, True)]))
    assert (missing.faultCode, json.loads(missing.faultString)) == (2, {"path": "out", "listing": ["in", "d/"]})
    unusable = to_fault(FileUnusable("out", "is no regular file"))
    assert unusable.faultCode == 2
    assert json.loads(unusable.faultString) == {"path": "out", "listing": [], "reason": "is no regular file"}
    assert to_fault(LocalFileMissing(Path("/x"), "is not there")).faultCode == 2
    for silent in (GuestSilent("s"), NoAnswer("s"), Dropped("s")):
        assert (to_fault(silent).faultCode, to_fault(silent).faultString) == (3, "s")
    assert (to_fault(VmExists("n is there")).faultCode, to_fault(RuntimeError("x")).faultString) == (-1, "x")


@given(
    pieces=st.lists(
        st.sampled_from(
            [b"plain ", b"\0\1\2", b"caf\xc3\xa9", b"\xff\xfe", b"\xed\xa0\x80", "😀\ufffe".encode(), b"\r\n"]
        ),
        max_size=30,
    ),
    times=st.integers(1, 3000),
)
def test_slices_make_the_same_text_as_one_piece(pieces: list[bytes], times: int) -> None:
    content = (b"".join(pieces) * times)[:100_000]
    whole = xml_text(content.decode("utf-8", "backslashreplace"))
    assert output_text(content) == whole
    kept = LongText(whole.encode())
    assert str(kept) == "".join(kept.slices()) == whole == kept
    assert kept == LongText(whole.encode()) != LongText(b"other")
    assert kept != 5
    assert xmlrpc.client.loads(answer({"out": kept}))[0] == ({"out": whole},)


HARD = {
    "zeros": bytes(TEXT_LIMIT),
    "no UTF-8": b"\xff" * TEXT_LIMIT,
    "every other": b"\7a" * (TEXT_LIMIT // 2),
    "surrogates": b"\xed\xa0\x80" * (TEXT_LIMIT // 3),
    "markup": b"<&>" * (TEXT_LIMIT // 3),
    "wide": "😀\7".encode() * (TEXT_LIMIT // 5),
}


@pytest.mark.parametrize("kind", HARD)
def test_no_step_of_a_long_output_keeps_others_waiting(kind: str) -> None:
    """A step is what is done between two turns of the reactor. Bounds with margin for a loaded computer."""
    steps: list[float] = []
    text = OutputText()
    for start in range(0, TEXT_LIMIT, SLICE):
        if not text.is_full:
            began = time.process_time()
            text.feed(HARD[kind][start : start + SLICE])
            steps.append(time.process_time() - began)
    pieces = document({"out": LongText(text.end(TEXT_LIMIT))})
    while True:
        began = time.process_time()
        piece = next(pieces, None)
        steps.append(time.process_time() - began)
        if piece is None:
            break
    assert max(steps) < 0.2
    assert len(text.content) < TEXT_LIMIT + 100
