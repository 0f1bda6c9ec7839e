"""What is fuzzed: functions that take any bytes and must come back. Whatever they raise is a defect.

    frames     the STOMP codec of the embedded broker, in pieces as they may arrive
    words      a frame's headers and body, read as HostMain and VMMain read them, then what both do with the message
    literals   Python literals of 2009
    xmlrpc     the body of an XML-RPC call, its arguments as the methods check them, and the answer

More of them: tests/fuzz/files.py, tests/fuzz/peers.py. TARGETS has all, `seeds` good input of each kind, MODULES what
each is to cover. No sockets, no processes: nothing is run that a fuzzer made up. The programs:
tests/integration/vmcontrol/api/test_hostile_input.py, and for thousands of inputs to one process
tests/integration/vmcontrol/hostmain/test_attacks.py.
"""

from __future__ import annotations

import contextlib
import xmlrpc.client
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock

from guest.commands.table import Effect, Send, SendResult, Table
from tests.fuzz import files, peers
from tests.support.conversations import no_outputs
from vmcontrol.api import arguments, server
from vmcontrol.api.arguments import BadArgument
from vmcontrol.broker.frames import HEART_BEAT, BadFrame, CannotEncode, Frame, FrameDecoder, Version, encode
from vmcontrol.guests.commands import Commands
from vmcontrol.guests.registry import Guests
from vmcontrol.protocol import messages
from vmcontrol.protocol.command import CommandState, CommandStatus
from vmcontrol.protocol.messages import Message
from vmcontrol.protocol.text import BadMessage, literal

GUEST = "52:54:00:12:34:56"


def frames(data: bytes) -> None:
    """First byte: how long the pieces are, and the version."""
    if not data:
        return
    size, version = data[0] % 61 + 1, list(Version)[data[0] % 3]
    decoder = FrameDecoder(version=version)
    with contextlib.suppress(BadFrame):
        for at in range(1, len(data), size):
            decoder.receive(data[at : at + size])
            while (event := decoder.next_event()) is not None:
                if isinstance(event, Frame):
                    _again(event, version)
                assert isinstance(event, Frame) or event is HEART_BEAT
        assert decoder.buffered <= len(data)


def _again(frame: Frame, version: Version) -> None:
    """What was read can be written, and is read as the same; but for what this version cannot say."""
    try:
        wire = encode(frame, version)
    except CannotEncode:
        return
    decoder = FrameDecoder(version=version)
    decoder.receive(wire)
    again = decoder.next_event()
    assert isinstance(again, Frame)
    assert (again.command, again.body) == (frame.command, frame.body), (frame, again)


class _Sides:
    """HostMain's and the agent's tables, without what carries anything out."""

    def __init__(self) -> None:
        clock: Any = Clock()
        self.clock = clock
        self.commands = Commands(clock, self._sent, no_outputs)
        self.guests = Guests(30.0)
        self.table = Table(GUEST)

    def _sent(self, message: Message) -> Deferred[None]:
        messages.encode(message)
        return succeed(None)

    def both(self, message: Message) -> None:
        now = self.clock.seconds()
        match message:
            case messages.Hello() | messages.StillAlive() | messages.Bye():
                self.guests.heard(message, now)
                self.guests.expire(now + 100)
            case messages.CommandResult() | CommandStatus() | messages.CommandForgotten() | messages.CommandTable():
                self.guests.sign_of_life(message.sender, now)
                self.commands.heard(message)
                self.commands.finished()
            case messages.Ping():
                messages.encode(messages.Pong(GUEST, message.timestamp))
            case messages.CommandRun():
                self._carry_out(self.table.run(message, now))
                self._carry_out(self.table.ended(message.id, message.attempt, {"exit_status": 0}, now))
            case messages.CommandQuery():
                self._carry_out(self.table.query(message.id, now))
            case messages.CommandCancel():
                self._carry_out(self.table.cancel(message.id, message.grace_s, now))
            case messages.CommandForget():
                self._carry_out(self.table.forget(message.id))
            case messages.CommandList():
                self._carry_out(self.table.list_all(message.token))
        self.clock.advance(1.0)
        self._carry_out(self.table.repeat(self.clock.seconds()))

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        """What the agent would say: all of it can be sent."""
        for effect in effects:
            match effect:
                case Send(message):
                    messages.encode(message)
                case SendResult(id=id, body=body):
                    messages.encode(messages.CommandResult(id, GUEST, body))


_SIDES = _Sides()
_KEPT = 2000
_seen = 0


def message(headers: Mapping[str, str], body: str) -> None:
    """A frame's content, as it comes out of STOMP."""
    global _SIDES, _seen  # noqa: PLW0603 (the programs live long: so do the tables here, within limits)
    messages.addressed_to(headers.get("to", ""), GUEST)
    try:
        read = messages.decode(headers, body)
    except BadMessage:
        return
    if not isinstance(read, messages.CommandResult):
        with contextlib.suppress(ValueError):  # `to` and `ip` may hold what cannot be sent on; nobody does
            sent = messages.encode(read)
            again = messages.decode(sent.headers, sent.body)
            assert again == read, (read, again)
    _SIDES.both(read)
    _seen += 1
    if _seen > _KEPT:
        _SIDES, _seen = _Sides(), 0


def words_(data: bytes) -> None:
    """Lines of `name:value`, an empty line, the body."""
    head, _, body = data.decode("utf-8", "surrogateescape").partition("\n\n")
    headers = dict(line.split(":", 1) for line in head.split("\n") if ":" in line)
    message(headers, body)


def literals(data: bytes) -> None:
    text = data.decode("latin-1")
    with contextlib.suppress(BadMessage):
        literal(text)
    for read in (arguments.argument_list, arguments.environment, arguments.working_folder):
        with contextlib.suppress(BadMessage, BadArgument):
            read(text)


def xmlrpc_(data: bytes) -> None:
    try:
        name, values = server.parse_call(data)
    except xmlrpc.client.Fault as fault:
        _check_fault(server.answer(fault))
        return
    assert isinstance(name, str)
    for value in values:
        _read(value)
    answered: Any = xmlrpc.client.loads(server.answer(list(values)).decode())[0][0]
    assert isinstance(answered, list)


def _check_fault(answer: bytes) -> None:
    try:
        xmlrpc.client.loads(answer.decode())
    except xmlrpc.client.Fault as seen:
        if seen.faultCode == -1:
            return
        raise
    raise AssertionError("a fault that is none")


def _read(value: object) -> None:
    for read in (
        arguments.argument_list,
        arguments.environment,
        arguments.working_folder,
        lambda one: arguments.text(one, "x"),
        lambda one: arguments.optional(one, "x"),
        lambda one: arguments.seconds(one, "x"),
        lambda one: arguments.whole(one, "x"),
        lambda one: arguments.flag(one, "x"),
        lambda one: arguments.command_id(one, "x"),
        lambda one: arguments.vm_settings(one, "x"),
        lambda one: arguments.command_request(one, "x"),
    ):
        with contextlib.suppress(BadArgument, BadMessage):
            read(value)


_OTHERS = {**files.TARGETS, **peers.TARGETS}
TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "frames": frames,
    "words": words_,
    "literals": literals,
    "xmlrpc": xmlrpc_,
    **{name: target for name, (target, _, _) in _OTHERS.items()},
}
MODULES: Mapping[str, tuple[str, ...]] = {
    "frames": ("vmcontrol.broker.frames",),
    "words": ("vmcontrol.protocol.messages", "vmcontrol.protocol.text"),
    "literals": ("vmcontrol.protocol.text",),
    "xmlrpc": ("vmcontrol.api.arguments",),
    **{name: modules for name, (_, _, modules) in _OTHERS.items()},
}


def seeds(name: str) -> list[bytes]:
    """Good input of each kind, for a fuzzer to begin with."""
    if name in _OTHERS:
        return _OTHERS[name][1]()
    run = messages.CommandRun(GUEST, "c1", "./worker.py", ("a b", "ü"), {"A": "1"}, "/tmp", "in", 2)
    status = CommandStatus("c1", GUEST, CommandState.RUNNING, 2, 4711, 0.5, 1.25, 1 << 20, "half")
    known: list[Message] = [
        messages.Hello(GUEST, "10.0.2.15", 2, "VMMain"),
        messages.StillAlive(GUEST, "10.0.2.15"),
        messages.Bye(GUEST, "10.0.2.15"),
        messages.Ping("52:54:*", "1795338340720"),
        messages.Pong(GUEST, "1795338340.72"),
        run,
        messages.CommandResult(
            "c1", GUEST, {"out": "a\n", "exit_status": 0, "attempt": 1, "resources": {"ru_utime": 1.5}}
        ),
        status,
        messages.CommandQuery(GUEST, "c1"),
        messages.CommandCancel(GUEST, "c1", 1.5),
        messages.CommandForget(GUEST, "c1"),
        messages.CommandForgotten(GUEST, "c1"),
        messages.CommandList(GUEST, "t"),
        messages.CommandTable(GUEST, "t", (status,)),
    ]
    encoded = [messages.encode(one) for one in known]
    old = {"to": GUEST, "cmd-id": "u", "cmd": "ls", "args": "['1 ']", "env": "{}", "path": "None", "fileForStdin": ""}
    match name:
        case "frames":
            wires = [
                encode(Frame("SEND", {"destination": one.destination, **one.headers}, one.body.encode()), version)
                for one in encoded
                for version in (Version.V1_1, Version.V1_2)
            ]
            wires += [b"CONNECT\nlogin:a\npasscode:b\n\n\0\n", b"SEND\ndestination: /topic/x\nid:52:54:00\n\nHELLO\0\n"]
            return [bytes([number % 256]) + wire * (1 + number % 3) for number, wire in enumerate(wires)]
        case "words":
            contents = [(one.headers, one.body) for one in encoded] + [(old, "CMD_RUN")]
            return ["\n".join([*(f"{k}:{v}" for k, v in h.items()), "", b]).encode() for h, b in contents]
        case "literals":
            return [
                b"['1 ']",
                b"('a', 'b')",
                b"{'HOME': '/'}",
                b"None",
                b"'/usr'",
                b"[[[['x']]]]",
                b"-1.5e3",
                b"{1, 2}",
            ]
        case _:
            calls: list[tuple[str, tuple[Any, ...]]] = [
                ("listAvailableVMs", ()),
                ("runCmd", ("vm", "worker.py", ["5 "], "{}", "None", "stdin_worker")),
                ("runCommand", ("vm", {"id": "c", "command": "x", "arguments": ["a"], "environment": {"A": "b"}})),
                (
                    "runCommand",
                    ("vm", {"id": "c", "command": "x", "container": {"disk": "0a" * 32, "workdir": "/app"}}),
                ),
                ("waitCommand", ("vm", "c", 3, 1.5)),
                ("defineVM", ("vm", "disk.img", {"disks": ["app.vdi", "b.vdi"]})),
                ("defineVM", ("vm", "disk.img", {"memory_mb": 512, "cpus": 2, "network_mode": "nat"})),
                (
                    "defineVM",
                    ("vm", "disk.img", {"port_forwards": [{"guest_port": 80, "host_port": 0, "remote": True}]}),
                ),
                ("x", (None, True, b"bytes", 1 << 30, "ü\n")),
            ]
            return [xmlrpc.client.dumps(values, method, allow_none=True).encode() for method, values in calls]
