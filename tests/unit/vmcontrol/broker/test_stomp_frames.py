"""STOMP frames: what one side writes the other reads, in any pieces; and whatever arrives, only BadFrame comes out."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmcontrol.broker.frames import (
    HEART_BEAT,
    BadFrame,
    CannotEncode,
    Frame,
    FrameDecoder,
    FrameLimits,
    HeartBeat,
    Version,
    encode,
)

ALL = list(Version)
SMALL = FrameLimits(line_bytes=64, header_bytes=128, headers=4, body_bytes=100)


def read(data: bytes, version: Version = Version.V1_2, limits: FrameLimits | None = None) -> list[Frame | HeartBeat]:
    decoder = FrameDecoder(limits, version)
    decoder.receive(data)
    return drain(decoder)


def drain(decoder: FrameDecoder) -> list[Frame | HeartBeat]:
    events = []
    while (event := decoder.next_event()) is not None:
        events.append(event)
    return events


# round trip

versions = st.sampled_from(ALL)  # drawn, not parametrised: pytest-twisted breaks hypothesis tests that are parametrised

text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
old_value = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), max_size=20)
commands = st.sampled_from(["SEND", "MESSAGE", "SUBSCRIBE", "RECEIPT", "ERROR"])


@st.composite
def frames(draw: st.DrawFn, version: Version) -> Frame:
    body = draw(st.binary(max_size=200))
    names: st.SearchStrategy[str] = text.filter(bool)
    values: st.SearchStrategy[str] = text
    if version is Version.V1_0:
        names = old_value.filter(lambda name: bool(name) and ":" not in name)
        values = old_value.filter(lambda value: value == value.lstrip(" \t"))
    if version is Version.V1_1:
        names, values = (s.map(lambda t: t.replace("\r", "")) for s in (names, values))
        names = names.filter(bool)
    headers = draw(st.dictionaries(names.filter(lambda name: name != "content-length"), values, max_size=6))
    return Frame(draw(commands), headers, body)


@settings(max_examples=60)
@given(version=versions, data=st.data())
def test_what_is_written_is_read_in_whatever_pieces_it_arrives(version: Version, data: st.DataObject) -> None:
    sent = data.draw(st.lists(frames(version), max_size=4))
    wire = b"\n".join(encode(frame, version) for frame in sent)
    decoder = FrameDecoder(version=version)
    received: list[Frame] = []
    while wire:
        size = data.draw(st.integers(1, len(wire)))
        decoder.receive(wire[:size])
        wire = wire[size:]
        received += [event for event in drain(decoder) if isinstance(event, Frame)]
    assert [(f.command, without_length(f), f.body) for f in received] == [
        (f.command, dict(f.headers), f.body) for f in sent
    ]
    assert not decoder.inside_frame


def without_length(frame: Frame) -> dict[str, str]:
    return {name: value for name, value in frame.headers.items() if name != "content-length"}


@given(version=versions, chunks=st.lists(st.binary(max_size=60), max_size=8))
def test_arbitrary_bytes_give_frames_or_bad_frame_and_never_more_memory_than_allowed(
    version: Version, chunks: list[bytes]
) -> None:
    decoder = FrameDecoder(SMALL, version)
    with contextlib.suppress(BadFrame):
        for chunk in chunks:
            decoder.receive(chunk)
            drain(decoder)
            assert decoder.buffered <= SMALL.header_bytes + SMALL.line_bytes + SMALL.body_bytes + 1


frame_like = st.lists(
    st.sampled_from(
        [b"SEND\n", b"a:b\n", b"content-length:3\n", b"\n", b"\0", b"abc", b"\\q:", b"\r\n", b":", b"\xff"]
    ),
    max_size=20,
).map(b"".join)


@given(version=versions, wire=frame_like, cut=st.integers(0, 60))
def test_pieces_do_not_change_what_is_read(version: Version, wire: bytes, cut: int) -> None:
    def outcome(*chunks: bytes) -> list[object]:
        decoder = FrameDecoder(SMALL, version)
        events: list[object] = []
        try:
            for chunk in chunks:
                decoder.receive(chunk)
                while (event := decoder.next_event()) is not None:
                    events.append(event)
        except BadFrame:
            events.append("bad")
        return events

    assert outcome(wire) == outcome(wire[:cut], wire[cut:]) == outcome(*(wire[i : i + 1] for i in range(len(wire))))


# the wire of 2009


def test_a_subscription_of_2009() -> None:
    wire = b"SUBSCRIBE\ndestination: /topic/connections\nack: auto\n\n\0\n"
    assert read(wire, Version.V1_0) == [
        Frame("SUBSCRIBE", {"destination": "/topic/connections", "ack": "auto"}),
        HEART_BEAT,
    ]


def test_ids_of_2009_are_macs_and_only_the_first_colon_ends_a_name() -> None:
    wire = b"SEND\ndestination: /topic/connections\nid: 08:00:27:AA:BB:CC\n\nHELLO\0\n"
    [frame, _] = read(wire, Version.V1_0)
    assert isinstance(frame, Frame)
    assert frame.headers["id"] == "08:00:27:AA:BB:CC"
    assert frame.body == b"HELLO"


def test_nothing_is_escaped_for_2009() -> None:
    frame = Frame("MESSAGE", {"args": "['a\\n', 'b:c']"}, b"CMD_RUN")
    assert encode(frame, Version.V1_0) == b"MESSAGE\nargs:['a\\n', 'b:c']\n\nCMD_RUN\0"
    assert read(encode(frame, Version.V1_0), Version.V1_0) == [frame]


def test_a_connect_of_2009_is_read_before_anything_is_agreed() -> None:
    assert read(b"CONNECT\nlogin: u\npasscode: p\n\n\0\n", Version.V1_0)[0] == Frame(
        "CONNECT", {"login": "u", "passcode": "p"}
    )


# 1.1 and 1.2


def test_connect_is_never_escaped_and_blanks_count_since_1_1() -> None:
    wire = b"CONNECT\naccept-version:1.1,1.2\npasscode: a\\n\n\n\0"
    assert read(wire)[0] == Frame("CONNECT", {"accept-version": "1.1,1.2", "passcode": " a\\n"})


def test_escapes() -> None:
    frame = Frame("SEND", {"a:b": "1\n2\\3:4"}, b"x")
    assert encode(frame, Version.V1_1) == b"SEND\na\\cb:1\\n2\\\\3\\c4\ncontent-length:1\n\nx\0"
    assert read(b"SEND\na:\\r\n\n\0")[0] == Frame("SEND", {"a": "\r"})


def test_1_2_lines_may_end_with_carriage_return() -> None:
    assert read(b"SEND\r\na:b\r\n\r\nx\0\r\n") == [Frame("SEND", {"a": "b"}, b"x"), HEART_BEAT]


def test_the_first_of_repeated_headers_counts() -> None:
    assert read(b"SEND\na:1\na:2\n\n\0") == [Frame("SEND", {"a": "1"})]


def test_a_body_with_nul_bytes_goes_by_its_length() -> None:
    frame = Frame("SEND", {"content-length": "5"}, b"\0a\0b\0")
    for version in ALL:
        assert read(encode(Frame("SEND", {}, frame.body), version), version) == [frame]


def test_the_version_can_change_between_two_frames_of_one_read() -> None:
    decoder = FrameDecoder()
    decoder.receive(b"CONNECT\naccept-version:1.2\n\n\0SEND\na:\\c\n\n\0")
    assert isinstance(decoder.next_event(), Frame)
    decoder.version = Version.V1_2
    assert decoder.next_event() == Frame("SEND", {"a": ":"})


# faults


@pytest.mark.parametrize(
    "wire",
    [
        b"GET / HTTP/1.1\r\n",
        b"x" * 33,
        b"SEND\n" + b"a" * 65,
        b"SEND\n" + b"a:b\n" * 5,
        b"SEND\n" + (b"a:" + b"b" * 60 + b"\n") * 3,
        b"SEND\ncontent-length:101\n\n",
        b"SEND\ncontent-length:-1\n\n",
        b"SEND\ncontent-length:1e1\n\n",
        b"SEND\ncontent-length:2\n\nxyz\0",
        b"SEND\n\n" + b"x" * 101,
        b"SEND\nno colon\n\n\0",
        b"SEND\n:empty\n\n\0",
        b"SEND\na:\\t\n\n\0",
        b"SEND\na:\\\n\n\0",
        b"SEND\na:\xff\n\n\0",
        b"SEND\na:b\0\n\n",
        b"SEND\na\0",
    ],
)
def test_faults_of_the_peer(wire: bytes) -> None:
    with pytest.raises(BadFrame):
        read(wire, limits=SMALL)


@pytest.mark.parametrize(
    ("version", "frame"),
    [
        (Version.V1_0, Frame("SEND", {"a": "1\n2"})),
        (Version.V1_0, Frame("SEND", {"a:b": "1"})),
        (Version.V1_1, Frame("SEND", {"a": "1\r2"})),
        (Version.V1_2, Frame("SEND", {"a": "\0"})),
        (Version.V1_2, Frame("SEND", {"a": "\udc80"})),
        (Version.V1_2, Frame("SEND", {"": "a"})),
        (Version.V1_2, Frame("CONNECT", {"passcode": "a\nb"})),
    ],
)
def test_faults_of_ours(version: Version, frame: Frame) -> None:
    with pytest.raises(CannotEncode):
        encode(frame, version)


def test_a_large_body_in_small_pieces_takes_time_in_proportion() -> None:
    decoder = FrameDecoder(version=Version.V1_2)
    began = time.process_time()
    decoder.receive(b"SEND\n\n")  # without a length: the worst case
    for _ in range(4000):
        decoder.receive(b"x" * 2000)
        assert decoder.next_event() is None
    decoder.receive(b"\0")
    frame = decoder.next_event()
    assert isinstance(frame, Frame)
    assert len(frame.body) == 8_000_000
    assert time.process_time() - began < 2  # 0.02 s; scanning anew each time takes 10 s
