"""Lines of a log that can be believed: what a guest or a file name contains cannot begin a line of ours. Pure."""

from __future__ import annotations

import re

LINE_LIMIT = 2000
"""Characters of one line; stderr.txt goes back to the project, which keeps its last 64 KiB."""
LINES_LIMIT = 60
"""Lines of one record beside the first."""
_CONTINUED = "    "
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters, other ends of lines than newline, marks that turn the direction of writing."""


def readable(text: str) -> str:
    """A record as it stands in a log: unprintable characters escaped, lines cut, all but the first one indented."""
    first, *others = text.split("\n")
    if len(others) > LINES_LIMIT:  # of a traceback both ends tell something
        half = LINES_LIMIT // 2
        others = [*others[:half], f"[{len(others) - 2 * half} lines]", *others[-half:]]
    first, *others = (_UNPRINTABLE.sub(_escaped, line[: LINE_LIMIT + 1]) for line in (first, *others))
    return "\n".join([first[:LINE_LIMIT], *(_CONTINUED + line[:LINE_LIMIT] for line in others)])


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
