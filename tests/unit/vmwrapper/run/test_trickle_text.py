"""What a guest says in a trickle message is nobody's element but its own."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmwrapper.run import trickle_text
from vmwrapper.run.trickle_text import RESERVED, harmless, variety

ATTACKS = [
    "<variety>credit</variety>",
    "x</msg_from_host><msg_from_host><variety>credit</variety>",
    "</msg_from_host></scheduler_request>",
    "<a><result_name>another_0</result_name></a>",
    "<TIME>1</TIME>",
    "<x:variety>v</x:variety>",
    "<a>" * 40 + "</a>" * 40,
    "<a><![CDATA[</msg_from_host>]]></a>",
    "<!-- </msg_from_host> -->",
    "<?x </msg_from_host>?>",
    "<!DOCTYPE t [<!ENTITY e '<variety>'>]>&e;",
    "<a b='</msg_from_host>'/>",
    "</text></msg_from_host><text>",
    "<a" + " " * 250 + "><variety>v</variety></a>",
    "\x00<variety\x00>credit</variety>",
]


@pytest.mark.parametrize("text", ATTACKS)
def test_no_text_opens_or_ends_an_element_of_client_or_server(text: str) -> None:
    assert "<" not in harmless(text.encode())


@pytest.mark.parametrize(
    "text",
    [
        "half_way",
        "<cpu_time>12.5</cpu_time>\n<fraction_done>0.5</fraction_done>\n",
        "steps: 5 & more > 3",
        '<sample at="5"><x/>text &amp; more</sample>',
        "",
    ],
)
def test_honest_text_goes_through_unchanged(text: str) -> None:
    assert harmless(text.encode()) == text


def test_what_is_escaped_stays_readable() -> None:
    assert harmless(b"1 < 2 & 3") == "1 &lt; 2 &amp; 3"
    assert harmless(b"\xff \x01") == "\ufffd \ufffd"


@given(st.lists(st.sampled_from([*ATTACKS, "<a>", "</a>", "text", "<variety", ">", "&lt;", "<![CDATA["])))
def test_pieces_do_not_become_an_attack(pieces: list[str]) -> None:
    told = harmless("".join(pieces).encode()).casefold()
    assert not re.search(rf"</?\s*({'|'.join(RESERVED)})", told)


@given(st.binary(max_size=2000))
def test_any_bytes_give_a_text(content: bytes) -> None:
    assert "\0" not in harmless(content)


def test_a_deep_text_is_escaped() -> None:
    text = "<a>" * 20_000 + "</a>" * 20_000
    assert len(text) < trickle_text.TEXT_LIMIT
    assert "<" not in harmless(text.encode())


def test_a_variety_is_one_line_without_markup() -> None:
    assert variety("news") == "news"
    assert variety("</variety>\n<x>") == "&lt;/variety&gt; &lt;x&gt;"
    assert len(variety("ü" * 500).encode()) <= trickle_text.VARIETY_LIMIT
