"""Reads the children of one element as typed values, strictly, and collects what is wrong with them.

For the elements that are our own; what BOINC's wrapper knows is read as it reads it (`vmwrapper.job.hostfields`). Knows
nothing of what a job is. Never raises for what stands in a job file: a complaint is noted, and the default is given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from vmwrapper.job.complaints import Complaints
from vmwrapper.job.elements import Element, How, Leaf

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_C_INTEGER = re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|[0-9]+)")

HINTS = 20
"""Warnings after which names are no longer compared with those they may have been meant for: that takes time."""

Check = Callable[[str], str | None]
"""Judges a value: None, or what was expected."""


@dataclass(frozen=True, slots=True)
class Value:
    """The text of one element, stripped, and where it stands."""

    text: str
    line: int
    is_empty_tag: bool = False
    """It was written `<x/>`."""


class Fields:
    """The children of an element. Ask for each by name, then call `complain_about_others`."""

    def __init__(self, element: Element, complaints: Complaints) -> None:
        self.line = element.line
        self.name = element.name
        self._complaints = complaints
        self._asked: set[str] = set()
        self._element = element
        self._children: dict[str, list[Leaf]] = {}
        for leaf in element.leaves:
            self._children.setdefault(leaf.name, []).append(leaf)

    @property
    def complaints(self) -> Complaints:
        """Where complaints about this element and its children go."""
        return self._complaints

    def has(self, name: str) -> bool:
        """Whether there is a child of that name that is not empty."""
        return any(leaf.text for leaf in self._children.get(name, []))

    def line_of(self, name: str) -> int:
        """Line of the last child of that name, else of this element."""
        children = self._children.get(name)
        return children[-1].line if children else self.line

    def elements(self, name: str) -> list[Element]:
        """Children that have children of their own."""
        self._asked.add(name)
        return [element for element in self._element.elements if element.name == name]

    def leaves(self, name: str) -> list[Leaf]:
        """Children of that name, as they stand."""
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
            self.error(name, last.line, f"expected <{name}/>, 1 or 0, not {shown(last.text)}")
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
        self.error(name, value.line, f"expected {unit} {low} up to {maximum:g}, not {shown(value.text)}")
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
        self.error(name, value.line, f"expected {unit} from {minimum} to {maximum}, not {shown(value.text)}")
        return None

    def choice(self, name: str, choices: Collection[str]) -> str | None:
        """One of the words, in any case; None when there is none."""
        value = self.value(name)
        if value is None:
            return None
        if value.text.lower() in choices:
            return value.text.lower()
        self.error(name, value.line, f"expected one of {', '.join(choices)}, not {shown(value.text)}")
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
        for leaf in self._element.leaves:
            if leaf.name not in self._asked and leaf.text:
                complain_of_misplaced(self._complaints, self.name, leaf.name, leaf.line)
        for element in self._element.elements:
            if element.name not in self._asked:
                complain_of_misplaced(self._complaints, self.name, element.name, element.line)
        for name, line in self._element.unknown:
            complain_of_unknown(self._complaints, self.name, name, line, (*self._asked, *known_elsewhere))

    def _last(self, name: str) -> Value | None:
        self._asked.add(name)
        leaves = list(self._leaves(name))
        if len(leaves) > 1:
            self.warn(name, leaves[-1].line, f"stands {len(leaves)} times in <{self.name}>; the last counts")
        return leaves[-1] if leaves else None

    def _leaves(self, name: str) -> Iterator[Value]:
        for leaf in self._children.get(name, []):
            if leaf.how is How.BROKEN:
                self.error(name, leaf.line, leaf.text)
            else:
                yield Value(leaf.text, leaf.line, leaf.how is How.EMPTY_TAG)

    def _passes(self, name: str, value: Value, check: Check | None) -> bool:
        fault = check(value.text) if check else None
        if fault:
            self.error(name, value.line, fault)
        return fault is None


def complain_of_misplaced(complaints: Complaints, where: str, name: str, line: int) -> None:
    complaints.warn(line, name, f"has no meaning here in <{where}> and is ignored")


def complain_of_unknown(complaints: Complaints, where: str, name: str, line: int, known: Collection[str]) -> None:
    """known: names that may have been meant."""
    hint = _hint(name, known) if len(complaints.warnings) < HINTS else ""
    complaints.warn(line, name, f"is no known element of <{where}> and is ignored{hint}")


def shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _hint(name: str, known: Collection[str]) -> str:
    """Names differ by a slip of the finger, or by case only."""
    import difflib  # for the misspelt alone

    by_case = {candidate.casefold(): candidate for candidate in known}
    close = difflib.get_close_matches(name.casefold()[:100], by_case, n=1, cutoff=0.8)
    return f" (did you mean <{by_case[close[0]]}>?)" if close else ""
