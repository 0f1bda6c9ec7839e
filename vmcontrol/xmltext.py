"""What XML-RPC can carry: text and values made fit for it. Pure.

XML 1.0 has no way to write most control characters, and XML-RPC integers have 32 bits. Text keeps every character that
XML has and shows the others with a backslash (`\\x07`, `\\ud800`); larger integers become doubles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

TEXT_LIMIT = 8 * 1024 * 1024
"""Bytes of an output that getCmdResults gives; the exact bytes go as files."""
DEPTH_LIMIT = 32

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def xml_text(text: str) -> str:
    """`text` with what XML cannot carry escaped with backslashes."""
    return _NO_XML.sub(lambda match: ascii(match.group())[1:-1], text)


def output_text(content: bytes, size: int | None = None) -> str:
    """A program's output as text: UTF-8, anything else escaped, cut at TEXT_LIMIT with a mark that gives the size.

    size: bytes there are in all, when `content` is only their beginning.
    """
    size = len(content) if size is None else size
    text = xml_text(content[:TEXT_LIMIT].decode("utf-8", "backslashreplace"))
    return text[:TEXT_LIMIT] + (_mark(size) if max(size, len(text)) > TEXT_LIMIT else "")  # escapes take more room


def cut_text(text: str) -> str:
    """Text that came as text, cut at TEXT_LIMIT characters."""
    return xml_text(text[:TEXT_LIMIT]) + (_mark(len(text)) if len(text) > TEXT_LIMIT else "")


def _mark(size: int) -> str:
    return f"\n[cut at {TEXT_LIMIT} bytes; {size} in all]\n"


def carried(value: Any, depth: int = 0) -> Any:  # noqa: PLR0911 (a table, one return a kind)
    """`value` made of what XML-RPC has: None, bool, int, float, str, list, dict with string keys."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -(2**31) <= value < 2**31 else _double(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return xml_text(str(value))
    if depth >= DEPTH_LIMIT:
        return "..."
    if isinstance(value, Mapping):
        return {xml_text(str(key)): carried(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [carried(item, depth + 1) for item in value]
    return xml_text(str(value))


def _double(value: int) -> float | str:
    try:
        return float(value)
    except OverflowError:
        return "a number that is too large"
