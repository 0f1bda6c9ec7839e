"""From the bytes of a job file to a tree of elements, safely.

Refused: files over `MAX_BYTES`, documents with a DOCTYPE (so no entity of its own and no external DTD can exist), and
whatever is not well-formed. Nothing is fetched and nothing is expanded; libxml2 bounds the depth (256 levels).

Lenient where BOINC's own parser is (lib/parse.cpp), which takes bytes as they come: white space before the XML
declaration is allowed, a file that is neither UTF-8 nor says what it is counts as ISO-8859-1, and one that is not
well-formed is read once more as that parser reads it (`vmwrapper.job.lenient`), with a warning.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from lxml import etree

from vmwrapper.job import lenient

MAX_BYTES = 1024 * 1024
"""A job file of the page has 2 kB, one with a thousand tasks 400 kB; what is larger is no job file."""

ENCODINGS = re.compile(r"utf-8|utf8|utf-16|us-ascii|ascii|latin-?1|iso-8859-\d{1,2}|windows-125\d", re.IGNORECASE)
"""Those a job file may name: an encoding of Python such as unicode_escape is none of XML's."""

_DECLARATION = re.compile(r"\s*<\?xml\s[^>]*?\?>")
_ENCODING = re.compile(rb"""\s*<\?xml\s[^>]*?encoding\s*=\s*["']([^"'>]*)["']""")
_EMPTY_ELEMENT = re.compile(r"<([A-Za-z_][\w.-]*)((?:\s[^<>]*?)?)/>")
EMPTY_ELEMENT_MARK = "vmwrapper-empty"
"""Attribute that stands on `<x/>` and not on `<x></x>`: to BOINC the first is a true boolean, the second is nothing."""


class NotXml(Exception):  # noqa: N818
    """The bytes are no acceptable XML. line: where, or None."""

    def __init__(self, text: str, line: int | None = None) -> None:
        super().__init__(text)
        self.line = line


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed job file."""

    root: etree._Element
    warnings: tuple[tuple[int | None, str], ...] = ()
    """Line and text: the encoding had to be guessed, or the file is not well-formed."""


def parse_document(content: bytes, known: Collection[str] = ()) -> Document:
    """The tree, without comments and processing instructions. Raises NotXml, and nothing else.

    known: names of elements; one of these that is not closed is never forgiven.
    """
    if len(content) > MAX_BYTES:
        raise NotXml(f"is larger than {MAX_BYTES} bytes")
    text, warning = _decode(content)
    declaration = _DECLARATION.match(text)
    if declaration:  # its encoding has been dealt with; the line breaks in it still count
        text = "\n" * declaration.group().count("\n") + text[declaration.end() :]
    warnings = [] if warning is None else [warning]
    try:
        root = _parse(text)
    except NotXml as error:
        if "<!DOCTYPE" in text.upper():
            raise
        try:
            root = _parse(lenient.repair(text, known))
        except (lenient.CannotRepair, NotXml):
            raise error from None
        warnings.append((error.line, f"{error}; read as BOINC's wrapper reads it"))
    return Document(root, tuple(warnings))


def _parse(text: str) -> etree._Element:
    text = _mark_empty_elements(text)
    parser = etree.XMLParser(
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        dtd_validation=False,
        huge_tree=False,
        remove_comments=True,
        remove_pis=True,
        encoding="utf-8",
    )
    try:
        root = etree.fromstring(text.encode("utf-8"), parser)
    except etree.XMLSyntaxError as error:
        raise NotXml(f"is not well-formed XML: {_short(error.msg)}", error.lineno or None) from error
    except (ValueError, UnicodeError) as error:
        raise NotXml(f"is not well-formed XML: {_short(str(error))}") from error
    if root is None:
        raise NotXml("has no element")
    information = root.getroottree().docinfo
    if information.internalDTD is not None or information.externalDTD is not None:
        raise NotXml("has a DOCTYPE; document types and entities are not allowed in a job file", 1)
    return root


def _mark_empty_elements(text: str) -> str:
    """Every `<x/>` outside comments and CDATA sections gets the mark. One pass; what is malformed stays so."""
    marked: list[str] = []
    copied = 0
    position = text.find("<")
    while position >= 0:
        closing = _end_of_literal(text, position)
        if closing is None:
            empty = _EMPTY_ELEMENT.match(text, position)
            if empty:
                marked += (text[copied:position], f'<{empty[1]}{empty[2]} {EMPTY_ELEMENT_MARK}="1"/>')
                copied = empty.end()
            closing = empty.end() if empty else position + 1
        position = text.find("<", closing)
    return "".join((*marked, text[copied:]))


def _end_of_literal(text: str, position: int) -> int | None:
    """Where the comment or CDATA section that begins here ends; None when none begins here."""
    for opening, closing in (("<!--", "-->"), ("<![CDATA[", "]]>")):
        if text.startswith(opening, position):
            end = text.find(closing, position + len(opening))
            return end + len(closing) if end >= 0 else len(text)
    return None


def _decode(content: bytes) -> tuple[str, tuple[int | None, str] | None]:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return _decode_as(content, "utf-16"), None
    content = content.removeprefix(b"\xef\xbb\xbf")
    named = _ENCODING.match(content)
    if named:
        encoding = named.group(1).decode("ascii", "replace")
        if not ENCODINGS.fullmatch(encoding):
            raise NotXml(f"names the encoding {encoding!r}; write it in UTF-8", 1)
        return _decode_as(content, encoding), None
    try:
        return content.decode("utf-8"), None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return content.decode("iso-8859-1"), (line, "is not UTF-8 and names no encoding; it was read as ISO-8859-1")


def _decode_as(content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except (UnicodeError, LookupError) as error:
        raise NotXml(f"is not the {encoding} text that it says it is: {_short(str(error))}") from error


def _short(message: str | None) -> str:
    return " ".join((message or "unknown fault").split())[:200]
