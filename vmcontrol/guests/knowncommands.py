"""The commands that HostMain knows of, and what they may cost: bytes, for each guest and for all. Pure.

Three bounds, each of which makes room by giving up what nobody waits for:

    asked by callers         COMMAND_LIMIT in all
    kept of a guest          HELD_CHARACTERS: what it said about the commands of callers, results and outputs. What has
                             been taken goes first; what does not fit then is not kept (`has_room`)
    not asked for by anybody UNASKED_LIMIT of a guest, UNASKED_BYTES of all: left from another HostMain; the oldest go

Knows to which guests a command's id was sent: another guest's word about it counts for nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from vmcontrol.guests.command import Command, characters
from vmcontrol.guests.fetches import Key
from vmcontrol.protocol.command import CommandState, CommandStatus

UNASKED_LIMIT = 256
UNASKED_BYTES = 4 * 1024 * 1024
UNASKED_BODY_LIMIT = 64 * 1024
"""Bytes of a result that nobody asked for; ours leave the output in files and stay far below."""
TAKEN_LIMIT, TAKEN_CHARACTERS = 256, 16 * 1024 * 1024
"""Results that were taken and are still kept, so that a lost XML-RPC reply can be asked for again; their output."""
HELD_CHARACTERS = 32 * 1024 * 1024
"""Bytes of a guest's results: two of runCmd's with the largest output. That of further ones stays in the guest until
getCmdResults asks for it; a VM that is switched off before takes it along."""
COMMAND_LIMIT = 10_000
FORGOTTEN_LIMIT = 1024
"""Acknowledged commands that are remembered, so that a late copy of a result is not taken for a new one."""
ID_LIMIT = 200
OVERHEAD = 1000
"""Bytes of a command that nobody asked for, beside its texts."""
BESIDE_OUTPUTS = 1024 * 1024
"""Bytes of a guest's results and details, beside HELD_CHARACTERS of outputs."""


class KnownCommands:
    """All of them, in the order in which they were first heard of."""

    def __init__(self) -> None:
        self._commands: OrderedDict[Key, Command] = OrderedDict()
        self._unasked: OrderedDict[Key, None] = OrderedDict()
        self._unasked_of: dict[str, int] = {}
        self._unasked_bytes = 0
        self._held: dict[str, int] = {}
        self._sent: OrderedDict[str, set[str]] = OrderedDict()
        self.forgotten: OrderedDict[Key, int] = OrderedDict()
        """Highest attempt of commands whose results were acknowledged."""

    def __iter__(self) -> Iterator[Command]:
        return iter(list(self._commands.values()))

    def __contains__(self, key: Key) -> bool:
        return key in self._commands

    def get(self, key: Key) -> Command | None:
        return self._commands.get(key)

    def of_guest(self, guest: str) -> list[Command]:
        return [command for command in self._commands.values() if command.guest == guest]

    def asked_for(self, guest: str, id: str) -> Command:
        """A command that a caller wants to know about; made if it is new."""
        key = (guest, id)
        command = self._commands.get(key)
        if command is None:
            if len(self._commands) >= COMMAND_LIMIT:
                for old in self:
                    if old.state is CommandState.UNKNOWN and not old.waiting:
                        self.remove((old.guest, old.id))
            command = self._commands[key] = Command(CommandStatus(id, guest, CommandState.UNKNOWN))
            command.asked = True
        elif not command.asked:
            self._forget_unasked(key, command)
            command.asked = True
        self.changed(command)
        return command

    def spoken_of(self, guest: str, id: str) -> Command | None:
        """The command that a guest says something about, made if it is new; None when it is to be ignored."""
        key = (guest, id)
        command = self._commands.get(key)
        if command is not None:
            return command
        if len(id) > ID_LIMIT or len(guest) > ID_LIMIT or guest not in self._sent.get(id, {guest}):
            return None
        command = self._commands[key] = Command(CommandStatus(id, guest, CommandState.UNKNOWN))
        self._unasked[key] = None
        self._unasked_of[guest] = self._unasked_of.get(guest, 0) + 1
        self.changed(command)
        return command

    def sent(self, guest: str, id: str) -> None:
        """A caller's command is on its way to this guest (and those named before)."""
        self._sent.setdefault(id, set()).add(guest)
        self._sent.move_to_end(id)
        while len(self._sent) > COMMAND_LIMIT:
            self._sent.popitem(last=False)

    def has_room(self, guest: str, size: int) -> bool:
        """Whether so many bytes more of a guest can be kept; what was taken makes room."""
        most = HELD_CHARACTERS + BESIDE_OUTPUTS - size
        for command in self.of_guest(guest) if self._held.get(guest, 0) > most else ():
            if _is_spare(command) and not command.waiting and self._held.get(guest, 0) > most:
                self.forget((command.guest, command.id))
        return self._held.get(guest, 0) <= most

    def trim_taken(self, just_taken: Command) -> list[Command]:
        """Of what was taken the newest stay, for a reply that was lost. Returns those that go."""
        old: list[Command] = []
        kept = size = 0
        for command in reversed(self._commands.values()):
            if _is_spare(command) and command is not just_taken:
                kept, size = kept + 1, size + command.cost
                if kept > TAKEN_LIMIT or size > TAKEN_CHARACTERS:
                    old.append(command)
        return old

    def changed(self, command: Command) -> None:
        """What is known of it is another now: counted anew."""
        cost = len(command.status.detail) + characters(command.result)
        if command.asked:
            self._held[command.guest] = self._held.get(command.guest, 0) + cost - command.cost
        else:
            cost += OVERHEAD + len(command.id)
            self._unasked_bytes += cost - command.cost
        command.cost = cost
        if not command.asked:
            self._trim_unasked(command.guest)

    def _trim_unasked(self, guest: str) -> None:
        """The oldest go: of the guest itself when it has too many, else of all."""
        if self._unasked_of.get(guest, 0) > UNASKED_LIMIT:
            self.remove(next(key for key in self._unasked if key[0] == guest))
        while self._unasked_bytes > UNASKED_BYTES:
            self.remove(next(iter(self._unasked)))

    def forget(self, key: Key) -> Command | None:
        """It was acknowledged: a late copy of its result is not news."""
        command = self.remove(key)
        if command is not None:
            self.forgotten[key] = command.attempt
            while len(self.forgotten) > FORGOTTEN_LIMIT:
                self.forgotten.popitem(last=False)
        return command

    def remove(self, key: Key) -> Command | None:
        command = self._commands.pop(key, None)
        if command is None:
            return None
        if command.asked:
            self._held[command.guest] = self._held.get(command.guest, 0) - command.cost
            if not self._held[command.guest]:
                del self._held[command.guest]
        else:
            self._forget_unasked(key, command)
        return command

    def _forget_unasked(self, key: Key, command: Command) -> None:
        self._unasked.pop(key, None)
        self._unasked_bytes -= command.cost
        self._unasked_of[key[0]] -= 1
        if not self._unasked_of[key[0]]:
            del self._unasked_of[key[0]]
        command.cost = 0


def _is_spare(command: Command) -> bool:
    return command.taken and (command.of_run_cmd or command.old_agent)
