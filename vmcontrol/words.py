"""The words that HostMain and VMMain say to each other over STOMP. Pure: text in, typed messages out, no sockets.

The words of 2009 (HELLO, BYE, STILL_ALIVE, PING, PONG, CMD_RUN, CMD_RESULT) keep their destinations, headers and
bodies; the first word of the body names the message. Ours beside them (CMD_STATE, CMD_QUERY, CMD_LIST, CMD_TABLE,
CMD_CANCEL, CMD_FORGET, CMD_FORGOTTEN) are dropped by agents of 2009, as they drop every word they do not know.
docs/words.md has the table.

Nothing that is received is evaluated: Python literals of 2009 are read as literals, bounded in length and depth, and
everything else is JSON.

    BadWord         what arrived is no message of ours; `str` says why (the peer's fault)
    ValueError      a message that we wanted to send cannot be sent (our fault)
"""

from __future__ import annotations

import ast
import fnmatch
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

PROTOCOL = 2
"""1: 2009. 2: commands are acknowledged, asked about, cancelled and forgotten."""

CONNECTIONS = "/topic/connections"
REQUESTS = "/topic/cmd_requests"
RESPONSES = "/topic/cmd_responses"

LITERAL_LIMIT = 128 * 1024
"""Characters of a Python literal that is read; an argument list of that size is what one execve takes on Linux."""
LITERAL_DEPTH = 16
HEADER_LIMIT = 8 * 1024
"""Characters of args and env that still go as headers: ActiveMQ refuses headers of more than 10 KiB."""


class BadWord(Exception):  # noqa: N818 (named for what arrived)
    """What arrived is no message of ours."""


@dataclass(frozen=True, slots=True)
class Words:
    """A message as STOMP carries it."""

    destination: str
    headers: Mapping[str, str]
    body: str


class CommandState(StrEnum):
    """What an agent knows of a command."""

    UNKNOWN = "unknown"
    RUNNING = "running"
    FINISHED = "finished"
    """Its result is kept until it is forgotten."""
    REFUSED = "refused"
    """A lower attempt than the one that the agent has seen, or nonsense; `detail` says what."""
    LOST = "lost"
    """Started before the guest was booted anew, and its end was never seen (link of 2009 only)."""


@dataclass(frozen=True, slots=True)
class Hello:
    """A guest is there. `id`: MAC, upper case with colons. protocol 1: an agent of 2009."""

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
    """The result carries out and err (2009); else they stay files in the guest."""
    fraction_done_file: str = ""
    """File in the guest whose last number is the fraction done."""
    legacy: bool = False
    """From a host of 2009: it never acknowledges a result, so the agent sends it once and forgets it."""


@dataclass(frozen=True, slots=True)
class CommandResult:
    """How a command ended, repeated until it is forgotten. Keys of `body`: docs/words.md."""

    id: str
    sender: str
    """Guest id; empty from an agent of 2009."""
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CommandStatus:
    """CMD_STATE: the answer to CMD_RUN, CMD_QUERY and CMD_CANCEL, and sent by itself when something changes."""

    id: str
    sender: str
    state: CommandState
    attempt: int = 0
    pid: int | None = None
    fraction_done: float | None = None
    cpu_time_s: float = 0.0
    """Of the command's whole process tree, ended children included."""
    memory_bytes: int = 0
    detail: str = ""


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
    return fnmatch.fnmatchcase(guest_id.upper(), pattern.upper())


def literal(text: str) -> Any:
    """Read a Python literal of 2009 without evaluating anything. Raises BadWord."""
    if len(text) > LITERAL_LIMIT:
        raise BadWord(f"a literal of {len(text)} characters; {LITERAL_LIMIT} are read")
    depth = deepest = 0
    for character in text:  # brackets inside strings count too: that only makes the bound stricter
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    if deepest > LITERAL_DEPTH:
        raise BadWord(f"a literal nested {deepest} deep; {LITERAL_DEPTH} are read")
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise BadWord(f"not a Python literal: {text[:80]!r}") from error


def encode(message: Message) -> Words:  # noqa: C901, PLR0911, PLR0912 (one table, one case a word)
    """The STOMP form of a message."""
    match message:
        case Hello(id, ip, protocol, agent) | StillAlive(id, ip, protocol, agent):
            word = "HELLO" if isinstance(message, Hello) else "STILL_ALIVE"
            return Words(CONNECTIONS, {"id": id, "ip": ip, "protocol": str(protocol), "agent": agent}, word)
        case Bye(id, ip):
            return Words(CONNECTIONS, {"id": id, "ip": ip}, "BYE")
        case Ping(to, timestamp):
            return Words(REQUESTS, {"to": to, "timestamp": timestamp}, "PING")
        case Pong(sender, timestamp):
            return Words(RESPONSES, {"from": sender, "timestamp": timestamp}, "PONG")
        case CommandRun():
            return _encode_run(message)
        case CommandResult(id, sender, body):
            return Words(RESPONSES, {"cmd-id": id, "from": sender}, f"CMD_RESULT {json.dumps(dict(body))}")
        case CommandStatus(id, sender):
            text = json.dumps(_status_to_json(message))
            return Words(RESPONSES, {"cmd-id": id, "from": sender}, f"CMD_STATE {text}")
        case CommandQuery(to, id):
            return Words(REQUESTS, {"to": to, "cmd-id": id}, "CMD_QUERY")
        case CommandCancel(to, id, grace_s):
            return Words(REQUESTS, {"to": to, "cmd-id": id, "grace": f"{grace_s:g}"}, "CMD_CANCEL")
        case CommandForget(to, id):
            return Words(REQUESTS, {"to": to, "cmd-id": id}, "CMD_FORGET")
        case CommandForgotten(sender, id):
            return Words(RESPONSES, {"from": sender, "cmd-id": id}, "CMD_FORGOTTEN")
        case CommandList(to, token):
            return Words(REQUESTS, {"to": to, "token": token}, "CMD_LIST")
        case CommandTable(sender, token, commands):
            text = json.dumps([{"cmd-id": c.id, **_status_to_json(c)} for c in commands])
            return Words(RESPONSES, {"from": sender, "token": token}, f"CMD_TABLE {text}")


def decode(headers: Mapping[str, str], body: str) -> Message:
    """The message in a STOMP frame. Raises BadWord for anything that is none of ours."""
    word, _, rest = body.strip().partition(" ")
    reader = _READERS.get(word)
    if reader is None:
        raise BadWord(f"unknown word {word[:40]!r}")
    try:
        return reader(headers, rest)
    except KeyError as error:
        raise BadWord(f"{word} without the header {error.args[0]!r}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise BadWord(f"{word}: {error}") from error


def _encode_run(run: CommandRun) -> Words:
    if "\0" in run.command or any(
        "\0" in text for text in (*run.arguments, *run.environment, *run.environment.values())
    ):
        raise ValueError(f"command {run.id}: a NUL character cannot be part of a command, argument or environment")
    headers = {"to": run.to, "cmd-id": run.id, "cmd": run.command}
    arguments, environment = repr(list(run.arguments)), repr(dict(run.environment))
    if len(arguments) + len(environment) <= HEADER_LIMIT:
        headers |= {"args": arguments, "env": environment}
    headers |= {"path": repr(run.folder), "fileForStdin": run.stdin}
    if run.legacy:
        return Words(REQUESTS, headers, "CMD_RUN")
    text = json.dumps(
        {
            "args": list(run.arguments),
            "env": dict(run.environment),
            "path": run.folder,
            "attempt": run.attempt,
            "inline-output": run.inline_output,
            "fraction-done-file": run.fraction_done_file,
        }
    )
    return Words(REQUESTS, headers, f"CMD_RUN {text}")


def _read_run(headers: Mapping[str, str], rest: str) -> CommandRun:
    extra = _object(rest) if rest.strip() else {}
    arguments = extra["args"] if "args" in extra else literal(headers.get("args") or "()")
    environment = extra["env"] if "env" in extra else literal(headers.get("env") or "{}")
    folder = extra["path"] if "path" in extra else literal(headers.get("path") or "None")
    if isinstance(arguments, str):
        arguments = [arguments]
    if not isinstance(arguments, list | tuple) or not all(isinstance(a, str) for a in arguments):
        raise BadWord("CMD_RUN: args is not a list of strings")
    environment = {} if environment is None else environment
    if not isinstance(environment, dict) or not all(isinstance(t, str) for t in (*environment, *environment.values())):
        raise BadWord("CMD_RUN: env is not a dict of strings")
    if folder is not None and not isinstance(folder, str):
        raise BadWord("CMD_RUN: path is neither None nor a string")
    return CommandRun(
        to=headers["to"],
        id=headers["cmd-id"],
        command=headers["cmd"],
        arguments=tuple(arguments),
        environment=environment,
        folder=folder,
        stdin=headers.get("fileForStdin", ""),
        attempt=int(extra.get("attempt", 1)),
        inline_output=bool(extra.get("inline-output", True)),
        fraction_done_file=str(extra.get("fraction-done-file", "")),
        legacy="attempt" not in extra,
    )


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise BadWord("the body is no JSON object")
    return value


def _status_to_json(status: CommandStatus) -> dict[str, Any]:
    return {
        "state": status.state.value,
        "attempt": status.attempt,
        "pid": status.pid,
        "fraction-done": status.fraction_done,
        "cpu-time": status.cpu_time_s,
        "memory": status.memory_bytes,
        "detail": status.detail,
    }


def _status_from_json(id: str, sender: str, value: Mapping[str, Any]) -> CommandStatus:
    pid, fraction = value.get("pid"), value.get("fraction-done")
    return CommandStatus(
        id=id,
        sender=sender,
        state=CommandState(value["state"]),
        attempt=int(value.get("attempt", 0)),
        pid=None if pid is None else int(pid),
        fraction_done=None if fraction is None else float(fraction),
        cpu_time_s=float(value.get("cpu-time", 0.0)),
        memory_bytes=int(value.get("memory", 0)),
        detail=str(value.get("detail", "")),
    )


def _read_table(headers: Mapping[str, str], rest: str) -> CommandTable:
    rows = json.loads(rest)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadWord("CMD_TABLE: the body is no JSON list of objects")
    sender = headers["from"]
    commands = tuple(_status_from_json(str(row["cmd-id"]), sender, row) for row in rows)
    return CommandTable(sender, headers["token"], commands)


def _read_connection(kind: type[Hello] | type[StillAlive], headers: Mapping[str, str]) -> Hello | StillAlive:
    protocol = int(headers.get("protocol") or 1)
    return kind(headers["id"].upper(), headers.get("ip", ""), protocol, headers.get("agent", ""))


_READERS: Mapping[str, Callable[[Mapping[str, str], str], Message]] = {
    "HELLO": lambda headers, _: _read_connection(Hello, headers),
    "STILL_ALIVE": lambda headers, _: _read_connection(StillAlive, headers),
    "BYE": lambda headers, _: Bye(headers["id"].upper(), headers.get("ip", "")),
    "PING": lambda headers, _: Ping(headers["to"], headers["timestamp"]),
    "PONG": lambda headers, _: Pong(headers["from"].upper(), headers["timestamp"]),
    "CMD_RUN": _read_run,
    "CMD_RESULT": lambda headers, rest: CommandResult(
        headers["cmd-id"], headers.get("from", "").upper(), _object(rest)
    ),
    "CMD_STATE": lambda headers, rest: _status_from_json(headers["cmd-id"], headers["from"].upper(), _object(rest)),
    "CMD_QUERY": lambda headers, _: CommandQuery(headers["to"], headers["cmd-id"]),
    "CMD_CANCEL": lambda headers, _: CommandCancel(
        headers["to"], headers["cmd-id"], float(headers.get("grace") or 5.0)
    ),
    "CMD_FORGET": lambda headers, _: CommandForget(headers["to"], headers["cmd-id"]),
    "CMD_FORGOTTEN": lambda headers, _: CommandForgotten(headers["from"].upper(), headers["cmd-id"]),
    "CMD_LIST": lambda headers, _: CommandList(headers["to"], headers["token"]),
    "CMD_TABLE": _read_table,
}
