"""Text of a message that anybody may have written: read in bounds, or not at all. For vmcontrol.protocol.messages.

Python literals of protocol 1 are read as literals, never evaluated. What large JSON would take as Python objects is
found before they are made, so that no message costs more than 64 MB, its text included.
"""

from __future__ import annotations

import ast
import json
import math
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

LITERAL_LIMIT = 64 * 1024
"""Characters of a Python literal that is read. Its syntax tree takes up to 500 bytes a character while it is read."""
LITERAL_DEPTH = 16
HEADER_LIMIT = 8 * 1024
"""Bytes of cmd, args, env and path, each, that still go as a header: ActiveMQ refuses headers of more than 10 KiB."""
BODY_LIMIT = 8_000_000
"""Characters of a body: while it is received and read up to six copies are in memory, with the broker in the process.

Who has more to say (output of a command) cuts it, or leaves it in a file."""

JSON_DEPTH = 32
"""Lists and objects within each other; ours have four."""
# So that no message costs more than 64 MB, its text included (measured: up to 28 bytes a character for small values):
SMALL_BODY = 1024 * 1024
"""Characters of a message's JSON that may hold any number of values."""
JSON_VALUES = 50_000
"""Values and keys that larger JSON may hold: each costs at most 100 bytes."""
_LARGE_WIDTH = 16 * 1024 * 1024
"""Bytes that its text may take as one Python string; one character beyond U+FFFF makes all take four bytes."""


WIDE_BODY_BYTES = 4 * 1024 * 1024
"""A longer body with characters outside Unicode's first plane is not taken: each character would cost four bytes."""
_NOT_WIDE = bytes(range(0xF0))


class BadMessage(Exception):  # noqa: N818 (named for what arrived)
    """What arrived is no message of ours."""


class TooLarge(BadMessage):
    """What arrived would cost too much memory."""


def text_of(body: bytes) -> str | None:
    """The text of a message's body; None: it would cost too much memory."""
    if len(body) > WIDE_BODY_BYTES and not body.isascii() and body.translate(None, _NOT_WIDE):
        return None
    return body.decode(errors="replace")


def literal(text: str) -> Any:
    """Read a Python literal of protocol 1 without evaluating anything. Raises BadMessage."""
    if len(text) > LITERAL_LIMIT:
        raise BadMessage(f"a literal of {len(text)} characters; {LITERAL_LIMIT} are read")
    depth = deepest = 0
    for character in text:  # brackets inside strings count too: that only makes the bound stricter
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    if deepest > LITERAL_DEPTH:
        raise BadMessage(f"a literal nested {deepest} deep; {LITERAL_DEPTH} are read")
    try:
        with warnings.catch_warnings():  # the parser has opinions about the text, which is not ours
            warnings.simplefilter("ignore")
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise BadMessage(f"not a Python literal: {text[:80]!r}") from error


_UNFIT = re.compile(r"[\0-\x1f\x7f\ud800-\udfff]|^\s|\s$")
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[{,\]}]', re.DOTALL)
"""A string (one without an end reaches to the end: looked for anew from each quote it would take quadratic time), or
what begins, ends or divides lists and objects."""
_ESCAPED_WIDE = re.compile(r"\\u[dD][89abAB]")


@dataclass(frozen=True, slots=True)
class Rest:
    """What stands after the first word; not cut out, as it may be 8 MB."""

    body: str
    start: int
    small: int = SMALL_BODY
    """Characters of JSON that may hold any number of values."""

    def __bool__(self) -> bool:
        return self.start < len(self.body) and not self.body.isspace()

    def json(self) -> Any:
        """Raises BadMessage, ValueError or RecursionError."""
        check_cost(self.body, self.start, self.small)
        value, end = _JSON.raw_decode(self.body, self.start)
        if self.body[end:].strip():
            raise BadMessage(f"something stands after the JSON: {self.body[end : end + 40]!r}")
        return value

    def object(self) -> dict[str, Any]:
        value = self.json()
        if not isinstance(value, dict):
            raise BadMessage("the body is no JSON object")
        return value


def bounded_json(content: bytes, values: int = JSON_VALUES) -> Any:
    """JSON that anybody may have written, in UTF-8. Raises BadMessage, ValueError. The caller bounds its bytes."""
    text = content.decode("utf-8")
    if sum(map(text.count, "[{,")) > values:  # those in strings too: soon told, where there are few
        _check_values(text, 0, values)
    try:
        return json.loads(text)
    except RecursionError:
        raise BadMessage("JSON that is too deep") from None


def check_cost(body: str, start: int, small: int = SMALL_BODY) -> None:
    """What a text would take as Python objects, found without making them. Raises BadMessage."""
    length = len(body) - start
    if length > BODY_LIMIT:
        raise TooLarge(f"a body of {length} characters; {BODY_LIMIT} are read")
    width = sys.getsizeof(body) // max(len(body), 64)  # 1, 2 or 4 bytes a character, and a few bytes in all
    if "\\u" in body:
        width = max(width, 4 if _ESCAPED_WIDE.search(body) else 2)
    if length * width > _LARGE_WIDTH:
        raise TooLarge(f"a body of {length} characters of {width} bytes")
    _check_values(body, start, JSON_VALUES if length > small else length)


def _check_values(text: str, start: int, values: int) -> None:
    depth = 0
    for count, token in enumerate(_TOKEN.finditer(text, start)):
        if count > values:
            raise TooLarge(f"more than {values} values in {len(text)} characters of JSON")
        first = text[token.start()]
        if first in "[{":
            depth += 1
            if depth > JSON_DEPTH:
                raise BadMessage(f"JSON that is more than {JSON_DEPTH} deep")
        elif first in "]}":
            depth -= 1


def _no_constant(text: str) -> NoReturn:
    raise BadMessage(f"{text} is no JSON")


_JSON = json.JSONDecoder(parse_constant=_no_constant)


def as_json(value: object) -> str:
    """Raises ValueError."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"this cannot be sent as JSON: {error}") from error


def unfit_for_header(text: str) -> bool:
    """Control characters break the frames of 1.0 clients, blanks at the ends get lost, ActiveMQ limits the length."""
    if len(text) > HEADER_LIMIT or _UNFIT.search(text):
        return True
    escapes = sum(text.count(character) for character in "\\:")  # of STOMP 1.2: each takes two bytes
    return len(text.encode()) + escapes > HEADER_LIMIT


def number(value: object, default: float) -> float:
    """`value`, if that is a finite number. (An agent may say 1e999, or a whole number of 4000 digits.)"""
    try:
        found = float(value) if isinstance(value, int | float) else default
    except OverflowError:
        return default
    return found if math.isfinite(found) else default


MOST_INT32 = 2**31 - 1
"""XML-RPC carries no more."""
MOST_INT64 = 2**63 - 1


def text_field(value: Mapping[str, Any], name: str) -> str:
    """A text; empty if it is missing. Raises BadMessage."""
    text = value.get(name, "")
    if not isinstance(text, str):
        raise BadMessage(f"{name} is no text")
    return text


def whole_field(value: Mapping[str, Any], name: str, default: int, most: int) -> int:
    """A whole number from 0 to `most`. Raises BadMessage."""
    number = value.get(name, default)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= most:
        raise BadMessage(f"{name} is no whole number from 0 to {most}")
    return number


def finite_number(text: object, name: str) -> float:
    """A finite number. Raises BadMessage, ValueError."""
    if not isinstance(text, int | float | str) or isinstance(text, bool):
        raise BadMessage(f"{name} is no number")
    number = float(text)
    if not math.isfinite(number):
        raise BadMessage(f"{name} is no finite number")
    return number
