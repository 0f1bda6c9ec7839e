"""A job file that is no well-formed XML, read as BOINC's own parser reads it (lib/parse.h, XML_PARSER). Pure.

BOINC's wrapper takes what its parser takes, so a project may have a job file with a bare `&`, with `--` in a comment,
with attributes without quotes, with text after the end, or with a stray tag that nobody knows. Such a file is written
anew here as well-formed XML with the same meaning and the same lines. What BOINC's parser could not make sense of
either is refused: an element of ours that is not closed, a second `<` in a text, no end.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

_TOKEN = re.compile(r"<!--.*?-->|<!\[CDATA\[(?P<cdata>.*?)\]\]>|<(?P<tag>[^>]*)>|(?P<text>[^<]+)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_ENTITY = re.compile(r"&(lt|gt|quot|apos|amp|#x[dDaA]|#\d{1,3});")
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")

MAX_DEPTH = 32
"""Elements within elements; ours have three."""


class CannotRepair(Exception):  # noqa: N818
    """BOINC's parser could not read it either."""


@dataclass(slots=True)
class _Element:
    name: str
    piece: int
    """Index of its start tag among the pieces."""


def repair(text: str, known: Collection[str]) -> str:
    """Well-formed XML with the lines of `text`. known: names of elements that must be closed. Raises CannotRepair."""
    pieces: list[str] = []
    open_elements: list[_Element] = []
    for kind, content, lines in _tokens(text):
        if kind == "text":
            if not open_elements and content.strip():
                raise CannotRepair
            pieces.append(_escaped(content))
        elif kind == "cdata":
            pieces.append(_plain(content) + lines)
        elif kind == "tag":
            _take_tag(content, lines, pieces, open_elements, known)
            if not open_elements and pieces and pieces[-1].startswith("</"):
                return "".join(pieces)
        else:
            pieces.append(lines)
    raise CannotRepair


def _tokens(text: str) -> Iterator[tuple[str, str, str]]:
    """Kind, content, and the line breaks that would be lost with the markup."""
    position = 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None:
            raise CannotRepair
        position = found.end()
        if found["cdata"] is not None:
            yield "cdata", found["cdata"], ""
        elif found["tag"] is not None:
            yield "tag", found["tag"], "\n" * found["tag"].count("\n")
        elif found["text"] is not None:
            yield "text", found["text"], ""
        else:
            yield "comment", "", "\n" * found[0].count("\n")


def _take_tag(tag: str, lines: str, pieces: list[str], open_elements: list[_Element], known: Collection[str]) -> None:
    if "<" in tag or tag.startswith(("!", "?")):
        raise CannotRepair
    if tag.startswith("/"):
        name = tag[1:].strip()
        _close(name, lines, pieces, open_elements, known)
        return
    name_found = _NAME.match(tag)
    if name_found is None or not re.fullmatch(r"(\s.*|/)?", tag[name_found.end() :], re.DOTALL):
        raise CannotRepair
    name = name_found[0]
    if tag.endswith("/"):
        pieces.append(f"<{name}{lines}/>")
        return
    if len(open_elements) == MAX_DEPTH:
        raise CannotRepair
    pieces.append(f"<{name}{lines}>")
    open_elements.append(_Element(name, len(pieces) - 1))


def _close(name: str, lines: str, pieces: list[str], open_elements: list[_Element], known: Collection[str]) -> None:
    """Close an element; unknown ones inside it that were never closed vanish, and so does an unknown end tag."""
    if all(element.name != name for element in open_elements):
        if name in known:
            raise CannotRepair
        pieces.append(lines)
        return
    while open_elements[-1].name != name:
        lost = open_elements.pop()
        if lost.name in known:
            raise CannotRepair
        pieces[lost.piece] = "\n" * pieces[lost.piece].count("\n")
    open_elements.pop()
    pieces.append(f"</{name}{lines}>")


def _escaped(text: str) -> str:
    """Text with its entities as they are, and everything else that looks like one as plain characters."""
    done: list[str] = []
    position = 0
    for entity in _ENTITY.finditer(text):
        done += (_plain(text[position : entity.start()]), _kept(entity[0], entity[1]))
        position = entity.end()
    return "".join((*done, _plain(text[position:])))


def _kept(entity: str, body: str) -> str:
    if body[:1] == "#" and body[1].isdigit() and not 0 < int(body[1:]) < 256:
        return _plain(entity)
    return _plain(chr(int(body[1:]))) if body[:1] == "#" and body[1].isdigit() else entity


def _plain(text: str) -> str:
    if _ILLEGAL.search(text):
        raise CannotRepair
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
