"""What XML-RPC can carry: text and values made fit for it. Pure.

XML 1.0 has no way to write most control characters, and XML-RPC integers have 32 bits. Text keeps every character that
XML has and shows the others with a backslash (`\\x07`, `\\ud800`); larger integers become doubles.

A program's output may have megabytes of such characters: what makes text of it does so in slices, between which the
caller lets others have their turn.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

TEXT_LIMIT = 8 * 1024 * 1024
"""Bytes of an output that getCmdResults gives; the exact bytes go as files."""
DEPTH_LIMIT = 32
SLICE = 32 * 1024
"""Bytes or characters that are worked on in one go: 10 to 20 ms where all of them have to be escaped."""

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_BEYOND = re.compile("[\ud800-\udfff\ufffe\uffff]")
_CONTROLS: list[int | str] = [ascii(chr(code))[1:-1] if _NO_XML.match(chr(code)) else code for code in range(0x800)]
"""For str.translate, which takes twice as long with a dict that does not have most characters."""
_ALL = {code: ascii(chr(code))[1:-1] for code in (*range(0x20), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF)}
for _code in b"\t\n\r":
    del _ALL[_code]


def xml_text(text: str) -> str:
    """`text` with what XML cannot carry escaped with backslashes."""
    if _NO_XML.search(text) is None:
        return text
    return text.translate(_ALL if _BEYOND.search(text) else _CONTROLS)


class LongText:
    """Text that XML has, kept as UTF-8: as a str one character beyond U+FFFF would make each take four bytes.

    Equal to a str of the same text.
    """

    __slots__ = ("content",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, content: bytes | bytearray) -> None:
        self.content = content

    def __len__(self) -> int:
        """Bytes."""
        return len(self.content)

    def __str__(self) -> str:
        return self.content.decode()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, LongText):
            return self.content == other.content
        return str(self) == other if isinstance(other, str) else NotImplemented

    def slices(self) -> Iterator[str]:
        """In pieces of SLICE bytes, or a little more or less."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        for start in range(0, len(self.content), SLICE):
            yield decoder.decode(self.content[start : start + SLICE])


class OutputText:
    """A program's output on its way to text: UTF-8, anything else escaped, cut at TEXT_LIMIT bytes with a mark.

    Fed with pieces of any size; `content` grows. Nothing of what was fed is kept.
    """

    def __init__(self) -> None:
        self.content = bytearray()
        self.taken = 0
        """Bytes of the output."""
        self._is_cut = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    @property
    def is_full(self) -> bool:
        """More is not taken."""
        return self._is_cut or self.taken >= TEXT_LIMIT

    def feed(self, data: bytes | memoryview) -> None:
        """Of large pieces SLICE is done in 10 to 20 ms at most."""
        data = bytes(data[: TEXT_LIMIT - self.taken])
        self.taken += len(data)
        self._add(self._decoder.decode(data))

    def end(self, size: int) -> bytearray:
        """The text. size: bytes of the whole output."""
        self._add(self._decoder.decode(b"", final=True))
        if size > TEXT_LIMIT or self._is_cut:
            self.content += _mark(size).encode()
        return self.content

    def _add(self, text: str) -> None:
        if not self._is_cut:
            encoded, left = xml_text(text).encode(), TEXT_LIMIT - len(self.content)
            self._is_cut = len(encoded) > left  # escapes take more room
            self.content += encoded[:left].decode("utf-8", "ignore").encode() if self._is_cut else encoded


def output_text(content: bytes, size: int | None = None) -> str:
    """The same in one piece. size: bytes there are in all, when `content` is only their beginning."""
    text = OutputText()
    for start in range(0, len(content), SLICE):
        if not text.is_full:
            text.feed(content[start : start + SLICE])
    return text.end(len(content) if size is None else size).decode()


def cut_text(text: str) -> str:
    """Text that came as text, cut at TEXT_LIMIT characters."""
    return text[:TEXT_LIMIT] + _mark(len(text)) if len(text) > TEXT_LIMIT else text


def text_slices(text: str | LongText) -> Iterator[str]:
    """Either kind of text, in slices that XML can carry."""
    if isinstance(text, LongText):
        yield from text.slices()
    else:
        for start in range(0, len(text), SLICE):
            yield xml_text(text[start : start + SLICE])


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
