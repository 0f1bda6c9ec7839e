"""What a driver remembers of a VM, read back from JSON: each field of the type that the dataclass says. Pure.

A file may be damaged, written by hand or by another version of us: nothing of it may go further with a wrong type.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def read(kind: type[T], value: object, **readers: Callable[[Any], object]) -> T:
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


def read_all(kind: type[T], values: object) -> tuple[T, ...]:
    """A list of such objects."""
    if not isinstance(values, list):
        raise ValueError(f"{values!r:.80} is no list")  # noqa: TRY004
    return tuple(read(kind, value) for value in values)


def _is_of(item: object, hint: Any) -> bool:
    if get_origin(hint) is types.UnionType:
        return any(_is_of(item, one) for one in get_args(hint))
    if hint is int:
        return isinstance(item, int) and not isinstance(item, bool)  # True is an int in Python
    return isinstance(item, hint)
