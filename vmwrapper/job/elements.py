"""From the bytes of a job file to its elements, as BOINC's own parser finds them (lib/parse.h, XML_PARSER). A stream.

That parser knows nothing of trees: it reads tags and texts one after the other, takes bytes as they come whatever the
encoding says, and forgets what it does not know. So a job file may have a bare `&`, tags that are never closed,
attributes without quotes or text anywhere, and what counts is decided here as there:

- An element that is known, and is to be a text, is its start tag, one text, and its own end tag. Anything else there (a
  comment in the middle, an element, another end tag) makes it no value, and reading goes on behind what was read.
- What is not known is passed over as a single tag: what is inside of it counts as if it stood outside.
- Comments are white space, attributes are not looked at, a NUL is the end.

More than BOINC's parser takes: UTF-16, a byte order mark, slashes in attributes, texts and tags of any length up to
`TEXT_LIMIT`. What is no good XML is a warning with its line.

    NotAJob       no <job_desc>, or no end of it; `line` says where, if anywhere
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from vmwrapper import cvalues
from vmwrapper.job.complaints import Complaints

ELEMENTS_LIMIT = 100_000
"""Elements in one other, the tasks of the job not counted."""
TEXT_LIMIT = 1 << 18
"""Bytes of one text (MAX_XML_STRING of lib/parse.cpp)."""
SHAPE_LIMIT = 32
SHAPES_LIMIT = 64
"""Patterns that are kept, and texts in one."""
PIECE = 1 << 18
"""Bytes that are read at once, as a rule."""

_LEAF = re.compile(rb"[ \t\n\v\f\r]*<([^<>/ \t\n\v\f\r!?]+)>([^<]*)</\1>")
_PLAIN_TAG = re.compile(rb"[ \t\n\v\f\r]*<(/?[A-Za-z_][A-Za-z0-9_]*)>")
_BLANKS = re.compile(rb"[ \t\n\v\f\r]*")
_SPACE = re.compile(rb"[ \t\n\v\f\r]")
_ATTRIBUTE = re.compile(rb"[ \t\n\v\f\r]([^ \t\n\v\f\r=/<>]+)")
_ENCODING = re.compile(rb"""encoding[ \t]*=[ \t]*["']?([A-Za-z0-9._-]+)""")
_STRANGE_ENTITY = re.compile(rb"&(?!(?:lt|gt|quot|apos|amp|#x[dDaA]|#[0-9]+);)")
_BOM = b"\xef\xbb\xbf"
_CDATA = b"<![CDATA["


class NotAJob(Exception):  # noqa: N818
    """There is no job in these bytes."""

    def __init__(self, text: str, line: int | None) -> None:
        super().__init__(text)
        self.line = line


class How(Enum):
    """In which form an element that is to be a text was written."""

    TEXT = auto()
    EMPTY = auto()
    """`<x></x>`"""
    EMPTY_TAG = auto()
    """`<x/>`: to BOINC a true boolean, an empty text, and no number."""
    BROKEN = auto()
    """No value."""


class Leaf(NamedTuple):
    """An element that is to be a text."""

    name: str
    line: int
    text: str
    """Stripped; bytes that are not UTF-8 as os.fsdecode gives them. Of a broken one: what was expected."""
    how: How


_TEXT, _EMPTY = How.TEXT, How.EMPTY
_new_leaf = tuple.__new__
"""Half the time of Leaf(...), which counts for a million of them."""


class Unknown(NamedTuple):
    """The start of an element that nobody knows."""

    name: str
    line: int


@dataclass(slots=True)
class Element:
    """An element with elements of its own."""

    name: str
    line: int
    leaves: list[Leaf] = field(default_factory=list)
    elements: list[Element] = field(default_factory=list)
    unknown: list[Unknown] = field(default_factory=list)

    def add(self, child: Leaf | Element | Unknown) -> None:
        """Raises NotAJob when there are too many."""
        if len(self.leaves) + len(self.elements) + len(self.unknown) >= ELEMENTS_LIMIT:
            raise NotAJob(f"has more than {ELEMENTS_LIMIT} elements in this <{self.name}>", self.line)
        if isinstance(child, Leaf):
            self.leaves.append(child)
        elif isinstance(child, Element):
            self.elements.append(child)
        else:
            self.unknown.append(child)


@dataclass(frozen=True, slots=True)
class Level:
    """What is known inside an element: which names are texts, and which have elements of their own."""

    leaves: Mapping[bytes, str]
    elements: Mapping[str, Level]
    numbers: Mapping[str, Callable[[bytes], object]]
    """Those of BOINC's wrapper that are numbers or booleans: None says that a text is none. That one is left there
    before its end tag is read, and it is no text with entities."""

    @classmethod
    def of(
        cls,
        leaves: Iterable[str],
        elements: Mapping[str, Level] | None = None,
        numbers: Mapping[str, Callable[[bytes], object]] | None = None,
    ) -> Level:
        return cls({name.encode(): name for name in leaves}, elements or {}, numbers or {})


class _Kind(Enum):
    TAG = auto()
    TEXT = auto()
    CDATA = auto()


_TAG = _Kind.TAG


class _Token(NamedTuple):
    kind: _Kind
    content: bytes
    line: int

    def __str__(self) -> str:
        text = _decoded(self.content)
        text = text if len(text) <= 60 else text[:57] + "..."
        return f"<{text}>" if self.kind is _TAG else repr(text)


Read = Callable[[int], bytes]
"""The next bytes of a file, at most so many; b"" at its end."""


def read_job(read: Read, level: Level, complaints: Complaints) -> Iterator[Leaf | Element | Unknown]:
    """What stands in <job_desc>, one after the other.

    Raises NotAJob, when the job does not begin or does not end; what was given before is then to be forgotten.
    """
    return _Reader(read, complaints).job(level)


class _Reader:
    """Position and line in what was read of the file."""

    def __init__(self, read: Read, complaints: Complaints) -> None:
        self._read = read
        self._complaints = complaints
        self._data = b""
        self._position = 0
        self._line = 1
        self._at_end = False
        self._decode: Callable[[bytes, bool], str] | None = None
        self._encoding_is_told = False
        self._put_back: _Token | None = None
        self._last: dict[str, tuple[bytes, str]] = {}
        """The last text of each name: the tasks of a large job say the same in most of their elements."""
        self._shapes: dict[tuple[str, ...], re.Pattern[bytes]] = {}
        self._shape: tuple[str, ...] = ()
        """Name of the last element that had nothing but plain texts, and the names of these."""
        self._half_read: dict[bytes, int] = {}
        """Names of elements whose end tags are still to come, and say nothing then."""

    # --- bytes

    def _begin(self) -> None:
        raw = b""
        while len(raw) < len(_BOM) and self._more():
            raw += self._raw
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            self._at_end = False  # its bytes have NULs
            self._decode = codecs.getincrementaldecoder("utf-16")("surrogatepass").decode
            self._data = self._cut_at_nul(self._as_utf8(raw, self._decode))
        elif self._data.startswith(_BOM):
            self._position = len(_BOM)

    def _more(self) -> bool:
        """Read on; what was not passed stays. False: there is nothing more."""
        rest, piece = self._data[self._position :], b""
        while not piece and not self._at_end:  # a piece may be half of one character
            self._raw = self._read(max(PIECE, len(rest)))
            self._at_end = not self._raw
            piece = self._cut_at_nul(self._raw if self._decode is None else self._as_utf8(self._raw, self._decode))
        if piece:
            self._data, self._position = rest + piece, 0
        return bool(piece)

    def _cut_at_nul(self, piece: bytes) -> bytes:
        if b"\0" in piece:
            self._at_end = True
            return piece.partition(b"\0")[0]
        return piece

    def _as_utf8(self, piece: bytes, decode: Callable[[bytes, bool], str]) -> bytes:
        try:
            return decode(piece, not piece).encode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise NotAJob(f"is not the UTF-16 text that it begins as: {error.reason}", self._line) from error

    def _pass_to(self, position: int) -> None:
        self._line += self._data.count(b"\n", self._position, position)
        self._position = position

    # --- tokens

    def _token(self) -> _Token | None:
        """The next tag or text; None at the end of the file."""
        if self._put_back is not None:
            token, self._put_back = self._put_back, None
            return token
        plain = _PLAIN_TAG.match(self._data, self._position)
        if plain is not None:
            self._pass_to(plain.end())
            return _Token(_TAG, plain[1], self._line)
        while self._pass_blanks():
            if self._data[self._position] != ord("<"):
                return self._text()
            if self._data.startswith(_CDATA, self._position):
                return self._cdata()
            if not self._data.startswith(b"<!--", self._position):
                return self._tag()
            line, comment = self._line, self._until(b"-->", 4)
            if comment is None:
                break
            if b"--" in comment[4:-3]:
                self._complaints.warn(line, "", "has a comment with -- in it, which makes it no XML")
        return None

    def _pass_blanks(self) -> bool:
        """To the next thing, of which enough is there to tell what it is. False: the file is over."""
        while True:
            blanks = _BLANKS.match(self._data, self._position)
            self._pass_to(blanks.end() if blanks else self._position)
            if len(self._data) - self._position >= len(_CDATA) or not self._more():
                return self._position < len(self._data)

    def _cdata(self) -> _Token | None:
        line, section = self._line, self._until(b"]]>", len(_CDATA))
        if section is None:
            return None
        return _Token(_Kind.CDATA, section[len(_CDATA) : -3].strip(cvalues.BLANKS), line)

    def _until(self, end: bytes, skip: int) -> bytes | None:
        """From here to the end of `end`, which is not looked for in the first bytes. None: it never comes."""
        while (found := self._data.find(end, self._position + skip)) < 0:
            if not self._more():
                return None
        whole = self._data[self._position : found + len(end)]
        self._pass_to(found + len(end))
        return whole

    def _text(self) -> _Token | None:
        while (end := self._data.find(b"<", self._position)) < 0:
            if not self._more():
                return None  # it is a text when a tag follows
        token = _Token(_Kind.TEXT, self._data[self._position : end].strip(cvalues.BLANKS), self._line)
        self._pass_to(end)
        return token

    def _tag(self) -> _Token | None:
        line = self._line
        whole = self._until(b">", 1)
        if whole is None:
            return None
        content = whole[1:-1]
        space = _SPACE.search(content)
        if space is None:
            return _Token(_TAG, content, line)
        name, rest = content[: space.start()], content[space.start() :].rstrip(cvalues.BLANKS)
        if name.startswith(b"?"):
            told = _ENCODING.search(rest)
            self._encoding_is_told = told is not None and told[1].lower() not in (b"utf-8", b"utf8")
        elif attribute := _ATTRIBUTE.search(rest):
            text = f"has the unknown attribute {_decoded(attribute[1])[:40]!r}, which is ignored"
            self._complaints.warn(line, _decoded(name), text)
        return _Token(_TAG, name + b"/" if rest.endswith(b"/") else name, line)

    # --- elements

    def job(self, level: Level) -> Iterator[Leaf | Element | Unknown]:
        self._begin()
        token = self._token()
        while token is not None and token.kind is _TAG and token.content.startswith(b"?"):
            token = self._token()
        if token is None:
            raise NotAJob("has no element: expected <job_desc>", None)
        if token.kind is not _TAG or token.content not in {b"job_desc", b"job_desc/"}:
            raise NotAJob(f"expected <job_desc> as the outermost element, not {token}", token.line)
        if token.content == b"job_desc":
            while (child := self._like_the_last(level) or self._next("job_desc", token.line, level)) is not None:
                yield child
        if (after := self._token()) is not None:
            self._complaints.warn(after.line, "job_desc", f"is followed by {after}, which is ignored")

    def _next(self, container: str, begin: int, level: Level) -> Leaf | Element | Unknown | None:
        """The next thing in an element; None at its end tag."""
        while True:
            token = self._must_be_token(container, begin)
            content = token.content
            if token.kind is not _TAG:
                shown = _decoded(b" ".join(content.split()))[:40]
                text = f"has the text {shown!r} between elements; it is ignored"
                self._complaints.warn(token.line, container, text)
                continue
            bare = content.removesuffix(b"/")
            name = _decoded(bare)
            if bare in level.leaves:
                return self._leaf(name, token, level.numbers.get(name))
            if name in level.elements:
                return self._element(name, token, level.elements[name])
            if name == f"/{container}":
                return None
            if not bare.startswith(b"/"):
                self._expect_end(token)
                self._pass_text_of(token)
                return Unknown(name, token.line)
            self._stray_end(token, container)

    def _element(self, name: str, token: _Token, level: Level) -> Element:
        element = Element(name, token.line)
        if token.content.endswith(b"/"):
            return element
        while True:
            if self._put_back is None:
                self._plain_leaves(element.leaves, level)
            child = self._next(name, token.line, level)
            if child is None:
                self._note_shape(element)
                return element
            element.add(child)

    def _note_shape(self, element: Element) -> None:
        """The second of two elements with the same texts in it makes a pattern for those that follow."""
        shape = (element.name, *(leaf.name for leaf in element.leaves))
        if element.elements or element.unknown or len(shape) > SHAPE_LIMIT:
            shape = ()
        elif shape == self._shape and shape not in self._shapes and len(self._shapes) < SHAPES_LIMIT:
            blanks, names = _BLANKS.pattern, [name.encode() for name in shape]
            inside = b"".join(b"%b<%b>([^<]*)</%b>" % (blanks, name, name) for name in names[1:])
            self._shapes[shape] = re.compile(b"%b<%b>%b%b</%b>" % (blanks, names[0], inside, blanks, names[0]))
        self._shape = shape

    def _like_the_last(self, level: Level) -> Element | None:
        """The next element, if it is written as the last one was: a large job is one task many times."""
        pattern = self._shapes.get(self._shape)
        found = pattern.match(self._data, self._position) if pattern is not None and self._put_back is None else None
        if found is None:
            return None
        name, *names = self._shape
        numbers, data, last = level.elements[name].numbers, self._data, self._last
        position = data.index(b"<", self._position)
        begin = line = self._line + data.count(b"\n", self._position, position)
        leaves = []
        for index, (leaf, raw) in enumerate(zip(names, found.groups(), strict=True), 1):
            start = found.start(index)
            line += data.count(b"\n", position, start)
            position = start
            value = raw.strip(cvalues.BLANKS)
            known = last.get(leaf)
            if known is None or known[0] != value:
                if len(value) > TEXT_LIMIT:
                    return None
                known = last[leaf] = (value, self._value(leaf, value, line, numbers))
            leaves.append(_new_leaf(Leaf, (leaf, line, known[1], _TEXT if value else _EMPTY)))
        self._line = line + data.count(b"\n", position, found.end())
        self._position = found.end()
        return Element(name, begin, leaves)

    def _plain_leaves(self, leaves: list[Leaf], level: Level) -> None:
        """Those that follow and are written as nearly all are, at once."""
        names, data, position, line, last = level.leaves, self._data, self._position, self._line, self._last
        while len(leaves) < ELEMENTS_LIMIT and (found := _LEAF.match(data, position)):
            raw_name, raw = found.groups()
            name = names.get(raw_name)
            if name is None or len(raw) > TEXT_LIMIT:
                break
            line += data.count(b"\n", position, found.start(1))
            value = raw.strip(cvalues.BLANKS)
            known = last.get(name)
            if known is None or known[0] != value:
                known = last[name] = (value, self._value(name, value, line, level.numbers))
            leaves.append(_new_leaf(Leaf, (name, line, known[1], _TEXT if value else _EMPTY)))
            if b"\n" in raw:
                line += raw.count(b"\n")
            position = found.end()
        self._position, self._line = position, line

    def _leaf(self, name: str, token: _Token, number: Callable[[bytes], object] | None) -> Leaf:
        """XML_PARSER::parse_str, parse_int and so on; its start tag was read."""
        if token.content.endswith(b"/"):
            return Leaf(name, token.line, "", How.EMPTY_TAG)
        end = b"/" + token.content
        value = self._must_be_token(name, token.line)
        if value.kind is _TAG and value.content == end:
            return Leaf(name, token.line, "", How.EMPTY)
        if value.kind is _TAG:
            return self._broken(token, value, f"expected text, not the element {value}")
        if number is not None and number(value.content) is None:
            self._expect_end(token)
            return Leaf(name, token.line, _decoded(value.content), How.TEXT)
        following = self._must_be_token(name, token.line)
        if following.kind is _TAG and following.content == end:
            return self._text_leaf(name, token.line, value, is_number=number is not None)
        expected = f"</{name}> after its text, not {following}"
        if following.kind is not _TAG:
            expected = "one text, without a comment or a CDATA section in it"
        return self._broken(token, following, f"expected {expected}")

    def _text_leaf(self, name: str, line: int, value: _Token, *, is_number: bool) -> Leaf:
        if len(value.content) > TEXT_LIMIT:
            return Leaf(name, line, f"expected at most {TEXT_LIMIT} bytes", How.BROKEN)
        is_literal = is_number or value.kind is _Kind.CDATA
        text = _decoded(value.content) if is_literal else self._value(name, value.content, line, {})
        return Leaf(name, line, text, How.TEXT)

    def _must_be_token(self, name: str, begin: int) -> _Token:
        token = self._token()
        if token is None:
            raise NotAJob(f"has no </{name}> for the <{name}> of this line", begin)
        return token

    def _broken(self, token: _Token, read: _Token, expected: str) -> Leaf:
        self._expect_end(token)
        self._expect_end(read)
        return Leaf(_decoded(token.content), token.line, expected, How.BROKEN)

    def _expect_end(self, token: _Token) -> None:
        if token.kind is _TAG and not token.content.endswith(b"/") and len(self._half_read) < 100:
            self._half_read[token.content] = self._half_read.get(token.content, 0) + 1

    def _pass_text_of(self, token: _Token) -> None:
        """The text of an element that nobody knows: one complaint about it is enough."""
        following = None if token.content.endswith(b"/") else self._token()
        if following is not None and following.kind is _TAG:
            self._put_back = following

    def _stray_end(self, token: _Token, container: str) -> None:
        name = token.content[1:]
        if self._half_read.get(name):
            self._half_read[name] -= 1
        else:
            self._complaints.warn(token.line, container, f"has the end tag {token} without its start; it is ignored")

    def _value(self, name: str, raw: bytes, line: int, numbers: Container[str]) -> str:
        if b"&" in raw and name not in numbers:
            if _STRANGE_ENTITY.search(raw):
                self._complaints.warn(line, name, "has a & that begins no entity and stays as it is: write &amp;")
            raw = cvalues.unescape(raw)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            if not self._encoding_is_told:
                text = "is not UTF-8 and does not say what it is; names are taken as the bytes that they are"
                self._complaints.warn(line, "", text)
                self._encoding_is_told = True
            return _decoded(raw)


def _decoded(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
