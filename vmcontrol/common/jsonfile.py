"""Small JSON files read back: bounded, without waiting, and each value of the type that is expected.

A file may be damaged, edited, written by another version of us, or be no file at all: a pipe, a device, a folder or a
link in its place neither stops nor misleads the reader. Used by all three programs; owns no file, and writes only
through vmcontrol.common.atomicfile.

    parse           JSON from bytes, bounded in depth; strict where Python is lenient
    load            a file's JSON
    typed           a value of a type, bounds included, from JSON's: a dataclass from an object, say
    load_kept       what an earlier run kept for later ones, perhaps of another version (caches): never an error
    keep            the other way; leaves alone what another version keeps there
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import re
import stat
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, cast, get_args, get_origin, get_type_hints

from vmcontrol.common.atomicfile import write_atomically

log = logging.getLogger(__name__)
T = TypeVar("T")

SIZE_LIMIT = 256 * 1024
"""Bytes. Our small files have a few hundred."""
DEPTH_LIMIT = 32
"""Lists and objects inside each other. Ours have four; to print what is much deeper ends in RecursionError."""
FORMAT = "format"
"""The field that tells the form of a file which several versions of us may meet."""


class Damaged(ValueError):  # noqa: N818 (named for what was found)
    """It is not what is expected; `str` says what is wrong, and where."""


def parse(content: bytes, *, finite: bool = True) -> Any:
    """Raises Damaged: no JSON in UTF-8, a name twice in one object, too deep; with `finite` also NaN and numbers beyond
    all bounds."""
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_refuse if finite else None,
            parse_float=_finite if finite else None,
        )
    except RecursionError:
        raise Damaged("it is nested too deeply") from None
    except ValueError as error:
        raise Damaged(str(error)) from error
    _check_depth(value)
    return value


def load(path: Path, limit: int = SIZE_LIMIT) -> Any:
    """What is in a file, opened without following a link in its place and without waiting.

    Raises FileNotFoundError, other OSErrors, and Damaged for what is no JSON file of at most `limit` bytes.
    """
    return parse(read_file(path, limit))


def read_file(path: Path, limit: int = SIZE_LIMIT) -> bytes:
    """The bytes of a regular file that may be anything else by now. Raises OSError; Damaged for what is none, or
    more than `limit` bytes."""
    if path.is_symlink():  # where the system has no O_NOFOLLOW; and the words are better
        raise Damaged("it is a link")
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    if path.is_dir():
        raise Damaged("it is a folder")  # Windows would call it a lack of rights
    fd = os.open(path, flags)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Damaged("it is no file")
        content = file.read(min(status.st_size, limit) + 1)  # so much memory is asked for at once
    if len(content) > limit:
        raise Damaged(f"it has more than {limit} bytes")
    return content


@dataclass(frozen=True, slots=True)
class Must:
    """In Annotated: what a value of that type has to be as well."""

    be: str
    """As the end of "it is not ..."."""
    hold: Callable[[Any], object]


def between(least: int, most: float) -> Must:
    """A number in these bounds, both included."""
    return Must(f"from {least} to {most}", lambda number: least <= number <= most)


Count = Annotated[int, between(0, 10**9)]
Name = Annotated[str, Must("a name", bool)]
Sha256 = Annotated[str, Must("a SHA-256", re.compile("[0-9a-f]{64}").fullmatch)]


def typed(kind: type[T], value: object, where: str = "", *, exact: bool = False) -> T:
    """A value of type `kind` from JSON's: dataclasses from objects, tuples from lists, enumerations by their values.

    where: named in errors. exact: every field of a dataclass is there, and no other one; else fields with a default may
    be missing, and fields that `kind` does not have (another version's) are ignored. Raises Damaged.
    """
    return cast("T", _read(kind, value, where, exact=exact))


def _read(hint: Any, value: object, where: str, *, exact: bool) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        found = _read(arguments[0], value, where, exact=exact)
        for must in arguments[1:]:
            if not must.hold(found):
                raise _not(where, value, must.be)
        return found
    if origin is types.UnionType:
        return _read_union(arguments, value, where, exact=exact)
    if origin is tuple:
        return _read_tuple(arguments, value, where, exact=exact)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise _not(where, value, "an object")
        return {name: _read(arguments[1], item, f"{where}[{name!r:.40}]", exact=exact) for name, item in value.items()}
    if is_dataclass(hint):
        return _read_object(hint, value, where, exact=exact)
    return _read_plain(hint, value, where)


_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _read_plain(hint: Any, value: object, where: str) -> object:
    if hint is Any:
        return value
    try:
        if issubclass(hint, Enum):
            return hint(value)
        if hint is float and type(value) is int:
            return float(value)
    except (ValueError, OverflowError):
        raise _not(where, value, _WORDS.get(hint, f"a {hint.__name__}")) from None
    if type(value) is not hint:  # True is an int in Python, and none here
        raise _not(where, value, _WORDS.get(hint, f"a {hint.__name__}"))
    return value


def _read_union(kinds: Sequence[Any], value: object, where: str, *, exact: bool) -> object:
    if value is None and types.NoneType in kinds:
        return None
    *others, last = [kind for kind in kinds if kind is not types.NoneType]
    for kind in others:
        with contextlib.suppress(Damaged):
            return _read(kind, value, where, exact=exact)
    return _read(last, value, where, exact=exact)


def _read_tuple(kinds: Sequence[Any], value: object, where: str, *, exact: bool) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _not(where, value, "a list")
    if kinds[-1] is ...:
        kinds = [kinds[0]] * len(value)
    elif len(value) != len(kinds):
        raise _not(where, value, f"a list of {len(kinds)}")
    items = enumerate(zip(kinds, value, strict=True))
    return tuple(_read(kind, item, f"{where}[{index}]", exact=exact) for index, (kind, item) in items)


def _read_object(kind: Any, value: object, where: str, *, exact: bool) -> object:
    if not isinstance(value, dict):
        raise _not(where, value, "an object")
    hints = _hints(kind)
    if exact and (unknown := value.keys() - hints.keys()):
        raise Damaged(f"{where or 'it'} has an unknown {min(unknown)!r:.80}")
    found = {}
    for field in fields(kind):
        name = f"{where}.{field.name}" if where else field.name
        if field.name in value:
            found[field.name] = _read(hints[field.name], value[field.name], name, exact=exact)
        elif exact or (field.default is MISSING and field.default_factory is MISSING):
            raise Damaged(f"{name} is missing")
    return kind(**found)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _not(where: str, value: object, what: str) -> Damaged:
    return Damaged(f"{where or 'it'} is {str(value)[:80]!r} and not {what}")


def load_kept(path: Path, kind: type[T], format: int) -> T | None:
    """What an earlier run kept in `path`; None where there is nothing that can be used, with a line that says why.

    format: of `kind`; a file that does not tell one is of format 1. One of another format is another version's, and is
    passed by without a word.
    """
    try:
        value = load(path)
        if _format_of(value) != format:
            log.debug("%s is of another format and is left alone", path)
            return None
        return typed(kind, value)
    except FileNotFoundError:
        return None
    except (OSError, Damaged) as error:
        log.warning("%s cannot be used (%s): going on without it", path, _words(error))
        return None


def keep(path: Path, values: Mapping[str, object], format: int) -> None:
    """Keep values for `load_kept`, readable for this account alone. Raises nothing: later runs do without.

    What another version keeps there, and what is no file, stays. A file that is damaged is replaced.
    """
    try:
        if _is_in_the_way(path, format):
            return
        write_atomically(path, json.dumps({FORMAT: format, **values}).encode(), mode=0o600)
    except OSError as error:
        log.info("%s is not written: %s", path, _words(error))


def _is_in_the_way(path: Path, format: int) -> bool:
    """Whether something is there that is not ours to replace. Raises OSError."""
    if not os.path.lexists(path):
        return False
    if path.is_symlink() or not path.is_file():
        return True
    try:
        return _format_of(load(path)) != format
    except Damaged:
        return False


def _format_of(value: object) -> int:
    """Raises Damaged."""
    found = value.get(FORMAT, 1) if isinstance(value, Mapping) else None
    if type(found) is not int:
        raise Damaged("it tells no format")
    return found


def _words(error: OSError | Damaged) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Damaged("a name stands twice in one object")
    return found


def _refuse(word: str) -> NoReturn:
    raise Damaged(f"{word} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise Damaged(f"{text:.40} is beyond all bounds")
    return number


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(DEPTH_LIMIT):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise Damaged("it is nested too deeply")
