"""What XML-RPC callers send, checked and read. Pure. Nothing is evaluated: Python literals are read as literals.

BadArgument     what a caller sent is not what the method takes
BadMessage      a literal that is none
"""

from __future__ import annotations

from collections.abc import Mapping

from vmcontrol.protocol import messages


class BadArgument(Exception):  # noqa: N818
    """What a caller sent is not what the method takes."""


def text(value: object, what: str, limit: int = 4096) -> str:
    """A string without NUL. Raises BadArgument."""
    if not isinstance(value, str) or len(value) > limit or "\0" in value:
        raise BadArgument(f"{what}: expected a text of at most {limit} characters, got {value!r:.80}")
    return value


def seconds(value: object, what: str, most: float = 86400.0) -> float:
    """A number of seconds from 0 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise BadArgument(f"{what}: expected seconds from 0 to {most:g}, got {value!r:.80}")
    return float(value)


def whole(value: object, what: str, most: int) -> int:
    """A whole number from 0 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise BadArgument(f"{what}: expected a whole number from 0 to {most}, got {value!r:.80}")
    return value


def optional(value: object, what: str) -> str | None:
    """A text, or None given as nil, as an empty text or, as in the original, as the text None."""
    return None if value in (None, "", "None") else text(value, what)


def literal_or(value: object, kinds: type | tuple[type, ...], opening: str) -> object:
    """Python literals in strings, as callers of the original send them; anything else as it came."""
    if isinstance(value, str) and value.strip()[:1] and value.strip()[0] in opening:
        read = messages.literal(value)
        if isinstance(read, kinds):
            return read
    return value


def argument_list(value: object) -> tuple[str, ...]:
    """args: a list of texts (protocol 1: of one text with everything in it, kept as it is), a text, or a literal."""
    value = literal_or(value, (list, tuple), "[(")
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple) or any(isinstance(one, list | tuple | dict) for one in value):
        raise BadArgument("args: expected a list of texts")
    return tuple(text(one if isinstance(one, str) else str(one), "args", messages.LITERAL_LIMIT) for one in value)


def environment(value: object) -> dict[str, str]:
    """env: a struct of texts, or in the original a literal such as '{}'."""
    value = literal_or(value, dict, "{")
    if value is None or value in ("", "None"):
        return {}
    if not isinstance(value, Mapping):
        raise BadArgument("env: expected a struct of texts")
    return {text(k, "env"): text(str(v), f"env {k}", messages.LITERAL_LIMIT) for k, v in value.items()}


def working_folder(value: object) -> str | None:
    """path: None, the text 'None', a text, or in the original a literal of a text ("'/usr'")."""
    value = literal_or(value, str, "'\"")
    return optional(value, "path")
