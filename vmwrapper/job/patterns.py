"""Patterns of zip_output: regular expressions as C++'s std::regex reads them (ECMAScript), turned into Python's. Pure.

The languages look alike and differ where nobody expects it: `$` before a last line break, `\\d` of other scripts, `[]`,
`[[:alpha:]]`, `a**`, `\\z`, look-behind. So a pattern is read token by token, what std::regex refuses is refused, and
the result works on the bytes of a file name, as std::regex does on Linux.
"""

from __future__ import annotations

import re

_CLASSES = {
    "alpha": rb"A-Za-z",
    "digit": rb"0-9",
    "alnum": rb"A-Za-z0-9",
    "upper": rb"A-Z",
    "lower": rb"a-z",
    "xdigit": rb"0-9A-Fa-f",
    "space": rb"\s",
    "blank": rb" \t",
    "cntrl": rb"\x00-\x1f\x7f",
    "punct": rb"!-/:-@\[-`{-~",
    "print": rb" -~",
    "graph": rb"!-~",
    "d": rb"0-9",
    "s": rb"\s",
    "w": rb"\w",
}
_CONTROLS = {ord("f"): 0x0C, ord("n"): 0x0A, ord("r"): 0x0D, ord("t"): 0x09, ord("v"): 0x0B, ord("0"): 0x00}
_QUANTIFIER = re.compile(rb"[*+?]|\{(\d+)(?:,(\d*))?\}")
_GROUP_STARTS = (b"(?:", b"(?=", b"(?!")
_HEX = re.compile(rb"[0-9A-Fa-f]+")
MAX_REPEAT = 1000
"""A file name has at most 255 bytes."""


class BadPattern(Exception):  # noqa: N818
    """std::regex would refuse it too; `str` says why."""


def compile_pattern(pattern: str) -> re.Pattern[bytes]:
    """For `search` in the bytes of a name. Raises BadPattern."""
    translated = _Translator(pattern.encode("utf-8", "surrogateescape")).translate()
    try:
        return re.compile(translated)
    except (re.error, OverflowError, RecursionError) as error:
        raise BadPattern(str(error)) from error


class _Translator:
    """One pass over the pattern. Each open group has a list of its pieces; the last one takes a quantifier."""

    def __init__(self, pattern: bytes) -> None:
        self._pattern = pattern
        self._position = 0
        self._stack: list[list[bytes]] = [[b""]]
        self._atom = False
        """Whether the last piece may have a quantifier."""
        self._groups = 0
        self._lookaheads: list[bool] = []

    def translate(self) -> bytes:
        while self._position < len(self._pattern):
            self._next()
        if len(self._stack) > 1:
            raise BadPattern("a ( is never closed")
        return b"".join(self._stack[0])

    def _add(self, piece: bytes, *, atom: bool) -> None:
        self._stack[-1].append(piece)
        self._atom = atom

    def _next(self) -> None:
        rest = self._pattern[self._position :]
        character = rest[:1]
        if character in (b"*", b"+", b"?", b"{"):
            self._quantifier(rest)
        elif character == b"(":
            self._open(rest)
        elif character == b")":
            self._close()
        elif character == b"[":
            self._position += 1
            self._add(self._bracket(), atom=True)
        elif character == b"\\":
            self._escape(rest)
        else:
            self._position += 1
            special = {b"^": rb"\A", b"$": rb"\Z", b"|": b"|", b".": rb"[^\n\r]"}.get(character)
            self._add(special or _literal(character[0]), atom=special is None or character == b".")

    def _quantifier(self, rest: bytes) -> None:
        found = _QUANTIFIER.match(rest)
        if found is None:
            raise BadPattern("a { is no {n}, {n,} or {n,m}")
        if not self._atom:
            raise BadPattern(f"{found[0].decode()} has nothing to repeat")
        if any(number and int(number) > MAX_REPEAT for number in found.groups()):
            raise BadPattern(f"{found[0].decode()} repeats more than {MAX_REPEAT} times")
        self._position += found.end()
        lazy = self._pattern[self._position : self._position + 1] == b"?"
        self._position += lazy
        self._stack[-1][-1] = b"(?:" + self._stack[-1][-1] + found[0] + (b"?" if lazy else b"") + b")"

    def _open(self, rest: bytes) -> None:
        start = b"("
        if rest[1:2] == b"?":
            start = rest[:3]
            if start not in _GROUP_STARTS:
                raise BadPattern(f"{start.decode('utf-8', 'replace')} is no group of ECMAScript")
        else:
            self._groups += 1
        self._position += len(start)
        self._lookaheads.append(start in (b"(?=", b"(?!"))
        self._stack.append([start])
        self._atom = False

    def _close(self) -> None:
        if len(self._stack) == 1:
            raise BadPattern("a ) closes nothing")
        self._position += 1
        content = b"".join(self._stack.pop()) + b")"
        self._add(content, atom=not self._lookaheads.pop())

    def _escape(self, rest: bytes) -> None:
        if len(rest) == 1:
            raise BadPattern("ends with a \\")
        letter = rest[1:2]
        if letter in b"bB":
            self._position += 2
            self._add(b"\\" + letter, atom=False)
        elif letter in b"dDsSwW":
            self._position += 2
            self._add(b"\\" + letter, atom=True)
        elif letter in b"123456789":
            number = re.match(rb"\d+", rest[1:])
            digits = number[0] if number else letter
            if int(digits[:4]) > self._groups:
                raise BadPattern(f"\\{digits.decode()} names no group before it")
            self._position += 1 + len(digits)
            self._add(b"(?:\\" + digits + b")", atom=True)
        else:
            self._add(_literal(self._character_escape()), atom=True)

    def _character_escape(self) -> int:
        """The byte that an escape at the position stands for; the position is moved past it."""
        rest = self._pattern[self._position + 1 :]
        if not rest:
            raise BadPattern("ends with a \\")
        letter = rest[0]
        if letter in b"xu":
            length = 2 if letter == ord("x") else 4
            if not _HEX.fullmatch(rest[1 : 1 + length]) or len(rest) < 1 + length:
                raise BadPattern(f"\\{chr(letter)} needs {length} hexadecimal digits")
            value = int(rest[1 : 1 + length], 16)
            if value > 0xFF:
                raise BadPattern(f"\\u{value:04x} is no byte")
            self._position += 2 + length
            return value
        if letter == ord("c"):
            if len(rest) < 2:
                raise BadPattern("\\c needs a letter")
            self._position += 3
            return rest[1] % 32
        self._position += 2
        return _CONTROLS.get(letter, letter)

    def _bracket(self) -> bytes:
        negated = self._pattern[self._position : self._position + 1] == b"^"
        self._position += negated
        items: list[bytes] = []
        while True:
            if self._position >= len(self._pattern):
                raise BadPattern("a [ is never closed")
            if self._pattern[self._position : self._position + 1] == b"]":
                self._position += 1
                break
            items.append(self._bracket_item())
        if not items:
            return rb"[\x00-\xff]" if negated else rb"(?!)"
        return b"[" + (b"^" if negated else b"") + b"".join(items) + b"]"

    def _bracket_item(self) -> bytes:
        first = self._bracket_atom()
        if isinstance(first, bytes):
            return first
        following = self._pattern[self._position : self._position + 2]
        if following[:1] != b"-" or following[1:2] in (b"", b"]"):
            return _literal(first)
        self._position += 1
        last = self._bracket_atom()
        if isinstance(last, bytes) or last < first:
            raise BadPattern("a range in [] goes from nowhere to nowhere")
        return _literal(first) + b"-" + _literal(last)

    def _bracket_atom(self) -> int | bytes:
        """One character, or the inside of a class."""
        rest = self._pattern[self._position :]
        if rest[:2] in (b"[:", b"[=", b"[."):
            end = rest.find(rest[1:2] + b"]", 2)
            if end < 0:
                raise BadPattern(f"{rest[:2].decode()} is never closed")
            name = rest[2:end]
            self._position += end + 2
            if rest[1:2] == b":":
                if name.decode("utf-8", "replace").lower() not in _CLASSES:
                    raise BadPattern(f"[:{name.decode('utf-8', 'replace')}:] is no class of characters")
                return _CLASSES[name.decode().lower()]
            if len(name) != 1:
                raise BadPattern(f"{rest[: end + 2].decode('utf-8', 'replace')} is no single character")
            return name[0]
        if rest[:1] == b"\\":
            letter = rest[1:2]
            if letter and letter in b"dDsSwW":
                self._position += 2
                return b"\\" + letter
            if letter == b"b":
                self._position += 2
                return 0x08
            return self._character_escape()
        self._position += 1
        return rest[0]


def _literal(byte: int) -> bytes:
    character = bytes([byte])
    return character if character.isalnum() or character == b"_" else b"\\x%02x" % byte
