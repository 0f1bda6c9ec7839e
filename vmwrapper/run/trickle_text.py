"""What a guest says in a trickle message, so that nobody takes it for anything else. Pure.

The client puts the text of trickle_up.xml as it stands into its request to the server (client/cs_trickle.cpp), whose
scheduler reads that part line by line: `</msg_from_host>` ends the message wherever it stands, `<variety>` chooses who
handles it (sched/sched_types.cpp, MSG_FROM_HOST_DESC::parse). The client itself adds result_name and time.

So text goes through unchanged when it has no `<`, or when it is a piece of well-formed XML with other elements than
those: that is what trickle handlers are written for. All other text is escaped as XML text: it stays readable, and
opens no element.
"""

from __future__ import annotations

import re

TEXT_LIMIT = 256 * 1024
"""Bytes of a message. BOINC's server stores less; a program that says more has made a mistake."""
VARIETY_LIMIT = 255
"""Bytes; the server's column has 254."""
RESERVED = frozenset(("variety", "msg_from_host", "result_name", "time", "scheduler_request", "scheduler_reply"))
"""Elements that client and server take for their own around a message, in any case of letters."""

DEPTH_LIMIT = 32
"""Elements inside each other; parsers on a server are often recursive."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]")


def harmless(content: bytes) -> str:
    """The text of a message from what a guest has written."""
    text = _CONTROL.sub("\ufffd", content.decode("utf-8", "replace"))
    return text if "<" not in text or _is_plain_xml(text) else escaped(text)


def escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def variety(name: str) -> str:
    """The variety of messages from a file of this name: one line without markup."""
    line = escaped(" ".join(_CONTROL.sub(" ", name).split()))
    return line.encode("utf-8", "replace")[:VARIETY_LIMIT].decode("utf-8", "ignore")


def _is_plain_xml(text: str) -> bool:
    """Elements, text and references to characters; no comments, declarations or instructions, which hide tags."""
    if "<!" in text or "<?" in text:
        return False
    from xml.parsers import expat  # late: few jobs have such messages

    names: set[str] = set()
    depth = deepest = 0

    def begins(name: str, _attributes: object) -> None:
        nonlocal depth, deepest
        names.add(name.rpartition(":")[2].casefold())
        depth += 1
        deepest = max(deepest, depth)

    def ends(_name: str) -> None:
        nonlocal depth
        depth -= 1

    parser = expat.ParserCreate("utf-8")
    parser.StartElementHandler, parser.EndElementHandler = begins, ends
    try:
        parser.Parse(f"<text>{text}</text>".encode(), True)
    except expat.ExpatError:
        return False
    return deepest <= DEPTH_LIMIT and not names & RESERVED
