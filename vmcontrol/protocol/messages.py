"""The messages between HostMain and the agent (VMMain) over STOMP. Pure: text in, typed messages out, no sockets.

The messages of protocol 1 (HELLO, BYE, STILL_ALIVE, PING, PONG, CMD_RUN, CMD_RESULT) keep the destinations, headers and
bodies of 2009; the first word of the body names the message. Those of protocol 2 (CMD_STATE, CMD_QUERY, CMD_LIST,
CMD_TABLE, CMD_CANCEL, CMD_FORGET, CMD_FORGOTTEN) are dropped by agents of protocol 1, as every name that they do not
know. docs/reference/messages.md has the table.

Nothing that is received is evaluated: Python literals of protocol 1 are read as literals, bounded in length and depth,
and everything else is JSON.

    BadMessage      what arrived is no message of the protocol; `str` says why (the peer's error)
    |-- TooLarge    reading it would cost too much memory
    ValueError      a message that we wanted to send cannot be sent (our error)
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vmcontrol.protocol.command import CommandStatus, status_from_json, status_to_json
from vmcontrol.protocol.container import ContainerRun
from vmcontrol.protocol.text import (
    MOST_INT32,
    SMALL_BODY,
    BadMessage,
    Rest,
    TooLarge,
    as_json,
    check_cost,
    finite_number,
    literal,
    text_field,
    unfit_for_header,
    whole_field,
)

PROTOCOL = 2
"""1: the messages of 2009. 2: commands are acknowledged, asked about, cancelled and forgotten."""

CONNECTIONS = "/topic/connections"
REQUESTS = "/topic/cmd_requests"
RESPONSES = "/topic/cmd_responses"

TABLE_LIMIT = 2000
"""Commands of a table; an agent knows 1000 (guest.commands)."""
PATTERN_LIMIT = 1024
"""Characters of a `to`."""


@dataclass(frozen=True, slots=True)
class StompMessage:
    """A message as STOMP carries it."""

    destination: str
    headers: Mapping[str, str]
    body: str


@dataclass(frozen=True, slots=True)
class Hello:
    """A guest is there. `id`: MAC, upper case with colons. protocol 1: an agent of protocol 1."""

    id: str
    ip: str
    protocol: int = 1
    agent: str = ""


@dataclass(frozen=True, slots=True)
class StillAlive:
    """The beacon; from an unknown guest it registers it as HELLO does."""

    id: str
    ip: str
    protocol: int = 1
    agent: str = ""


@dataclass(frozen=True, slots=True)
class Bye:
    """The agent goes."""

    id: str
    ip: str


@dataclass(frozen=True, slots=True)
class Ping:
    """`timestamp`: whole milliseconds as text; ActiveMQ 5.17 drops the connection on a fraction."""

    to: str
    timestamp: str


@dataclass(frozen=True, slots=True)
class Pong:
    """`timestamp`: the one of the ping."""

    sender: str
    timestamp: str


@dataclass(frozen=True, slots=True)
class CommandRun:
    """Run a program in the guest. Repeating it is harmless: the same id and attempt is started once."""

    to: str
    """fnmatch pattern over guest ids."""
    id: str
    command: str
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to the agent's own."""
    folder: str | None = None
    """Working folder; None: the agent's."""
    stdin: str = ""
    """File in the guest that becomes the standard input; empty: none."""
    attempt: int = 1
    inline_output: bool = True
    """The result carries out and err (protocol 1); else they stay files in the guest."""
    fraction_done_file: str = ""
    """File in the guest whose last number is the fraction done."""
    legacy: bool = False
    """From a HostMain of protocol 1: it never acknowledges a result, so the agent sends it once and forgets it."""
    container: ContainerRun | None = None
    """Where it runs; None: in the guest itself."""


@dataclass(frozen=True, slots=True)
class CommandResult:
    """How a command ended, repeated until it is forgotten. Keys of `body`: docs/reference/messages.md."""

    id: str
    sender: str
    """Guest id; empty from an agent of protocol 1."""
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CommandQuery:
    to: str
    id: str


@dataclass(frozen=True, slots=True)
class CommandCancel:
    """TERM to the whole tree, KILL after `grace_s`. The command then ends with a result like any other."""

    to: str
    id: str
    grace_s: float = 5.0


@dataclass(frozen=True, slots=True)
class CommandForget:
    """The result is safe with the host: the agent may drop it. Acknowledged by CMD_FORGOTTEN."""

    to: str
    id: str


@dataclass(frozen=True, slots=True)
class CommandForgotten:
    sender: str
    id: str


@dataclass(frozen=True, slots=True)
class CommandList:
    """Ask for everything the agent knows. `token` comes back in the answer."""

    to: str
    token: str


@dataclass(frozen=True, slots=True)
class CommandTable:
    sender: str
    token: str
    commands: tuple[CommandStatus, ...]


Message = (
    Hello
    | StillAlive
    | Bye
    | Ping
    | Pong
    | CommandRun
    | CommandResult
    | CommandStatus
    | CommandQuery
    | CommandCancel
    | CommandForget
    | CommandForgotten
    | CommandList
    | CommandTable
)


def addressed_to(pattern: str, guest_id: str) -> bool:
    """Whether a `to` header means this guest (fnmatch; ids are compared in upper case)."""
    return len(pattern) <= PATTERN_LIMIT and fnmatch.fnmatchcase(guest_id.upper(), pattern.upper())


def encode(message: Message) -> StompMessage:
    """The STOMP form of a message. Raises ValueError for what cannot be sent."""
    encoded = _encode(message)
    for name, value in encoded.headers.items():
        if unfit_for_header(value):
            raise ValueError(f"the header {name} cannot be {value[:80]!r}")
    if len(encoded.body) > SMALL_BODY:
        try:
            check_cost(encoded.body, 0)
        except BadMessage as error:
            raise ValueError(f"nobody would read it: {error}") from error
    return encoded


def _encode(message: Message) -> StompMessage:  # noqa: C901, PLR0911, PLR0912 (one table, one case a word)
    match message:
        case Hello(id, ip, protocol, agent) | StillAlive(id, ip, protocol, agent):
            name = "HELLO" if isinstance(message, Hello) else "STILL_ALIVE"
            return StompMessage(CONNECTIONS, {"id": id, "ip": ip, "protocol": str(protocol), "agent": agent}, name)
        case Bye(id, ip):
            return StompMessage(CONNECTIONS, {"id": id, "ip": ip}, "BYE")
        case Ping(to, timestamp):
            if not (timestamp.isascii() and timestamp.isdigit()):
                raise ValueError(f"the timestamp of a PING is whole milliseconds, not {timestamp!r}")
            return StompMessage(REQUESTS, {"to": to, "timestamp": timestamp}, "PING")
        case Pong(sender, timestamp):
            return StompMessage(RESPONSES, {"from": sender, "timestamp": timestamp}, "PONG")
        case CommandRun():
            return _encode_run(message)
        case CommandResult(id, sender, body):
            return StompMessage(RESPONSES, {"cmd-id": id, "from": sender}, f"CMD_RESULT {as_json(dict(body))}")
        case CommandStatus(id, sender):
            return StompMessage(
                RESPONSES, {"cmd-id": id, "from": sender}, f"CMD_STATE {as_json(status_to_json(message))}"
            )
        case CommandQuery(to, id):
            return StompMessage(REQUESTS, {"to": to, "cmd-id": id}, "CMD_QUERY")
        case CommandCancel(to, id, grace_s):
            return StompMessage(REQUESTS, {"to": to, "cmd-id": id, "grace": repr(float(grace_s))}, "CMD_CANCEL")
        case CommandForget(to, id):
            return StompMessage(REQUESTS, {"to": to, "cmd-id": id}, "CMD_FORGET")
        case CommandForgotten(sender, id):
            return StompMessage(RESPONSES, {"from": sender, "cmd-id": id}, "CMD_FORGOTTEN")
        case CommandList(to, token):
            return StompMessage(REQUESTS, {"to": to, "token": token}, "CMD_LIST")
        case CommandTable(sender, token, commands):
            rows = [{"cmd-id": c.id, **status_to_json(c)} for c in commands]
            return StompMessage(RESPONSES, {"from": sender, "token": token}, f"CMD_TABLE {as_json(rows)}")


def decode(headers: Mapping[str, str], body: str, *, by_hostmain: bool = False) -> Message:
    """The message in a STOMP frame. Raises BadMessage for anything that is none of ours.

    by_hostmain: messages for guests are not read, as reading a CMD_RUN of protocol 1 can cost 32 MB, and small messages
    of guests have the bounds of large ones, as they may be many.
    """
    first = _FIRST_WORD.match(body)
    reader = _READERS.get(first[1]) if first else None
    if first is None or reader is None:
        raise BadMessage(f"unknown word {body[:40]!r}")
    word = first[1]
    if by_hostmain and word in _FOR_GUESTS:
        raise BadMessage(f"{word} is not for a host")
    for name in _GIVEN_BACK:
        if name in headers and unfit_for_header(headers[name]):
            raise BadMessage(f"{word}: the header {name} cannot be {headers[name][:80]!r}")
    try:
        return reader(headers, Rest(body, first.end(), 0 if by_hostmain else SMALL_BODY))
    except KeyError as error:
        raise BadMessage(f"{word} without {error.args[0]!r}") from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise BadMessage(f"{word}: {error}") from error


_GIVEN_BACK = ("id", "from", "cmd-id", "token", "timestamp")
"""Headers that stand in an answer: what cannot be sent back is not taken, or it would be repeated in vain for ever."""
_FIRST_WORD = re.compile(r"\s*([A-Z_]{1,40})(?:\s+|$)")


def _encode_run(run: CommandRun) -> StompMessage:
    texts = (run.command, *run.arguments, *run.environment, *run.environment.values(), run.folder or "", run.stdin)
    if any("\0" in text for text in texts):
        raise ValueError(f"command {run.id}: a NUL character cannot be part of a command, argument or environment")
    old = {
        "cmd": run.command,
        "args": repr(list(run.arguments)),
        "env": repr(dict(run.environment)),
        "path": repr(run.folder),
        "fileForStdin": run.stdin,
    }
    # What does not fit a header is left out there: agents of protocol 1 cannot have it, ours reads the body.
    headers = {name: text for name, text in old.items() if run.legacy or not unfit_for_header(text)}
    if run.legacy:
        if run.container is not None:
            raise ValueError(f"command {run.id}: an agent of protocol 1 has no containers")
        return StompMessage(REQUESTS, {"to": run.to, "cmd-id": run.id, **headers}, "CMD_RUN")
    text = as_json(
        {
            "cmd": run.command,
            "args": list(run.arguments),
            "env": dict(run.environment),
            "path": run.folder,
            "stdin": run.stdin,
            "attempt": run.attempt,
            "inline-output": run.inline_output,
            "fraction-done-file": run.fraction_done_file,
            **({} if run.container is None else {"container": run.container.to_json()}),
        }
    )
    return StompMessage(REQUESTS, {"to": run.to, "cmd-id": run.id, **headers}, f"CMD_RUN {text}")


def _read_run(headers: Mapping[str, str], rest: Rest) -> CommandRun:
    extra = rest.object() if rest else {}
    arguments = extra["args"] if "args" in extra else literal(headers.get("args") or "()")
    environment = extra["env"] if "env" in extra else literal(headers.get("env") or "{}")
    folder = extra["path"] if "path" in extra else literal(headers.get("path") or "None")
    if isinstance(arguments, str):
        arguments = [arguments]
    if not isinstance(arguments, list | tuple) or not all(isinstance(a, str) for a in arguments):
        raise BadMessage("CMD_RUN: args is not a list of strings")
    environment = {} if environment is None else environment
    if not isinstance(environment, dict) or not all(isinstance(t, str) for t in (*environment, *environment.values())):
        raise BadMessage("CMD_RUN: env is not a dict of strings")
    if folder is not None and not isinstance(folder, str):
        raise BadMessage("CMD_RUN: path is neither None nor a string")
    command = text_field(extra, "cmd") if "cmd" in extra else headers["cmd"]
    stdin = text_field(extra, "stdin") if "stdin" in extra else headers.get("fileForStdin", "")
    if any("\0" in text for text in (command, *arguments, *environment, *environment.values(), folder or "", stdin)):
        raise BadMessage("CMD_RUN: a NUL character in the command, an argument or the environment")
    inline = extra.get("inline-output", True)
    if not isinstance(inline, bool):
        raise BadMessage("CMD_RUN: inline-output is neither true nor false")
    return CommandRun(
        to=headers["to"],
        id=headers["cmd-id"],
        command=command,
        arguments=tuple(arguments),
        environment=environment,
        folder=folder,
        stdin=stdin,
        attempt=whole_field(extra, "attempt", 1, MOST_INT32),
        inline_output=inline,
        fraction_done_file=text_field(extra, "fraction-done-file"),
        legacy=not extra,
        container=ContainerRun.from_json(extra["container"]) if "container" in extra else None,
    )


def _read_result(headers: Mapping[str, str], rest: Rest) -> CommandResult:
    """Of a result that is too large the end is kept: an agent of protocol 1 says it only once. Ours send none."""
    id, sender = headers["cmd-id"], headers.get("from", "").upper()
    try:
        return CommandResult(id, sender, rest.object())
    except TooLarge as error:
        text = f"[the command has ended; its result is not known, it was too large: {error}]\n"
        old = {"cmd-id": id, "out": "", "err": text, "finished": False, "exitCodeOrSignal": -1, "resources": {}}
        return CommandResult(id, sender, old)


def _read_table(headers: Mapping[str, str], rest: Rest) -> CommandTable:
    rows = rest.json()
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "cmd-id" in row for row in rows):
        raise BadMessage("CMD_TABLE: the body is no JSON list of objects with a cmd-id")
    if len(rows) > TABLE_LIMIT:
        raise BadMessage(f"CMD_TABLE: {len(rows)} commands; {TABLE_LIMIT} are read")
    if any(unfit_for_header(text_field(row, "cmd-id")) for row in rows):
        raise BadMessage("CMD_TABLE: a cmd-id that cannot be a header")
    sender = headers["from"].upper()
    commands = tuple(status_from_json(text_field(row, "cmd-id"), sender, row) for row in rows)
    return CommandTable(sender, headers["token"], commands)


def _read_cancel(headers: Mapping[str, str], _: Rest) -> CommandCancel:
    grace_s = finite_number(headers.get("grace") or 5.0, "grace")
    if not 0 <= grace_s <= 86400:
        raise BadMessage("CMD_CANCEL: grace is not between 0 and 86400 s")
    return CommandCancel(headers["to"], headers["cmd-id"], grace_s)


def _read_connection(kind: type[Hello] | type[StillAlive], headers: Mapping[str, str]) -> Hello | StillAlive:
    text = headers.get("protocol") or "1"
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise BadMessage(f"protocol is no whole number: {text[:40]!r}")
    protocol = int(text)
    return kind(headers["id"].upper(), headers.get("ip", ""), protocol, headers.get("agent", ""))


_READERS: Mapping[str, Callable[[Mapping[str, str], Rest], Message]] = {
    "HELLO": lambda headers, _: _read_connection(Hello, headers),
    "STILL_ALIVE": lambda headers, _: _read_connection(StillAlive, headers),
    "BYE": lambda headers, _: Bye(headers["id"].upper(), headers.get("ip", "")),
    "PING": lambda headers, _: Ping(headers["to"], headers["timestamp"]),
    "PONG": lambda headers, _: Pong(headers["from"].upper(), headers["timestamp"]),
    "CMD_RUN": _read_run,
    "CMD_RESULT": _read_result,
    "CMD_STATE": lambda headers, rest: status_from_json(headers["cmd-id"], headers["from"].upper(), rest.object()),
    "CMD_QUERY": lambda headers, _: CommandQuery(headers["to"], headers["cmd-id"]),
    "CMD_CANCEL": _read_cancel,
    "CMD_FORGET": lambda headers, _: CommandForget(headers["to"], headers["cmd-id"]),
    "CMD_FORGOTTEN": lambda headers, _: CommandForgotten(headers["from"].upper(), headers["cmd-id"]),
    "CMD_LIST": lambda headers, _: CommandList(headers["to"], headers["token"]),
    "CMD_TABLE": _read_table,
}
_FOR_GUESTS = frozenset({"PING", "CMD_RUN", "CMD_QUERY", "CMD_CANCEL", "CMD_FORGET", "CMD_LIST"})
