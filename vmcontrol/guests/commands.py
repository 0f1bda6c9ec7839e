"""The host's side of commands: what HostMain knows of each (guest, command id), and the requests about them.

The truth about a command is the agent's; this is a cache of what it said, with a version that grows with each change,
so that callers can wait for the next one. Results are kept here until they are acknowledged (or taken, for callers of
runCmd, who get the output with them: `Fetches`), apart for each guest. Sends through the Repeater; opens nothing, and
time is the clock that it is given.

    Repeater's NoAnswer, Dropped    the guest did not answer; the outcome is unknown
    NotPossible                     an agent of protocol 1 does not know this request
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from twisted.internet import defer
from twisted.internet.defer import Deferred

from vmcontrol.common.eventloop import Clock
from vmcontrol.guests.command import Command, characters, cpu_time, sound_result
from vmcontrol.guests.commandwaits import wait_for_change, wake
from vmcontrol.guests.fetches import Fetch, Fetches, Key, expected
from vmcontrol.guests.knowncommands import (
    HELD_CHARACTERS,
    TAKEN_LIMIT,
    UNASKED_BODY_LIMIT,
    UNASKED_LIMIT,
    KnownCommands,
)
from vmcontrol.guests.registry import Guest
from vmcontrol.guests.repeater import NoAnswer, Repeater, Send
from vmcontrol.protocol import messages
from vmcontrol.protocol.command import CommandState, CommandStatus
from vmcontrol.protocol.messages import (
    CommandCancel,
    CommandForget,
    CommandForgotten,
    CommandList,
    CommandQuery,
    CommandResult,
    CommandRun,
    CommandTable,
)
from vmcontrol.protocol.text import number

__all__ = ["HELD_CHARACTERS", "TAKEN_LIMIT", "UNASKED_LIMIT", "Commands", "NotPossible"]

log = logging.getLogger(__name__)

CANCEL_LIMIT_S = 3600.0
"""A cancelled command that has not ended after that is not asked to end any more."""
FETCHES_AT_ONCE, FETCH_MOST_S = 5, 30.0
"""How often an output is fetched at once when that fails; then after 1 s, doubled up to the latter."""
DETAIL_LIMIT = 4096
"""Characters of a detail that are kept; ours say at most half as many."""


class NotPossible(Exception):  # noqa: N818
    """What was asked cannot be done with this guest."""


class Commands:
    """The table of commands."""

    def __init__(self, clock: Clock, send: Send, fetch: Fetch) -> None:
        self._clock = clock
        self._send = send
        self._repeater = Repeater(clock, send)
        self._fetches = Fetches(fetch)
        self._table = KnownCommands()
        self._tokens = 0

    # What callers ask for

    async def run(
        self, guest: Guest, run: CommandRun, limit_s: float, *, fetched: bool = False, clock: Clock | None = None
    ) -> Command:
        """Have a command run; returns when the agent has acknowledged it (protocol 1: when it is sent).

        fetched: its output is to be here with its result, although it stays in files (not `inline_output`).
        clock: counts the limit.
        """
        key = (guest.id, run.id)
        self._table.forgotten.pop(key, None)
        self._table.sent(*key)
        command = self._wanted(guest.id, run.id)
        command.inline, command.fetched, command.old_agent = run.inline_output, fetched, guest.protocol < 2
        if command.old_agent:
            run = dataclasses.replace(run, legacy=True)
            try:
                messages.encode(run)
            except ValueError as error:
                raise NotPossible(f"an agent of protocol 1 cannot be sent this command: {error}") from error
            if command.state is not CommandState.UNKNOWN:
                return command  # sent once: an agent of protocol 1 would start it a second time
            self._change(command, state=CommandState.RUNNING, attempt=run.attempt)
            try:
                await self._send(run)
            except Exception:
                self._change(command, state=CommandState.UNKNOWN)
                raise
            return command
        command.asked_attempt = run.attempt
        await self._repeater.ask(("run", *key, run.attempt), guest.id, run, limit_s, clock=clock)
        return command

    def give_up(self, guest: str, id: str, why: str) -> None:
        """A command that its guest has not acknowledged ends as failed: who waits for it hears of that."""
        command = self._wanted(guest, id)
        if command.result is None:
            ended: dict[str, Any] = {
                "finished": False,
                "exitCodeOrSignal": -1,
                "exit_status": -1,
                "signal": None,
                "resources": {},
            }
            self._finished((guest, id), command.asked_attempt, {**ended, "out": "", "err": f"{why}\n", "error": why})

    async def query(self, guest: Guest, id: str, limit_s: float) -> Command:
        """Ask the agent; returns what it says."""
        command = self._wanted(guest.id, id)
        if guest.protocol >= 2:
            await self._repeater.ask(("query", guest.id, id), guest.id, CommandQuery(guest.id, id), limit_s)
        return command

    async def table(self, guest: Guest, limit_s: float) -> list[CommandStatus]:
        """Everything the agent knows, each with version and result as far as they are known here."""
        if guest.protocol < 2:
            return [command.status for command in self._table.of_guest(guest.id)]
        self._tokens += 1
        token = f"{self._clock.seconds():.6f}-{self._tokens}"
        answer = await self._repeater.ask(("list", guest.id, token), guest.id, CommandList(guest.id, token), limit_s)
        assert isinstance(answer, CommandTable)  # noqa: S101 (heard() gives nothing else)
        return [self._with_result(guest.id, status) for status in answer.commands]

    def _with_result(self, guest: str, status: CommandStatus) -> CommandStatus:
        command = self._table.get((guest, status.id))
        if command is None:
            return status
        result = command.result if command.attempt == status.attempt else None
        return dataclasses.replace(status, version=command.status.version, result=result)

    async def cancel(self, guest: Guest, id: str, grace_s: float, limit_s: float) -> Command:
        """Have a command ended. Returns at the agent's first answer; it is repeated until the command has ended."""
        if guest.protocol < 2:
            raise NotPossible("an agent of protocol 1 cannot cancel a command")
        command = self._wanted(guest.id, id)
        if command.result is not None:
            return command
        key, request = ("cancel", guest.id, id), CommandCancel(guest.id, id, grace_s)
        if not self._repeater.is_asking(key):  # it is repeated beyond our own wait, once however often it is asked for
            until_it_ends = self._repeater.ask(key, guest.id, request, CANCEL_LIMIT_S)
            until_it_ends.addErrback(lambda failure: failure.trap(NoAnswer, defer.CancelledError))
        ended = self._repeater.ask(key, guest.id, request, limit_s)
        changed: Deferred[object] = Deferred.fromCoroutine(self.wait(guest.id, id, command.status.version, limit_s + 1))
        first = defer.DeferredList([ended, changed], fireOnOneCallback=True, fireOnOneErrback=True, consumeErrors=True)
        try:
            await first
        except defer.FirstError as error:
            error.subFailure.raiseException()
        finally:
            ended.cancel()
            changed.cancel()
        return command

    async def acknowledge(self, guest: Guest, id: str, limit_s: float) -> None:
        """The result is safe with the caller: the agent forgets it, and so do we."""
        if guest.protocol >= 2:
            await self._repeater.ask(("forget", guest.id, id), guest.id, CommandForget(guest.id, id), limit_s)
        self._forget((guest.id, id))

    async def wait(self, guest: str, id: str, version: int, limit_s: float) -> Command:
        """The command as soon as its version is not `version`, or at the limit."""
        command = self._wanted(guest, id)
        await wait_for_change(self._clock, command, version, limit_s)
        return command

    def finished(self) -> list[str]:
        """Ids of the commands whose results wait to be taken."""
        return [c.id for c in self._table if c.result is not None and not c.taken]

    def waiting_result(self, id: str) -> Command | None:
        """The first command of this id whose result waits to be taken."""
        for command in self._table:
            if command.id == id and command.result is not None and not command.taken:
                return command
        return None

    async def complete(self, command: Command) -> None:
        """Fetch the output of a command of runCmd that is not here yet. Raises LinkError."""
        if command.result is not None and command.of_run_cmd and not command.is_kept:
            outputs = await self._fetches.now(command.guest, command.result)
            command.fetched = True
            self._change(command, result={**command.result, **outputs})

    def take(self, command: Command, guest: Guest | None) -> None:
        """The result was given out: it leaves the list (once more: `wait` still has it).

        The agent may forget a command of which that was all: with the others (runCommand) go the files of their output,
        so that is for who acknowledges to say.
        """
        command.taken = True
        if guest is not None and guest.protocol >= 2 and command.of_run_cmd:
            # nobody waits: the agent repeats its result if this is lost, and each repeat comes here again
            self._tell(CommandForget(guest.id, command.id))
        for old in self._table.trim_taken(command):
            self._forget((old.guest, old.id))

    # What guests say

    def heard(self, message: CommandStatus | CommandResult | CommandForgotten | CommandTable) -> None:
        """A message on /topic/cmd_responses."""
        match message:
            case CommandForgotten(sender, id):
                self._repeater.answered(("forget", sender, id))
            case CommandTable(sender, token):
                if self._repeater.is_asking(("list", sender, token)):
                    for status in message.commands:
                        self._state(status)
                    self._repeater.answered(("list", sender, token), message)
            case CommandResult():
                self._result(message)
            case CommandStatus():
                self._state(message)

    def guest_is_back(self, guest: Guest) -> None:
        """It (re)connected: repeat what is under way now, and ask about what was running, for its end may be lost."""
        self._repeater.kick(guest.id)
        if guest.protocol < 2:
            return
        for command in self._table.of_guest(guest.id):
            if command.state is CommandState.RUNNING and not command.old_agent:
                self._tell(CommandQuery(guest.id, command.id))

    def way_is_open(self) -> None:
        """The broker is connected again."""
        self._repeater.kick()

    def rolled_back(self, guest: str, why: str) -> None:
        """The guest was powered off or taken back to a snapshot: what it said before does not count any more.

        Results that runCmd asked for stay until they are taken.
        """
        self._repeater.drop(guest, why)
        self._fetches.cancel(guest)
        for key in [key for key in self._table.forgotten if key[0] == guest]:
            del self._table.forgotten[key]
        for command in self._table.of_guest(guest):
            if not command.is_kept:
                self._change(
                    command,
                    state=CommandState.UNKNOWN,
                    attempt=0,
                    pid=None,
                    fraction_done=None,
                    result=None,
                    detail=why,
                )

    def close(self) -> None:
        """HostMain ends: nobody waits any more."""
        self._repeater.close()
        self._fetches.cancel()
        for command in self._table:
            wake(command)

    # The table

    def _wanted(self, guest: str, id: str) -> Command:
        return self._table.asked_for(guest, id)

    def _forget(self, key: Key) -> None:
        command = self._table.forget(key)
        if command is not None:
            wake(command)

    def _state(self, status: CommandStatus) -> None:
        key = (status.sender, status.id)
        if status.state is CommandState.UNKNOWN and key not in self._table:
            return  # an answer that nobody waits for
        over = status.state in (CommandState.RUNNING, CommandState.FINISHED)
        if over and self._table.forgotten.get(key, -1) >= status.attempt:
            return  # said before it was acknowledged
        command = self._table.spoken_of(*key)
        if command is None:
            return
        queried = self._repeater.is_asking(("query", *key))
        if status.attempt < command.attempt and status.state is not CommandState.UNKNOWN and not queried:
            return  # about an earlier attempt
        if status.state is CommandState.FINISHED and (command.result is None or status.attempt > command.attempt):
            # The result itself follows, and is repeated if it is lost; until it is here nobody is told about the end.
            if command.state is not CommandState.RUNNING or status.attempt != command.attempt:
                self._change(command, state=CommandState.RUNNING, attempt=status.attempt, result=None)
            self._acknowledged(key, status.attempt)
            return
        if status.state is CommandState.REFUSED and command.state is CommandState.RUNNING and not queried:
            return  # a late copy of an earlier attempt was refused; the one that runs goes on
        stale = command.result is not None and status.attempt <= command.attempt
        if not (stale and status.state in (CommandState.RUNNING, CommandState.FINISHED) and not queried):
            result = command.result if status.state is CommandState.FINISHED else None
            self._set(command, dataclasses.replace(status, detail=status.detail[:DETAIL_LIMIT], result=result))
        if status.state is not CommandState.UNKNOWN:
            self._acknowledged(key, status.attempt, refused=status.state is CommandState.REFUSED)
        self._repeater.answered(("query", *key), status)
        if status.state is not CommandState.RUNNING:
            self._repeater.answered(("cancel", *key), status)

    def _result(self, message: CommandResult) -> None:
        sender = message.sender or self._sender_of_protocol_1(message.id)
        key = (sender, message.id)
        attempt = message.body.get("attempt", 1)
        attempt = attempt if isinstance(attempt, int) else 1
        if not sender or self._table.forgotten.get(key, -1) >= attempt:
            if sender:  # our CMD_FORGET was lost
                self._tell(CommandForget(sender, message.id))
            return
        command = self._table.spoken_of(*key)
        if command is None:
            return
        result = sound_result(message.body)
        if not command.asked and characters(result) > UNASKED_BODY_LIMIT:
            return  # it is repeated: whoever asks about this command gets it then
        queried = self._repeater.is_asking(("query", *key))
        if attempt < command.attempt and not queried:
            return
        if command.result is None or attempt > command.attempt:
            self._take_result(command, attempt, result)
            return
        if command.taken and command.of_run_cmd:
            self._tell(CommandForget(sender, message.id))
        self._answered_by_result(key, attempt)

    def _take_result(self, command: Command, attempt: int, result: dict[str, Any]) -> None:
        key = (command.guest, command.id)
        room = self._table.has_room(key[0], self._fetches.bytes_under_way(key[0]) + expected(result))
        if command.fetched and room:
            now = self._clock.seconds()
            if now < command.fetch_after:
                return  # it is repeated
            command.fetches += 1
            if command.fetches >= FETCHES_AT_ONCE:
                command.fetch_after = now + min(FETCH_MOST_S, 2 ** min(command.fetches - FETCHES_AT_ONCE, 10))
            self._change(command, state=CommandState.RUNNING, attempt=attempt, result=None)
            self._acknowledged(key, attempt)
            self._fetches.begin(key, result, lambda body: self._finished(key, attempt, body))
            return
        if not self._table.has_room(key[0], characters(result)):
            if not command.old_agent:
                log.warning("%s: the results of this guest that nobody takes fill the memory: one more is left", key[0])
                return  # it is repeated until somebody has taken others
            text = "[the command has ended; its output was left out: results that nobody takes fill the memory]\n"
            result |= {"out": "", "err": text}
        self._finished(key, attempt, result)

    def _answered_by_result(self, key: Key, attempt: int) -> None:
        self._acknowledged(key, attempt)
        self._repeater.answered(("query", *key))
        self._repeater.answered(("cancel", *key))

    def _finished(self, key: Key, attempt: int, result: Mapping[str, Any]) -> None:
        """The result is here."""
        command = self._table.get(key)
        if command is None or attempt < command.attempt:
            return  # forgotten, or started anew, while its output was fetched
        command.taken = False
        self._change(
            command,
            state=CommandState.FINISHED,
            attempt=attempt,
            result=result,
            cpu_time_s=number(result.get("cpu_time_s"), cpu_time(result.get("resources"))),
            pid=None,
        )
        self._answered_by_result(key, attempt)

    def _acknowledged(self, key: Key, attempt: int, *, refused: bool = False) -> None:
        """A CMD_RUN of this or a lower attempt has arrived (a refusal may carry the attempt that is known there)."""
        command = self._table.get(key)
        asked = 0 if command is None else command.asked_attempt
        if refused or attempt >= asked:
            self._repeater.answered(("run", *key, asked))

    def _sender_of_protocol_1(self, id: str) -> str:
        """Whose result it is, as it names no sender. Of several that run the same command: the first without one."""
        running = [command for command in self._table if command.id == id and command.old_agent]
        for command in sorted(running, key=lambda command: command.result is not None):
            return command.guest
        log.warning("a result without sender for the command %.80r, which was not sent from here: dropped", id)
        return ""

    def _tell(self, message: CommandForget | CommandQuery) -> None:
        self._send(message).addErrback(lambda failure: log.debug("not sent: %s", failure.getErrorMessage()))

    def _change(self, command: Command, **values: Any) -> None:
        self._set(command, dataclasses.replace(command.status, **values))

    def _set(self, command: Command, status: CommandStatus) -> None:
        """Another status, with the next version, for those who wait; nothing happens if it is the same."""
        version = command.status.version
        if version and dataclasses.replace(status, version=version) == command.status:
            return
        command.status = dataclasses.replace(status, version=version + 1)
        self._table.changed(command)
        wake(command)
