"""Output of commands as text that XML and JSON can carry. Pure, but for reading the file.

The exact bytes stay in the file; this is what getCmdResults of 2009 shows: UTF-8, with what is no UTF-8 and what XML
cannot carry (XML 1.0 section 2.2) escaped with backslashes, cut at 3 MiB with a mark.
"""

from __future__ import annotations

import os

INLINE_LIMIT = 3 * 1024 * 1024
"""Bytes of output that go inline; the rest is cut off. Twice that fits a message (words.BODY_LIMIT)."""
TAIL_BYTES = 4096
"""Of standard error, for the volunteer's stderr.txt."""

# What UTF-8 can carry and XML cannot. (No surrogates: decoding lets none in.) A table, because a function called for
# each character stops the agent for seconds when somebody prints megabytes of NUL.
_ESCAPES = {code: f"\\x{code:02x}" for code in range(0x20) if code not in b"\t\n\r"}
_ESCAPES |= {0xFFFE: "\\ufffe", 0xFFFF: "\\uffff"}


def as_text(raw: bytes) -> str:
    """`raw` as text that XML can carry."""
    return raw.decode("utf-8", "backslashreplace").translate(_ESCAPES)


def inline(path: str, limit: int = INLINE_LIMIT) -> str:
    """The file's first `limit` bytes as text, with a mark where it was cut. A file that is not there is empty."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            raw = file.read(limit)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return ""
    if size <= len(raw):
        return as_text(raw)
    raw = whole_characters(raw)
    return f"{as_text(raw)}\n[cut: {len(raw)} of {size} bytes]\n"


def tail(path: str, limit: int = TAIL_BYTES) -> str:
    """The file's last `limit` bytes as text; begins with a whole line if there is a line break in them."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - limit))
            raw = file.read(limit)
    except OSError:
        return ""
    if size > limit and b"\n" in raw[:-1]:
        raw = raw.partition(b"\n")[2]
    return as_text(raw)


def whole_characters(raw: bytes) -> bytes:
    """Without the first bytes of a UTF-8 character that a cut left at the end."""
    for back in range(1, min(4, len(raw)) + 1):
        byte = raw[-back]
        if byte & 0xC0 == 0x80:
            continue
        length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return raw[:-back] if length > back else raw
    return raw
