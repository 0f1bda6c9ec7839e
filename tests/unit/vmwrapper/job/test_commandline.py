"""vmwrapper.job.commandline: words as BOINC's wrapper makes them, and `./` words resolved."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmwrapper.boinc.library import LibraryMissing, load_libraries
from vmwrapper.job.commandline import BLANKS, resolve, split


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", []),
        (" \t\n ", []),
        ("5", ["5"]),
        ("  -xf   ./a.tar ", ["-xf", "./a.tar"]),
        ("'a b' \"c d\" e", ["a b", "c d", "e"]),
        ("--name='a b'", ["--name='a", "b'"]),
        ("'a'b", ["a", "b"]),
        ('say "it\'s"', ["say", "it's"]),
        ("'never closed x", ["never closed x"]),
        ("$HOME * ; a\\ b", ["$HOME", "*", ";", "a\\", "b"]),
        ("a\u00a0b \u2003", ["a\u00a0b", "\u2003"]),
        ("'' x", ["' x"]),
        ("end '", ["end", ""]),
    ],
)
def test_words_are_those_of_boincs_wrapper(line: str, words: list[str]) -> None:
    assert split(line) == words


words_without_quotes = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=BLANKS + "'\""), min_size=1)


@given(st.lists(words_without_quotes))
def test_plain_words_survive(words: list[str]) -> None:
    assert split(" ".join(words)) == words


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters='"'), min_size=1)))
def test_quoted_words_keep_their_blanks(words: list[str]) -> None:
    assert split(" ".join(f'"{word}"' for word in words)) == words


def boincs_own(line: bytes) -> list[bytes]:
    function = load_libraries()[0]["_Z18parse_command_linePcPS_"]
    text = ctypes.create_string_buffer(line + b"\0\0")
    words = (ctypes.c_char_p * 300)()
    count = function(text, words)
    return [words[position] or b"" for position in range(count)]


def have_libboinc() -> bool:
    try:
        load_libraries()[0]["_Z18parse_command_linePcPS_"]
    except (LibraryMissing, AttributeError):
        return False
    return True


@pytest.mark.skipif(not have_libboinc(), reason="libboinc.so.7 (package libboinc7) is not installed")
@given(st.text(alphabet="ab '\" \t\n./é-", max_size=60))
def test_same_as_libboinc(line: str) -> None:
    if line.endswith(("'", '"')) and split(line)[-1] == "":
        return  # BOINC reads past the end of its buffer here
    assert [word.encode() for word in split(line)] == boincs_own(line.encode())


def test_only_words_with_the_prefix_are_resolved() -> None:
    links = {"./in": Path("../../projects/a project/in_1"), "in": Path("wrong")}
    words = ["./in", "in", "--in=./in", "./not-a-link", "/./in"]
    assert resolve(words, lambda word: links.get(word, Path(word))) == [
        "../../projects/a project/in_1",
        "in",
        "--in=./in",
        "./not-a-link",
        "/./in",
    ]


@given(st.lists(st.text()))
def test_words_that_resolve_to_nothing_stay_as_written(words: list[str]) -> None:
    assert resolve(words, lambda word: word) == words
