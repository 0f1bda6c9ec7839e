"""What XML-RPC callers send, checked and read. Pure. Nothing is evaluated: Python literals are read as literals.

BadArgument     what a caller sent is not what the method takes
BadMessage      a literal that is none
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

from vmcontrol.protocol import vmlimits
from vmcontrol.protocol.container import ContainerRun
from vmcontrol.protocol.handshake import AGENT_PORT
from vmcontrol.protocol.messages import CommandRun
from vmcontrol.protocol.text import LITERAL_LIMIT, BadMessage, literal, unfit_for_header
from vmcontrol.protocol.vm import NETWORK_MODES, PortForward, VmSettings

NAME_LIMIT = 100
"""Characters of the name of a new VM, or of a snapshot."""
POLL_LIMIT_S = 3600.0
"""The longest time-out of a call that waits."""
INT_LIMIT = 2**31 - 1
"""XML-RPC carries no more."""


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


def whole(value: object, what: str, most: int = INT_LIMIT, least: int = 0) -> int:
    """A whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BadArgument(f"{what}: expected a whole number from {least} to {most}, got {value!r:.80}")
    return value


def flag(value: object, what: str) -> bool:
    """True or false, or 1 or 0."""
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise BadArgument(f"{what}: expected true or false, got {value!r:.80}")


def optional(value: object, what: str) -> str | None:
    """A text, or None given as nil, as an empty text or, as in the original, as the text None."""
    return None if value in (None, "", "None") else text(value, what)


def literal_or(value: object, kinds: type | tuple[type, ...], opening: str) -> object:
    """Python literals in strings, as callers of the original send them; anything else as it came."""
    if isinstance(value, str) and value.strip()[:1] and value.strip()[0] in opening:
        read = literal(value)
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
    return tuple(text(one if isinstance(one, str) else str(one), "args", LITERAL_LIMIT) for one in value)


def environment(value: object) -> dict[str, str]:
    """env: a struct of texts, or in the original a literal such as '{}'."""
    value = literal_or(value, dict, "{")
    if value is None or value in ("", "None"):
        return {}
    if not isinstance(value, Mapping):
        raise BadArgument("env: expected a struct of texts")
    return {text(k, "env"): text(str(v), f"env {k}", LITERAL_LIMIT) for k, v in value.items()}


def working_folder(value: object) -> str | None:
    """path: None, the text 'None', a text, or in the original a literal of a text ("'/usr'")."""
    value = literal_or(value, str, "'\"")
    return optional(value, "path")


def command_id(value: object, what: str) -> str:
    """The id of a command."""
    id = text(value, what, 200)
    if not id or unfit_for_header(id):
        raise BadArgument("id: expected the id of a command, without control characters and without blanks at its ends")
    return id


_SETTINGS: Mapping[str, Callable[[object, str], object]] = {
    "memory_mb": partial(whole, most=vmlimits.MEMORY_MB[-1], least=vmlimits.MEMORY_MB[0]),
    "cpus": partial(whole, most=vmlimits.MOST_CPUS, least=1),
    "os_type": partial(text, limit=100),
    "network": flag,
    "network_mode": lambda value, what: _one_of(value, what, NETWORK_MODES),
    "port_forwards": lambda value, _: _forwards(value),
    "remote_desktop": flag,
    "disks": lambda value, _: _disks(value),
}


def _one_of(value: object, what: str, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise BadArgument(f"{what}: expected one of {', '.join(choices)}, got {value!r:.80}")
    return value


def vm_settings(value: object, what: str) -> VmSettings:
    """defineVM's struct, of which everything may be left out."""
    fields = _struct(value, what, _SETTINGS, "none") if value is not None else {}
    read: dict[str, Any] = {key: _SETTINGS[key](item, key) for key, item in fields.items() if item is not None}
    return VmSettings(**read)


def _struct(value: object, what: str, known: Mapping[str, object], missing: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BadArgument(f"{what}: expected a struct")
    unknown = [key for key in value if key not in known]
    if unknown:
        raise BadArgument(f"{what}: {unknown[0]!r:.80} is {missing}; there are {', '.join(known)}")
    return value


def _forwards(value: object) -> tuple[PortForward, ...]:
    if not isinstance(value, list):
        raise BadArgument("port_forwards: expected a list of structs")
    forwards: list[PortForward] = []
    for one in value:
        if not isinstance(one, Mapping) or not set(one) <= {"guest_port", "host_port", "remote"}:
            raise BadArgument("port_forwards: expected structs of guest_port, host_port, remote")
        guest_port = whole(one.get("guest_port"), "guest_port", 65535, least=1)
        if guest_port == AGENT_PORT:
            raise BadArgument(f"port_forwards: the guest's port {AGENT_PORT} is the agent's, which has its own forward")
        if guest_port in [forward.guest_port for forward in forwards]:
            raise BadArgument(f"port_forwards: the guest's port {guest_port} is there twice")
        forwards.append(
            PortForward(
                guest_port=guest_port,
                host_port=whole(one.get("host_port") or 0, "host_port", 65535),
                remote=flag(one.get("remote") or False, "remote"),
            )
        )
    return tuple(forwards)


def _disks(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > vmlimits.MOST_DISKS:
        raise BadArgument(f"disks: expected a list of at most {vmlimits.MOST_DISKS} paths")
    paths = tuple(text(one, "disks") for one in value)
    if "" in paths:
        raise BadArgument("disks: expected the path of a disk, got an empty text")
    return paths


_REQUEST = dict.fromkeys(
    ("id", "attempt", "command", "arguments", "environment", "folder", "stdin", "fraction_done_file", "container")
)
_CONTAINER = dict.fromkeys(("disk", "workdir", "uid", "gid", "groups", "stop_signal", "network"))


def command_request(value: object, what: str) -> CommandRun:
    """runCommand's struct; `to` is still to be filled in."""
    fields = _struct(value, what, _REQUEST, "none of its keys")
    command = text(fields.get("command"), "command")
    if not command:
        raise BadArgument("command: expected the program to run")
    arguments, attempt = fields.get("arguments"), fields.get("attempt")
    if arguments is not None and not isinstance(arguments, list):
        raise BadArgument("arguments: expected a list of texts")
    return CommandRun(
        to="",
        id=command_id(fields.get("id"), "id"),
        command=command,
        arguments=argument_list(arguments),
        environment=environment(fields.get("environment")),
        folder=optional(fields.get("folder"), "folder"),
        stdin=optional(fields.get("stdin"), "stdin") or "",
        attempt=1 if attempt is None else whole(attempt, "attempt", least=1),
        inline_output=False,
        fraction_done_file=optional(fields.get("fraction_done_file"), "fraction_done_file") or "",
        container=_container(fields.get("container")),
    )


def _container(value: object) -> ContainerRun | None:
    if value is None:
        return None
    fields = _struct(value, "container", _CONTAINER, "none of its keys")
    try:
        return ContainerRun.from_json({key.replace("_", "-"): item for key, item in fields.items()})
    except BadMessage as error:
        raise BadArgument(str(error)) from error


# What stands in a method's signature: the type, and who reads it (vmcontrol.api.calls)


class VmName:
    """Marks the argument that is the name or the id of a VM: the method gets the name."""


Vm = Annotated[str, lambda value, _: text(value, "name of the VM", 256), VmName]
Text = Annotated[str, text]
ShortText = Annotated[str, partial(text, limit=NAME_LIMIT)]
OptionalText = Annotated[str | None, optional]
Flag = Annotated[bool, flag]
Timeout = Annotated[float, partial(seconds, most=POLL_LIMIT_S)]
CommandId = Annotated[str, command_id]
Whole = Annotated[int, whole]
