"""Values as BOINC's C++ reads them from text: strtol, strtod, atoi, atof, and the entities of its own XML. Pure.

Source: lib/parse.cpp and lib/parse.h (XML_PARSER) of BOINC, and the C standard for what it calls. A text counts there
as a whole or not at all; the `leading` forms read as much of the beginning as makes sense, as command lines are read.
"""

from __future__ import annotations

import math
import re

BLANKS = b" \t\n\v\f\r"
"""C's isspace."""

_INTEGER = re.compile(rb"[ \t\n\v\f\r]*[+-]?(?:0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")
_DECIMAL_INTEGER = re.compile(rb"[ \t\n\v\f\r]*([+-]?[0-9]+)")
_DOUBLE = re.compile(
    rb"""[ \t\n\v\f\r]*(?P<sign>[+-]?)(?:
        (?P<inf>inf(?:inity)?)
        | (?P<nan>nan(?:\([0-9a-z_]*\))?)
        | (?P<hex>0x(?:[0-9a-f]+\.?[0-9a-f]*|\.[0-9a-f]+)(?:p[+-]?[0-9]+)?)
        | (?P<decimal>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)
    )""",
    re.VERBOSE | re.IGNORECASE,
)
_ENTITY = re.compile(rb"&(?:(lt|gt|quot|apos|amp|#x[dD]|#x[aA])|#([0-9]+));")
_NAMED = {
    b"lt": b"<", b"gt": b">", b"quot": b'"', b"apos": b"'", b"amp": b"&",
    b"#xd": b"\r", b"#xD": b"\r", b"#xa": b"\n", b"#xA": b"\n",
}  # fmt: skip
_LONG = (-(1 << 63), (1 << 63) - 1)
_SMALLEST_NORMAL = 2.2250738585072014e-308
_DIGITS_LIMIT = 400
"""Python refuses to make integers of thousands of digits; a long has 20."""


def integer(text: bytes) -> int | None:
    """XML_PARSER::parse_int: base 10, 8 (`010`) or 16 (`0x10`); None for anything else, and beyond 64 bits."""
    value = _long(text)
    return None if value is None or not _LONG[0] <= value <= _LONG[1] else _as_int(value)


def boolean(text: bytes) -> bool | None:
    """XML_PARSER::parse_bool of a text: an integer, true when it is not 0; None for anything else."""
    value = _long(text)
    return None if value is None else value != 0


def double(text: bytes) -> float | None:
    """XML_PARSER::parse_double: as strtod, so `0x2`, `inf` and `nan` too; None for anything else and out of range."""
    found = _DOUBLE.fullmatch(text)
    value = None if found is None else _double(found)
    return None if value is None or (math.isinf(value) and not (found and found["inf"])) else value


def leading_integer(text: str) -> int:
    """atoi: 0 when the text does not begin with a number."""
    found = _DECIMAL_INTEGER.match(text.encode("utf-8", "replace"))
    if found is None:
        return 0
    value = int(found[1][:_DIGITS_LIMIT])
    return _as_int(min(max(value, _LONG[0]), _LONG[1]))


def leading_double(text: str) -> float:
    """atof: 0 when the text does not begin with a number."""
    found = _DOUBLE.match(text.encode("utf-8", "replace"))
    if found is None:
        return 0.0
    value = _double(found)
    return 0.0 if value is None else value


def unescape(text: bytes) -> bytes:
    """xml_unescape: five names, `&#N;` of one byte, line breaks as `&#xA;`. Everything else stays as it is."""
    return _ENTITY.sub(_byte, text).partition(b"\0")[0] if b"&" in text else text


def _byte(found: re.Match[bytes]) -> bytes:
    if found[1] is not None:
        return _NAMED[found[1]]
    digits = found[2].lstrip(b"0")
    return bytes([int(digits or b"0")]) if len(digits) <= 3 and int(digits or b"0") < 256 else found[0]


def _long(text: bytes) -> int | None:
    if not _INTEGER.fullmatch(text):
        return None
    digits = text.lstrip(BLANKS)
    sign = -1 if digits.startswith(b"-") else 1
    digits = digits.lstrip(b"+-").lower()
    base = 16 if digits.startswith(b"0x") else 8 if digits.startswith(b"0") else 10
    return sign * int(digits[:_DIGITS_LIMIT], base)


def _double(found: re.Match[bytes]) -> float | None:
    """Infinite when it is too large; None when it is so small that it loses digits (ERANGE)."""
    if found["inf"]:
        value = math.inf
    elif found["nan"]:
        value = math.nan
    else:
        text = (found["hex"] or found["decimal"]).decode("ascii")
        try:
            value = float.fromhex(text) if found["hex"] else float(text)
        except OverflowError:
            value = math.inf
        mantissa = re.split("[pP]" if found["hex"] else "[eE]", text.removeprefix("0x").removeprefix("0X"))[0]
        if value < _SMALLEST_NORMAL and mantissa.strip("0."):
            return None
    return -value if found["sign"] == b"-" else value


def _as_int(value: int) -> int:
    """What is left of a long in an int of 32 bits."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)
