"""Reads the children of one element as typed values and collects what is wrong with them.

Knows XML and BOINC's ways of writing values (lib/parse.cpp), and nothing of what a job is. Never raises for what stands
in a job file: a complaint is noted, and the default is given instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from lxml import etree

from vmwrapper.job.model import Complaint
from vmwrapper.job.xmltext import EMPTY_ELEMENT_MARK

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_C_INTEGER = re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|[0-9]+)")

HINTS = 20
"""Warnings after which names are no longer compared with those they may have been meant for: that takes time."""

Check = Callable[[str], str | None]
"""Judges a value: None, or what was expected."""


@dataclass(slots=True)
class Complaints:
    """What is wrong with a job file: errors, which forbid to run it, and warnings."""

    source: str
    errors: list[Complaint] = field(default_factory=list)
    warnings: list[Complaint] = field(default_factory=list)

    def error(self, line: int | None, element: str, text: str) -> None:
        self.errors.append(Complaint(self.source, line, element, text))

    def warn(self, line: int | None, element: str, text: str) -> None:
        self.warnings.append(Complaint(self.source, line, element, text))


@dataclass(frozen=True, slots=True)
class Value:
    """The text of one element, stripped, and where it stands."""

    text: str
    line: int
    is_empty_tag: bool = False
    """It was written `<x/>`."""


class Fields:
    """The children of an element. Ask for each by name, then call `complain_about_others`."""

    def __init__(self, element: etree._Element, complaints: Complaints) -> None:
        self.line = line_of(element)
        self.name = _tag_of(element)
        self._complaints = complaints
        self._asked: set[str] = set()
        self._children: dict[str, list[etree._Element]] = {}
        for attribute in element.attrib:
            if attribute != EMPTY_ELEMENT_MARK:
                complaints.warn(self.line, self.name, f"has the unknown attribute {str(attribute)!r}, which is ignored")
        self._complain_about_text(element)
        for child in element:
            self._children.setdefault(_tag_of(child), []).append(child)

    @property
    def complaints(self) -> Complaints:
        """Where complaints about this element and its children go."""
        return self._complaints

    def has(self, name: str) -> bool:
        """Whether there is a child of that name that is not empty."""
        return any(_text_of(child) or len(child) for child in self._children.get(name, []))

    def line_of(self, name: str) -> int:
        """Line of the last child of that name, else of this element."""
        children = self._children.get(name)
        return line_of(children[-1]) if children else self.line

    def elements(self, name: str) -> list[etree._Element]:
        """Children that have children of their own."""
        self._asked.add(name)
        return self._children.get(name, [])

    def values(self, name: str, check: Check | None = None) -> list[Value]:
        """All children of that name that are not empty and pass the check."""
        self._asked.add(name)
        return [value for value in self._leaves(name) if value.text and self._passes(name, value, check)]

    def texts(self, name: str, check: Check | None = None) -> tuple[str, ...]:
        """The texts of all children of that name that are not empty and pass the check, each once."""
        return tuple(dict.fromkeys(value.text for value in self.values(name, check)))

    def value(self, name: str, check: Check | None = None) -> Value | None:
        """The child of that name; None when there is none or it is empty. Of several the last counts, as in BOINC."""
        last = self._last(name)
        return last if last and last.text and self._passes(name, last, check) else None

    def text(self, name: str, check: Check | None = None) -> str:
        """The text of the child of that name; "" when there is none."""
        value = self.value(name, check)
        return value.text if value else ""

    def required(self, name: str, expected: str, check: Check | None = None) -> str:
        """As `text`, and an error when there is none. expected: what should have been there."""
        last = self._last(name)
        if last is None or not last.text:
            self.error(name, last.line if last else None, f"expected {expected}")
            return ""
        return last.text if self._passes(name, last, check) else ""

    def boolean(self, name: str) -> bool | None:
        """`<x/>` or an integer that is not 0 (XML_PARSER::parse_bool); None when there is none or it is empty."""
        last = self._last(name)
        if last is None or not (last.text or last.is_empty_tag):
            return None
        if last.text and not _C_INTEGER.fullmatch(last.text):
            self.error(name, last.line, f"expected <{name}/>, 1 or 0, not {_shown(last.text)}")
            return None
        return not last.text or bool(last.text.lstrip("+-").lower().removeprefix("0x").strip("0"))

    def number(
        self, name: str, *, unit: str, above: float = -math.inf, minimum: float = -math.inf, maximum: float
    ) -> float | None:
        """A decimal number within the bounds; None when there is none."""
        value = self.value(name)
        if value is None:
            return None
        if _NUMBER.fullmatch(value.text):
            number = float(value.text)
            if number > above and minimum <= number <= maximum:
                return number
        low = f"above {above:g}" if above > -math.inf else f"from {minimum:g}"
        self.error(name, value.line, f"expected {unit} {low} up to {maximum:g}, not {_shown(value.text)}")
        return None

    def integer(self, name: str, *, unit: str, minimum: int, maximum: int) -> int | None:
        """A whole number within the bounds (512.0 is one); None when there is none."""
        value = self.value(name)
        if value is None:
            return None
        if _NUMBER.fullmatch(value.text):
            number = float(value.text)
            if minimum <= number <= maximum and number == int(number):
                return int(number)
        self.error(name, value.line, f"expected {unit} from {minimum} to {maximum}, not {_shown(value.text)}")
        return None

    def choice(self, name: str, choices: Collection[str]) -> str | None:
        """One of the words, in any case; None when there is none."""
        value = self.value(name)
        if value is None:
            return None
        if value.text.lower() in choices:
            return value.text.lower()
        self.error(name, value.line, f"expected one of {', '.join(choices)}, not {_shown(value.text)}")
        return None

    def error(self, name: str, line: int | None, text: str) -> None:
        """Complain about a child; without a line, that of this element."""
        self._complaints.error(line if line is not None else self.line, name, text)

    def warn(self, name: str, line: int, text: str) -> None:
        self._complaints.warn(line, name, text)

    def complain_about_others(self, known_elsewhere: Collection[str] = ()) -> None:
        """Warn of every child that nobody asked for.

        known_elsewhere: names that are right in another place, so that they are told from misspelt ones.
        """
        for name, children in self._children.items():
            if name in self._asked:
                continue
            for child in children:
                if name in known_elsewhere:
                    if _text_of(child) or len(child):
                        self.warn(name, line_of(child), f"has no meaning here in <{self.name}> and is ignored")
                    continue
                few = len(self._complaints.warnings) < HINTS
                hint = _hint(name, (*self._asked, *known_elsewhere)) if few else ""
                self.warn(name, line_of(child), f"is no known element of <{self.name}> and is ignored{hint}")

    def _last(self, name: str) -> Value | None:
        self._asked.add(name)
        leaves = list(self._leaves(name))
        if len(leaves) > 1:
            self.warn(name, leaves[-1].line, f"stands {len(leaves)} times in <{self.name}>; the last counts")
        return leaves[-1] if leaves else None

    def _leaves(self, name: str) -> Iterator[Value]:
        for child in self._children.get(name, []):
            if len(child):
                self.error(name, line_of(child), f"expected text, not the element <{_tag_of(child[0])}>")
                continue
            is_empty_tag = False
            for attribute in child.attrib:
                if attribute == EMPTY_ELEMENT_MARK:
                    is_empty_tag = True
                else:
                    self.warn(name, line_of(child), f"has the unknown attribute {str(attribute)!r}, which is ignored")
            yield Value(_text_of(child), line_of(child), is_empty_tag)

    def _passes(self, name: str, value: Value, check: Check | None) -> bool:
        fault = check(value.text) if check else None
        if fault:
            self.error(name, value.line, fault)
        return fault is None

    def _complain_about_text(self, element: etree._Element) -> None:
        for text, near in ((element.text, element), *((child.tail, child) for child in element)):
            if text and text.strip():
                shown = " ".join(text.split())[:40]
                self._complaints.warn(
                    line_of(near), self.name, f"has the text {shown!r} between elements; it is ignored"
                )


def line_of(element: etree._Element) -> int:
    """Line of the element's start tag, from 1."""
    return int(element.sourceline or 1)


def _tag_of(element: etree._Element) -> str:
    return str(element.tag)


def _text_of(element: etree._Element) -> str:
    return (element.text or "").strip()


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _hint(name: str, known: Collection[str]) -> str:
    """Names differ by a slip of the finger, or by case only."""
    import difflib  # for the misspelt alone

    by_case = {candidate.casefold(): candidate for candidate in known}
    close = difflib.get_close_matches(name.casefold()[:100], by_case, n=1, cutoff=0.8)
    return f" (did you mean <{by_case[close[0]]}>?)" if close else ""
