"""Numbers and entities: what C's functions make of the same text."""

from __future__ import annotations

import ctypes
import math
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmwrapper import cvalues

NUMBERS = [
    "0", "1", "-1", "+7", "010", "08", "0x2", "0X1f", "0x", "1,5", "1.5", "1.0f", ".5", "5.", ".", "1e3", "1e", "1e+",
    "inf", "-Infinity", "infinit", "nan", "nan(1)", "nan(", "0x1p3", "0x.8", "0x1.8p-1", "3600s", "true", "yes", "1_0",
    "1e400", "-1e400", "1e-400", "0e-400", "4.9e-324", "2147483648", "-2147483649", "9223372036854775808",
    "99999999999999999999", "--1", "+-1", "- 1", "1 ", "\u0661", "", " 1", "\t-2", "0b1", "1e308", "0x1p1024",
    "0x1p-1080",
]  # fmt: skip
needs_glibc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="compared with glibc")


def c_strtod(text: bytes) -> tuple[float, int, int]:
    """Value, characters read, errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.strtod.restype = ctypes.c_double
    buffer = ctypes.create_string_buffer(text)
    end = ctypes.c_char_p()
    ctypes.set_errno(0)
    value = libc.strtod(buffer, ctypes.byref(end))
    return value, len(text) - len(end.value or b""), ctypes.get_errno()


def c_strtol(text: bytes, base: int) -> tuple[int, int, int]:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.strtol.restype = ctypes.c_long
    buffer = ctypes.create_string_buffer(text)
    end = ctypes.c_char_p()
    ctypes.set_errno(0)
    value = libc.strtol(buffer, ctypes.byref(end), base)
    return value, len(text) - len(end.value or b""), ctypes.get_errno()


def check_like_c(text: str) -> None:
    raw = os.fsencode(text)
    value, read, errno = c_strtod(raw)
    got = cvalues.double(raw)
    if errno or read != len(raw) or not raw:
        assert got is None
    else:
        assert got is not None
        assert got == value or (math.isnan(got) and math.isnan(value))
    whole, read, errno = c_strtol(raw, 0)
    good = read == len(raw) and bool(raw)
    assert cvalues.integer(raw) == (ctypes.c_int(whole).value if good and not errno else None)
    assert cvalues.boolean(raw) == ((whole != 0) if good else None)
    assert cvalues.leading_integer(text) == ctypes.c_int(c_strtol(raw, 10)[0]).value


@needs_glibc
@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_are_those_of_c(text: str) -> None:
    check_like_c(text)


@needs_glibc
@given(st.text(alphabet="0123456789+-.eExXpPinfatyINFA()abcdef ,_\n", max_size=12))
def test_any_text_is_a_number_when_it_is_one_in_c(text: str) -> None:
    check_like_c(text)


@pytest.mark.parametrize(
    ("text", "value"), [("60s", 60.0), ("abc", 0.0), ("", 0.0), (" 1e2x", 100.0), ("-.5", -0.5), ("0x10g", 16.0)]
)
def test_the_beginning_of_a_text_as_a_number(text: str, value: float) -> None:
    assert cvalues.leading_double(text) == value


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        (b"a &amp; b &lt;c&gt; &quot;&apos;", b"a & b <c> \"'"),
        (b"&amp;lt; &nbsp; & &lt &#; &#x41; &#xe9;", b"&lt; &nbsp; & &lt &#; &#x41; &#xe9;"),
        (b"&#65;&#065;&#233;&#256;&#99999999999;", b"AA\xe9&#256;&#99999999999;"),
        (b"a&#xD;&#xa;b&#10;", b"a\r\nb\n"),
        (b"a&#0;b", b"a"),
        (b"\xc3\xa9\xff", b"\xc3\xa9\xff"),
    ],
)
def test_entities_are_boincs(text: bytes, bytes_: bytes) -> None:
    assert cvalues.unescape(text) == bytes_


@given(st.binary())
def test_text_without_entities_stays(text: bytes) -> None:
    plain = text.replace(b"&", b"")
    assert cvalues.unescape(plain) == plain
    assert cvalues.unescape(plain.replace(b"<", b"&lt;")) == (
        plain if b"\0" not in plain or b"<" not in plain else plain.partition(b"\0")[0]
    )
