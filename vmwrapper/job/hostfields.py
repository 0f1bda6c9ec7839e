"""The elements of BOINC's wrapper: tasks on the host, archives. Read as that program reads them.

Where it ignores a value, the value is ignored here with a warning, and the one before it, or the default, counts. What
it cannot have meant to do with a value (a weight of `nan`, a time limit below 0, which ends a task at once) is not done
either. Facts: samples/wrapper/wrapper.cpp (TASK::parse, parse_zip_output), lib/parse.cpp, lib/proc_control.cpp.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vmwrapper import cvalues
from vmwrapper.job import macros, names
from vmwrapper.job.complaints import Complaints
from vmwrapper.job.elements import Element, How, Leaf
from vmwrapper.job.model import HostOptions, Priority, Task, ZipOutput
from vmwrapper.job.patterns import BadPattern, compile_pattern
from vmwrapper.job.reader import complain_of_misplaced, complain_of_unknown, shown

MAX_SECONDS = 1e9
"""Thirty years: longer than any task."""
MAX_WEIGHT = 1e300
"""Sums of a million such weights are still numbers."""

PROGRAM = frozenset(("application", "command_line", "stdin_filename", "stdout_filename", "stderr_filename", "setenv"))
TASK_ONLY = frozenset(("weight", "checkpoint_filename", "fraction_done_filename", "time_limit"))
HOST_BOOLEANS = frozenset(("daemon", "append_cmdline_args", "multi_process", "forward_slashes"))
HOST_ONLY = HOST_BOOLEANS | {"exec_dir", "priority"}
"""Elements that only a task on the host has."""
HOST_TASK = PROGRAM | TASK_ONLY | HOST_ONLY

_NAMES = HOST_TASK - HOST_BOOLEANS - {"setenv", "weight", "time_limit", "priority", "command_line"}
_PLAIN = _NAMES | {"command_line"}
_GOOD = re.compile("[ -~]{1,255}")
"""Names of which nothing is to be said, as nearly all are."""
_TEXT = How.TEXT
_IGNORED = "it is ignored, as by BOINC's wrapper"


def read_task(element: Element, complaints: Complaints) -> tuple[Task, bool]:
    """A task on the host, and whether it is a daemon. Of an element that stands several times the last value counts."""
    values: dict[str, Any] = {}
    setenv: list[str] = []
    for leaf in element.leaves:
        name, _, text, how = leaf
        if name in _PLAIN and how is _TEXT and name not in values and _GOOD.fullmatch(text):
            values[name] = text
        elif name == "setenv":
            _add_variable(setenv, leaf, complaints)
        elif (reader := _READERS.get(name)) is not None:
            value = reader(leaf, complaints)
            if value is None:
                continue
            if name in values:
                complaints.warn(leaf.line, name, f"stands more than once in <{element.name}>; the last counts")
            values[name] = value
        elif leaf.text:
            complain_of_misplaced(complaints, element.name, name, leaf.line)
    for other in element.elements:
        complain_of_misplaced(complaints, element.name, other.name, other.line)
    for unknown in element.unknown:
        complain_of_unknown(complaints, element.name, unknown.name, unknown.line, HOST_TASK)
    return _task(element, values, tuple(setenv), complaints)


def _task(
    element: Element, values: dict[str, Any], setenv: tuple[str, ...], complaints: Complaints
) -> tuple[Task, bool]:
    application, command_line = values.pop("application", ""), values.get("command_line", "")
    if not application:
        complaints.error(element.line, "application", "expected the name of a program")
    if macros.RESOLVE in command_line:
        _check_resolve(element, command_line, complaints)
    is_daemon = values.pop("daemon", False)
    given = HOST_ONLY.intersection(values)
    host = _host_options(**{name: values.pop(name) for name in given}) if given else _DEFAULT
    limit = values.pop("time_limit", 0.0)
    task = Task(application, element.line, setenv=setenv, time_limit_s=limit or None, host=host, **values)
    return task, is_daemon


_DEFAULT = HostOptions()
_host_options = functools.lru_cache(maxsize=100)(HostOptions)
"""One object for all tasks that say the same."""


def ignored(complaints: Complaints, leaf: Leaf, expected: str) -> None:
    complaints.warn(leaf.line, leaf.name, f"{expected}; {_IGNORED}")


def check_name(complaints: Complaints, leaf: Leaf) -> None:
    """A name that is hardly one is a warning: nobody but the program on the host uses it."""
    if fault := names.fault_of_any_name(leaf.text):
        complaints.warn(leaf.line, leaf.name, f"{fault}, not {shown(leaf.text)}")


def _check_resolve(element: Element, command_line: str, complaints: Complaints) -> None:
    try:
        macros.resolve(command_line, lambda name: name)
    except macros.OpenMacro as error:
        line = [leaf.line for leaf in element.leaves if leaf.name == "command_line"][-1]
        complaints.error(line, "command_line", f"expected {error}".replace("without", "with its"))


def _add_variable(setenv: list[str], leaf: Leaf, complaints: Complaints) -> None:
    """As it stands: one without `=` is no variable, but the environment is replaced all the same."""
    if leaf.how is How.BROKEN:
        ignored(complaints, leaf, leaf.text)
        return
    name, equals, _ = leaf.text.partition("=")
    if not name or not equals:
        complaints.warn(leaf.line, leaf.name, f"expected NAME=VALUE, not {shown(leaf.text)}; it sets no variable")
    setenv.append(leaf.text)


def read_boolean(leaf: Leaf, complaints: Complaints) -> bool | None:
    """`<x/>`, or an integer that is not 0; None when it is ignored."""
    if leaf.how is How.EMPTY_TAG:
        return True
    if leaf.how is How.BROKEN:
        ignored(complaints, leaf, leaf.text)
    elif leaf.how is How.TEXT:
        value = cvalues.boolean(_raw(leaf))
        if value is None:
            ignored(complaints, leaf, f"expected <{leaf.name}/>, 1 or 0, not {shown(leaf.text)}")
        return value
    return None


def _read_number(leaf: Leaf, complaints: Complaints, expected: str) -> float | None:
    """As strtod takes it; `<x></x>` is 0, `<x/>` is ignored."""
    if leaf.how is How.EMPTY:
        complaints.warn(leaf.line, leaf.name, "is empty, which counts as 0")
        return 0.0
    value = cvalues.double(_raw(leaf)) if leaf.how is How.TEXT else None
    if value is None or math.isnan(value):
        ignored(complaints, leaf, leaf.text if leaf.how is How.BROKEN else f"{expected}, not {shown(leaf.text)}")
        return None
    return value


def _read_weight(leaf: Leaf, complaints: Complaints) -> float | None:
    expected = "expected a number from 0"
    value = _read_number(leaf, complaints, expected)
    if value is None or 0 <= value <= MAX_WEIGHT:
        return value
    ignored(complaints, leaf, f"{expected} up to {MAX_WEIGHT:g}, not {shown(leaf.text)}")
    return None


def _read_time_limit(leaf: Leaf, complaints: Complaints) -> float | None:
    expected = "expected seconds from 0"
    value = _read_number(leaf, complaints, expected)
    if value is None or 0 <= value <= MAX_SECONDS:
        return value
    text = f"{expected} up to {MAX_SECONDS:g}, not {shown(leaf.text)}; there is no limit"
    complaints.warn(leaf.line, leaf.name, text)
    return 0.0


def _read_priority(leaf: Leaf, complaints: Complaints) -> Priority | None:
    """Any integer; one that is no priority is as 0."""
    if leaf.how is How.EMPTY:
        complaints.warn(leaf.line, leaf.name, "is empty, which counts as 0")
        return Priority.UNSPECIFIED
    expected = f"expected a whole number from 0 to {int(Priority.HIGHEST)}"
    value = cvalues.integer(_raw(leaf)) if leaf.how is How.TEXT else None
    if value is None:
        ignored(complaints, leaf, leaf.text if leaf.how is How.BROKEN else f"{expected}, not {shown(leaf.text)}")
        return None
    if Priority.UNSPECIFIED <= value <= Priority.HIGHEST:
        return Priority(value)
    complaints.warn(
        leaf.line, leaf.name, f"{expected}, not {shown(leaf.text)}; it counts as 0, as with BOINC's wrapper"
    )
    return Priority.UNSPECIFIED


def _read_text(leaf: Leaf, complaints: Complaints) -> str | None:
    if leaf.how is How.BROKEN:
        ignored(complaints, leaf, leaf.text)
        return None
    return leaf.text


def _read_name(leaf: Leaf, complaints: Complaints) -> str | None:
    text = _read_text(leaf, complaints)
    if text:
        check_name(complaints, leaf)
    return text


_READERS: dict[str, Callable[[Leaf, Complaints], Any]] = {
    **dict.fromkeys(_NAMES, _read_name),
    "command_line": _read_text,
    "weight": _read_weight,
    "time_limit": _read_time_limit,
    "priority": _read_priority,
    **dict.fromkeys(HOST_BOOLEANS, read_boolean),
}


NUMBERS: Mapping[str, Callable[[bytes], object]] = {
    "weight": cvalues.double,
    "time_limit": cvalues.double,
    "priority": cvalues.integer,
    **dict.fromkeys(HOST_BOOLEANS, cvalues.boolean),
}
"""What BOINC's parser asks before it reads their end tags."""


def _raw(leaf: Leaf) -> bytes:
    return leaf.text.encode("utf-8", "surrogateescape")


# --- archives


def read_unzip_inputs(elements: Iterable[Element], complaints: Complaints) -> tuple[str, ...]:
    found: list[str] = []
    for element in elements:
        before = len(found)
        for leaf in element.leaves:
            if leaf.how is How.BROKEN:
                ignored(complaints, leaf, leaf.text)
            elif leaf.text:
                check_name(complaints, leaf)
                found.append(leaf.text)
        if len(found) == before:
            text = "expected a <zipfilename>, the name of an archive; nothing is unpacked"
            complaints.warn(element.line, element.name, text)
        _complain_about_others(element, complaints, ("zipfilename",))
    return tuple(dict.fromkeys(found))


def read_zip_output(elements: Iterable[Element], complaints: Complaints) -> ZipOutput | None:
    """Of several elements: the last zipfilename, and all patterns. A pattern that is none is passed over alone."""
    zipfilename = ""
    patterns: list[str] = []
    for element in elements:
        for leaf in element.leaves:
            if leaf.how is How.BROKEN:
                ignored(complaints, leaf, leaf.text)
            elif leaf.name == "zipfilename":
                check_name(complaints, leaf)
                zipfilename = leaf.text
            else:
                _add_pattern(patterns, leaf, complaints)
        if not any(leaf.name == "filename" for leaf in element.leaves):
            complaints.warn(element.line, element.name, "has no <filename>: nothing of it will be in the archive")
        _complain_about_others(element, complaints, ("zipfilename", "filename"))
        if not zipfilename:
            text = "expected the name of the archive; without it none is made"
            complaints.warn(element.line, "zipfilename", text)
    return ZipOutput(zipfilename, tuple(dict.fromkeys(patterns))) if zipfilename else None


def _add_pattern(patterns: list[str], leaf: Leaf, complaints: Complaints) -> None:
    if not leaf.text:
        complaints.warn(leaf.line, leaf.name, "is empty, which every name matches")
    try:
        compile_pattern(leaf.text)
    except BadPattern as error:
        ignored(complaints, leaf, f"expected a regular expression, not {leaf.text[:100]!r}: {error}")
    else:
        patterns.append(leaf.text)


def _complain_about_others(element: Element, complaints: Complaints, known: tuple[str, ...]) -> None:
    for unknown in element.unknown:
        complain_of_unknown(complaints, element.name, unknown.name, unknown.line, known)
