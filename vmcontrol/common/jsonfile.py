"""Small JSON files read back: bounded, without waiting, and each value of the type that is expected.

A file may be damaged, written by hand or by another version of us, or be no file at all: a pipe, a device, a folder or
a link in its place neither stops nor misleads the reader. Used by the wrapper and HostMain alike; owns no file, and
writes only through vmcontrol.common.atomicfile.

    parse           JSON from bytes, bounded in depth; strict where Python is lenient
    load            a file's JSON
    typed           a dataclass from JSON's object
    load_kept       what an earlier run kept for later ones, perhaps of another version (caches): never an error
    keep            the other way; leaves alone what another version keeps there
"""

from __future__ import annotations

import json
import logging
import math
import os
import stat
import types
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from vmcontrol.common.atomicfile import write_atomically

log = logging.getLogger(__name__)
T = TypeVar("T")

SIZE_LIMIT = 256 * 1024
"""Bytes. Our small files have a few hundred."""
DEPTH_LIMIT = 32
"""Lists and objects inside each other. Ours have four; to print what is much deeper ends in RecursionError."""
FORMAT = "format"
"""The field that tells the form of a file which several versions of us may meet."""


def parse(content: bytes) -> Any:
    """Raises ValueError: no JSON in UTF-8, a name twice in one object, NaN, a number beyond all bounds, too deep."""
    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(value)
    return value


def load(path: Path, limit: int = SIZE_LIMIT) -> Any:
    """What is in a file, opened without following a link in its place and without waiting.

    Raises FileNotFoundError, other OSErrors, and ValueError for what is no JSON file of at most `limit` bytes.
    """
    return parse(read_file(path, limit))


def read_file(path: Path, limit: int = SIZE_LIMIT) -> bytes:
    """The bytes of a regular file that may be anything else by now. Raises OSError; ValueError for what is none, or
    more than `limit` bytes."""
    if path.is_symlink():  # where the system has no O_NOFOLLOW; and the words are better
        raise ValueError("it is a link")
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    if path.is_dir():
        raise ValueError("it is a folder")  # Windows would call it a lack of rights
    fd = os.open(path, flags)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("it is no file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return content


def typed(kind: type[T], value: object, **readers: Callable[[Any], object]) -> T:
    """A dataclass `kind` from an object of JSON. readers: for fields that are no text, number, truth value or None.

    Fields that `kind` does not have (another version's) are ignored. Raises ValueError for wrong types and for missing
    fields, as a reader does.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r:.80} is no object")  # noqa: TRY004 (what is wrong is JSON's value)
    hints = get_type_hints(kind)
    found: dict[str, object] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in value:
            item = value[field.name]
            if field.name in readers:
                try:
                    item = readers[field.name](item)
                except ValueError as error:
                    raise ValueError(f"{field.name}: {error}") from error
            elif not _is_of(item, hints[field.name]):
                raise ValueError(f"{field.name}: {item!r:.80} is no {field.type}")
            found[field.name] = item
    try:
        return kind(**found)
    except TypeError as error:
        raise ValueError(str(error)) from error  # one is missing


def typed_all(kind: type[T], values: object) -> tuple[T, ...]:
    """A list of such objects."""
    if not isinstance(values, list):
        raise ValueError(f"{values!r:.80} is no list")  # noqa: TRY004
    return tuple(typed(kind, value) for value in values)


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
    except (OSError, ValueError) as error:
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
    except ValueError:
        return False


def _format_of(value: object) -> int:
    """Raises ValueError."""
    found = value.get(FORMAT, 1) if isinstance(value, Mapping) else None
    if type(found) is not int:
        raise ValueError("it tells no format")
    return found


def _words(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.40} is beyond all bounds")
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
    raise ValueError("it is nested too deeply")


def _is_of(item: object, hint: Any) -> bool:
    if get_origin(hint) is types.UnionType:
        return any(_is_of(item, one) for one in get_args(hint))
    if hint is int:
        return isinstance(item, int) and not isinstance(item, bool)  # True is an int in Python
    if hint is float:
        return isinstance(item, int | float) and not isinstance(item, bool)
    return isinstance(item, hint)
