"""Output as text, fractions, identity, journal, clock: the small pure parts of the agent."""

from __future__ import annotations

import contextlib
import json
import os
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from guest.agent import clock, identity
from guest.agent.identity import Card, Identity
from guest.agent.secretstore import SecretStore
from guest.agent.smbios import HostSettings
from guest.commands import journal, outputtext, progress, runner, supervisor, table
from guest.commands.table import Remembered
from vmcontrol.common import eventloop
from vmcontrol.protocol.text import HEADER_LIMIT

# --- output as text ---------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_any_output_survives_xml(raw: bytes) -> None:
    text = outputtext.as_text(raw)
    back = ET.fromstring(f"<x>{escape(text)}</x>").text or ""
    assert back == text.replace("\r\n", "\n").replace("\r", "\n")


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff")))
def test_proper_text_is_not_changed(text: str) -> None:
    assert outputtext.as_text(text.encode()) == text


def test_what_xml_cannot_carry_is_escaped() -> None:
    assert outputtext.as_text(b"a\0b\x1b[0m\xff\xc3\xa9\xef\xbf\xbe\t\n") == "a\\x00b\\x1b[0m\\xff\u00e9\\ufffe\t\n"


def test_long_output_is_cut_with_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes("é".encode() * 10)
    assert outputtext.inline(str(path), 7) == "ééé\n[cut: 6 of 20 bytes]\n"
    assert outputtext.inline(str(path), 20) == "é" * 10
    assert outputtext.inline(str(tmp_path / "nothing")) == ""


def test_the_tail_begins_with_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "err"
    path.write_text("first line\nsecond\nthird\n")
    assert outputtext.tail(str(path), 16) == "second\nthird\n"
    assert outputtext.tail(str(path)) == "first line\nsecond\nthird\n"


@given(st.text(max_size=20), st.integers(0, 80))
def test_a_cut_never_splits_a_character(text: str, length: int) -> None:
    raw = text.encode("utf-8", "surrogatepass") if text.isprintable() else text.encode("utf-8", "replace")
    cut = outputtext.whole_characters(raw[:length])
    assert raw.startswith(cut)
    assert len(raw[:length]) - len(cut) < 4
    cut.decode()


# --- fraction done ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fraction"),
    [
        (b"0.25", 0.25),
        (b"0.25\n0.5\n", 0.5),
        (b"step 3: 0.75 done", 0.75),
        (b"progress=1e-1", 0.1),
        (b"1.5", 1.0),
        (b"-3", 0.0),
        (b"0.5 nan inf", 0.5),
        (b"", None),
        (b"nothing yet", None),
        (b"1_0", None),
    ],
)
def test_the_last_number_is_the_fraction_done(text: bytes, fraction: float | None) -> None:
    assert progress.last_fraction(text) == fraction


@given(st.binary(max_size=100))
def test_any_progress_file_gives_a_fraction_or_none(text: bytes) -> None:
    fraction = progress.last_fraction(text)
    assert fraction is None or 0 <= fraction <= 1


def test_a_progress_file_that_grows_or_is_none(tmp_path: Path) -> None:
    path = tmp_path / "fraction"
    assert progress.read_fraction(str(path)) is None
    path.write_text("0.1\n" * 5000 + "0.9\n")
    assert progress.read_fraction(str(path)) == 0.9
    os.mkfifo(tmp_path / "fifo")
    assert progress.read_fraction(str(tmp_path / "fifo")) is None
    assert progress.read_fraction(str(tmp_path)) is None


# --- memory that runs out ---------------------------------------------------------------------------------------------


def test_oom_kills_of_vmstat(tmp_path: Path) -> None:
    path = tmp_path / "vmstat"
    path.write_text("nr_free_pages 1\noom_kill 7\nlast 1\n")
    assert supervisor.oom_kills(str(path)) == 7
    path.write_text("nr_free_pages 1\n")
    assert supervisor.oom_kills(str(path)) == 0
    assert supervisor.oom_kills(str(tmp_path / "nowhere")) == 0


# --- identity ---------------------------------------------------------------------------------------------------------

LO = Card("lo", "00:00:00:00:00:00", ("127.0.0.1",))
ETH0 = Card("eth0", "52:54:00:AA:BB:CC", ("10.0.2.15",))
ETH1 = Card("eth1", "08:00:27:11:22:33", ())


def choose(cards: list[Card], named: str = "", configured: str = "") -> Card | str:
    return identity.choose(cards, named_by_host=named, configured=configured)


def test_the_only_card_that_is_not_the_loopback() -> None:
    assert choose([LO, ETH0]) == ETH0


def test_the_host_names_the_card_before_the_configuration() -> None:
    assert choose([LO, ETH0, ETH1], "08-00-27-11-22-33", "eth0") == ETH1
    assert choose([LO, ETH0, ETH1], configured="eth0") == ETH0


@pytest.mark.parametrize(
    ("cards", "named", "said"),
    [([LO], "", "loopback"), ([LO, ETH0, ETH1], "", "eth0, eth1"), ([LO, ETH0], "eth7", "there: lo, eth0")],
)
def test_why_there_is_no_card(cards: list[Card], named: str, said: str) -> None:
    why = choose(cards, named)
    assert isinstance(why, str)
    assert said in why


def test_it_waits_for_the_card_and_its_address_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    time_source: Any = Clock()
    cards = [LO]
    waiting = eventloop.start(
        identity.wait_for(time_source, named_by_host="", configured="eth1", ip_needed=True, source=lambda: cards)
    )
    time_source.pump([0.5] * 20)
    assert not waiting.called
    assert len(caplog.records) == 1
    cards.append(ETH1)
    time_source.pump([0.5] * 20)
    assert not waiting.called
    assert len(caplog.records) == 2
    cards[-1] = Card("eth1", ETH1.mac, ("192.168.56.101",))
    time_source.pump([0.5] * 5)
    assert waiting.result == Identity(ETH1.mac, "192.168.56.101", "eth1")


def test_the_cards_of_this_system_have_a_loopback() -> None:
    assert any(card.loopback and "127.0.0.1" in card.ips for card in identity.cards())


# --- journal, secret, clock -------------------------------------------------------------------------------------------


def test_the_journal_remembers(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.json"
    first = journal.Journal(path)
    first.remember(Remembered("a", 1, None, False))
    first.remember(Remembered("b", 2, None))
    first.remember(Remembered("b", 2, {"exit_status": 0}))
    first.remember(Remembered("c", 1, None))
    first.erase("c")
    second = journal.Journal(path)
    assert second.load() == [Remembered("a", 1, None, False), Remembered("b", 2, {"exit_status": 0})]
    second.erase("a")
    assert journal.Journal(path).load() == [Remembered("b", 2, {"exit_status": 0})]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_full_journal_of_the_largest_results_is_read_again(tmp_path: Path) -> None:
    id = "\U0001f600" * (HEADER_LIMIT // 4 - 2)
    result = {
        "cmd-id": id,
        "stdout_path": "../" * 500 + ".vmwrapper/x.out",
        "stderr_tail": outputtext.as_text(b"\0" * outputtext.TAIL_BYTES),
        "error": "agent-fault: " + runner._short("\U0001f600" * 10_000),
        "resources": {f"ru_{n}": 1 / 3 for n in range(16)},
    }
    one = journal.Journal(tmp_path / "one.json")
    one.remember(Remembered(id, 2**31 - 1, result))
    text = (tmp_path / "one.json").read_text()
    assert len(text) > 16 * 1024 * 1024 // table.KNOWN_LIMIT
    assert len(text) < journal.ENTRY_LIMIT
    entries = (text[1:-1].replace('"', f'"{number}', 1) for number in range(table.KNOWN_LIMIT))
    (tmp_path / "full.json").write_text(f"{{{','.join(entries)}}}")
    remembered = journal.Journal(tmp_path / "full.json").load()
    assert len(remembered) == table.KNOWN_LIMIT
    assert remembered[-1].body == result


def test_a_damaged_journal_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "journal.json"
    path.write_text('{"a": {"att')
    assert journal.Journal(path).load() == []
    assert (tmp_path / "journal.json.damaged").exists()
    assert not path.exists()


def test_a_damaged_journal_that_cannot_be_put_aside_is_no_error_either(tmp_path: Path) -> None:
    path = tmp_path / "journal.json"
    path.write_text("damaged")
    (tmp_path / "journal.json.damaged").mkdir()
    known = journal.Journal(path)
    assert known.load() == []
    known.remember(Remembered("a", 1, None))
    assert journal.Journal(path).load() == [Remembered("a", 1, None)]


def test_a_journal_that_is_no_file_is_no_error(tmp_path: Path) -> None:
    assert journal.Journal(tmp_path).load() == []


@pytest.mark.parametrize("id", ["new\nline", " blank", "x" * (HEADER_LIMIT + 1), "\ud800"])
def test_an_id_that_no_message_can_carry_makes_a_journal_damaged(id: str) -> None:
    entry = {"attempt": 1, "result": None}
    assert journal.parse(json.dumps({"good": entry}).encode()) == [Remembered("good", 1, None)]
    with pytest.raises(ValueError, match=r"id of a command|surrogates"):
        journal.parse(json.dumps({"good": entry, id: entry}).encode())


@given(st.one_of(st.binary(max_size=60), st.recursive(st.none() | st.integers(), st.lists).map(repr).map(str.encode)))
def test_any_journal_is_read_or_a_value_error(raw: bytes) -> None:
    with contextlib.suppress(ValueError):
        journal.parse(raw)


def test_a_replaced_token_stays_replaced_but_not_for_another_token(tmp_path: Path) -> None:
    path = tmp_path / "secret.json"
    once = HostSettings("cafe", once=True)
    store = SecretStore(path, once)
    assert store.current == b"cafe"
    store.replace(b"lasting")
    assert store.current == b"lasting"
    assert SecretStore(path, once).current == b"lasting"
    assert SecretStore(path, HostSettings("beef", once=True)).current == b"beef"
    assert SecretStore(path, HostSettings("cafe")).current == b"cafe"
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_clock_helper_gets_one_line(tmp_path: Path) -> None:
    fifo = tmp_path / "clock"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        wanted = time.time() + 3600
        assert clock.set_clock(wanted, fifo) == pytest.approx(3600, abs=5)
        assert os.read(reader, 100) == f"SET {wanted:.6f}\n".encode()
        clock.set_clock(time.time(), fifo)
        assert os.read(reader, 100) == b""
    finally:
        os.close(reader)


@pytest.mark.parametrize("nonsense", [0.0, -1.0, 1e12, float("nan"), float("inf")])
def test_nonsense_is_no_time(nonsense: float, tmp_path: Path) -> None:
    with pytest.raises(clock.ClockError):
        clock.set_clock(nonsense, tmp_path / "clock")


def test_a_helper_that_is_no_fifo_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clock").write_text("")
    with pytest.raises(clock.ClockError, match="no FIFO"):
        clock.set_clock(time.time() + 60, tmp_path / "clock")
    assert (tmp_path / "clock").read_text() == ""


def test_a_helper_that_does_nothing_is_noticed(tmp_path: Path) -> None:
    fifo = tmp_path / "clock"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    time_source: Any = Clock()
    try:
        right = eventloop.start(clock.set_and_see(time_source, time.time(), fifo))
        assert right.called, "a clock that is right needs no helper"
        wrong = eventloop.start(clock.set_and_see(time_source, time.time() + 3600, fifo))
        assert not wrong.called
        time_source.pump([0.1] * 60)
        failures: list[Any] = []
        wrong.addErrback(failures.append)
        assert failures[0].check(clock.ClockError)
    finally:
        os.close(reader)
