"""The agent's table of commands: which ids it knows, what became of them, and what to do next. Pure: no I/O, no clock.

Owns the rule "exactly once". Each input answers with effects, to be carried out in order; time is given as an argument.

    id, attempt    RUN of ...                      -> ...
    unknown id     any attempt                     start it
    known id       a lower attempt                 refuse
                   the same attempt                say what is known; never start again
                   a higher attempt                the host went back to before the old one: end the old one, drop its
                                                   result, then start the new one (never two at once)
    forgotten id   attempt <= the one forgotten    refuse; higher: start

States of a command: RUNNING (from acceptance: a repeated RUN must find it) -> FINISHED (result sent again and again
until FORGET) -> forgotten (only id and attempt are remembered, for the last REMEMBERED ids). LOST: read from the
journal. FORGET of a running command ends it and is acknowledged when it is gone; a higher attempt that came meanwhile
starts then. A host of 2009 never forgets, so its results are sent once and then forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vmcontrol.protocol.command import CommandState, CommandStatus
from vmcontrol.protocol.messages import CommandForgotten, CommandRun, CommandTable, Message

FIRST_REPEAT_S, LONGEST_REPEAT_S = 2.0, 30.0
"""Of a result that nobody acknowledges, for ever; doubled each time."""
REMEMBERED = 1000
"""Forgotten ids whose attempt is still known."""
RUNNING_LIMIT = 32
"""Commands that run at once; the wrapper runs one."""
KNOWN_LIMIT = 1000
"""Commands that are known at once, results that nobody acknowledges included (about 10 KiB each)."""
TABLE_DETAIL = 200
"""Characters of a command's `detail` in CMD_TABLE, which has KNOWN_LIMIT of them in one message."""
KILL_GRACE_S = 5.0
"""For a command that a higher attempt or a FORGET ends."""


@dataclass(frozen=True, slots=True)
class Start:
    """Start this command; then call `started` and `ended`."""

    run: CommandRun


@dataclass(frozen=True, slots=True)
class End:
    """TERM, and KILL after `grace_s`; `ended` follows. Repeating it is harmless and can only shorten the grace."""

    id: str
    attempt: int
    grace_s: float


@dataclass(frozen=True, slots=True)
class DropOutput:
    """Nobody wants these outputs any more: remove the files."""

    id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Send:
    """A word for the host; lost if the link is down, which the table reckons with."""

    message: Message


@dataclass(frozen=True, slots=True)
class SendResult:
    """The result of a finished command. `inline`: with the text of its outputs. Call `result_sent` when it went out."""

    id: str
    attempt: int
    body: Mapping[str, Any]
    inline: bool


@dataclass(frozen=True, slots=True)
class Remembered:
    """A command as the journal keeps it."""

    id: str
    attempt: int
    body: Mapping[str, Any] | None
    """Its result. None: it was started, and its end has not been seen."""
    inline: bool = True
    legacy: bool = False


@dataclass(frozen=True, slots=True)
class Remember:
    """Write to the journal, before anything that follows."""

    entry: Remembered


@dataclass(frozen=True, slots=True)
class Erase:
    """Take the id out of the journal."""

    id: str


LOST_DETAIL = "started before the guest or its agent was started anew; its end was never seen"

Effect = Start | End | DropOutput | Send | SendResult | Remember | Erase


@dataclass(slots=True)
class _Command:
    id: str
    attempt: int
    state: CommandState
    inline: bool = True
    legacy: bool = False
    pid: int | None = None
    fraction_done: float | None = None
    cpu_time_s: float = 0.0
    memory_bytes: int = 0
    detail: str = ""
    body: Mapping[str, Any] = field(default_factory=dict)
    successor: CommandRun | None = None
    """A higher attempt that starts when this one has ended."""
    forget: bool = False
    """FORGET came while it ran."""
    repeat_at: float = 0.0
    pause_s: float = FIRST_REPEAT_S


class Table:
    """All commands of this agent. `guest_id` is the sender of what it says."""

    def __init__(self, guest_id: str, *, remembered: Iterable[Remembered] = ()) -> None:
        self._guest_id = guest_id
        self._commands: dict[str, _Command] = {}
        self._forgotten: OrderedDict[str, int] = OrderedDict()
        for old in remembered:
            command = _Command(old.id, old.attempt, CommandState.LOST, inline=old.inline, legacy=old.legacy)
            command.detail = LOST_DETAIL
            body = old.body
            if body is None and old.legacy:  # it knows no "lost", but it waits for a result
                body = {"finished": False, "exitCodeOrSignal": -1, "out": "", "err": LOST_DETAIL, "resources": {}}
            if body is not None:
                command.state, command.body = CommandState.FINISHED, body
                command.detail = str(body.get("error", ""))
            self._commands[old.id] = command

    # --- what the host says -------------------------------------------------------------------------------------------

    def run(self, run: CommandRun, now: float) -> list[Effect]:  # noqa: PLR0911 (the table above, one return a line)
        """CMD_RUN."""
        known = self._commands.get(run.id)
        if known is None:
            forgotten = self._forgotten.get(run.id)
            if forgotten is not None and run.attempt <= forgotten:
                return [self._refused(run, forgotten, f"attempt {forgotten} was run and its result forgotten")]
            running = sum(c.state is CommandState.RUNNING for c in self._commands.values())
            if running >= RUNNING_LIMIT:
                return [self._refused(run, 0, f"{running} commands are running already")]
            if len(self._commands) >= KNOWN_LIMIT:
                return [self._refused(run, 0, f"{len(self._commands)} commands have not been forgotten")]
            return self._begin(run)
        latest = known.attempt if known.successor is None else known.successor.attempt
        if run.attempt < latest:
            return [self._refused(run, latest, f"attempt {latest} is known here")]
        if run.attempt == latest:
            return self._say(known, now)
        if known.state is CommandState.RUNNING:
            known.successor = run
            return [End(known.id, known.attempt, KILL_GRACE_S), Send(self._status(known))]
        return [DropOutput(known.id, known.attempt), *self._begin(run)]

    def query(self, id: str, now: float) -> list[Effect]:
        """CMD_QUERY: what is known; of a finished command the result too."""
        known = self._commands.get(id)
        if known is not None:
            return self._say(known, now)
        attempt = self._forgotten.get(id, 0)
        detail = "its result was forgotten" if attempt else ""
        status = CommandStatus(id, self._guest_id, CommandState.UNKNOWN, attempt=attempt, detail=detail)
        return [Send(status)]

    def cancel(self, id: str, grace_s: float, now: float) -> list[Effect]:
        """CMD_CANCEL. A successor that waits is never started then; the result is that of the attempt that ran."""
        known = self._commands.get(id)
        if known is None or known.state is not CommandState.RUNNING:
            return self.query(id, now)
        known.successor = None
        return [End(known.id, known.attempt, grace_s), *self._say(known, now)]

    def forget(self, id: str) -> list[Effect]:
        """CMD_FORGET."""
        known = self._commands.get(id)
        if known is not None and known.state is CommandState.RUNNING:
            known.forget, known.successor = True, None
            return [End(known.id, known.attempt, KILL_GRACE_S)]
        effects = [] if known is None else self._drop(known)
        return [*effects, Send(CommandForgotten(self._guest_id, id))]

    def list_all(self, token: str) -> list[Effect]:
        """CMD_LIST."""
        rows = tuple(self._status(command, TABLE_DETAIL) for command in self._commands.values())
        return [Send(CommandTable(self._guest_id, token, rows))]

    def connected(self, now: float) -> list[Effect]:
        """The link is there (again): say everything that may have been lost."""
        effects: list[Effect] = []
        for command in list(self._commands.values()):
            command.pause_s = FIRST_REPEAT_S
            effects += self._say(command, now)
        return effects

    # --- what the runner says -----------------------------------------------------------------------------------------

    def started(self, id: str, attempt: int, pid: int) -> list[Effect]:
        """The program runs."""
        command = self._of(id, attempt)
        if command is None:
            return []
        command.pid = pid
        return [Send(self._status(command))]

    def sample(
        self, id: str, attempt: int, *, cpu_time_s: float, memory_bytes: int, fraction_done: float | None
    ) -> list[Effect]:
        """How far it is. A fraction that cannot be read now keeps its last value; CPU time never goes back."""
        command = self._of(id, attempt)
        if command is None:
            return []
        command.cpu_time_s = max(command.cpu_time_s, cpu_time_s)
        command.memory_bytes = memory_bytes
        if fraction_done is not None:
            command.fraction_done = fraction_done
        return [Send(self._status(command))]

    def ended(self, id: str, attempt: int, body: Mapping[str, Any], now: float) -> list[Effect]:
        """It has ended, or could not be started; `body` is its result."""
        command = self._of(id, attempt)
        if command is None:
            return []
        if command.forget:
            forgotten = [*self._drop(command), Send(CommandForgotten(self._guest_id, id))]
            return forgotten if command.successor is None else [*forgotten, *self._begin(command.successor)]
        if command.successor is not None:
            return [DropOutput(id, attempt), *self._begin(command.successor)]
        command.state = CommandState.FINISHED
        command.body = body
        command.cpu_time_s = max(command.cpu_time_s, float(body.get("cpu_time_s", 0.0)))
        command.memory_bytes = 0
        command.detail = str(body.get("error", ""))
        return [*_remember(command, body), *self._say(command, now)]

    # --- repeating ----------------------------------------------------------------------------------------------------

    def next_repeat(self) -> float | None:
        """When `repeat` has something to do; None: never, as things are."""
        times = [c.repeat_at for c in self._commands.values() if c.state is CommandState.FINISHED]
        return min(times, default=None)

    def repeat(self, now: float) -> list[Effect]:
        """Results that nobody has acknowledged for long enough."""
        due = [c for c in self._commands.values() if c.state is CommandState.FINISHED and c.repeat_at <= now]
        return [self._result(command, now) for command in due]

    def result_sent(self, id: str, attempt: int) -> list[Effect]:
        """A SendResult has reached the socket."""
        command = self._commands.get(id)
        if command is None or command.attempt != attempt or not command.legacy:
            return []
        return self._drop(command)

    # --- inner --------------------------------------------------------------------------------------------------------

    def _of(self, id: str, attempt: int) -> _Command | None:
        command = self._commands.get(id)
        if command is None or command.attempt != attempt or command.state is not CommandState.RUNNING:
            return None
        return command

    def _begin(self, run: CommandRun) -> list[Effect]:
        self._forgotten.pop(run.id, None)
        inline = run.inline_output or run.legacy
        command = _Command(run.id, run.attempt, CommandState.RUNNING, inline=inline, legacy=run.legacy)
        self._commands[run.id] = command
        return [*_remember(command, None), Start(run), Send(self._status(command))]

    def _drop(self, command: _Command) -> list[Effect]:
        del self._commands[command.id]
        self._forgotten[command.id] = command.attempt
        self._forgotten.move_to_end(command.id)
        while len(self._forgotten) > REMEMBERED:
            self._forgotten.popitem(last=False)
        return [DropOutput(command.id, command.attempt), Erase(command.id)]

    def _say(self, command: _Command, now: float) -> list[Effect]:
        effects: list[Effect] = [Send(self._status(command))]
        if command.state is CommandState.FINISHED:
            effects.append(self._result(command, now))
        return effects

    def _result(self, command: _Command, now: float) -> SendResult:
        command.repeat_at = now + command.pause_s
        command.pause_s = min(LONGEST_REPEAT_S, command.pause_s * 2)
        return SendResult(command.id, command.attempt, command.body, command.inline)

    def _refused(self, run: CommandRun, attempt: int, why: str) -> Send:
        detail = f"attempt {run.attempt} refused: {why}"
        return Send(CommandStatus(run.id, self._guest_id, CommandState.REFUSED, attempt=attempt, detail=detail))

    def _status(self, command: _Command, most_detail: int | None = None) -> CommandStatus:
        waiting = command.successor
        return CommandStatus(
            id=command.id,
            sender=self._guest_id,
            state=command.state,
            attempt=command.attempt if waiting is None else waiting.attempt,
            pid=command.pid if waiting is None else None,
            fraction_done=command.fraction_done if waiting is None else None,
            cpu_time_s=command.cpu_time_s if waiting is None else 0.0,
            memory_bytes=command.memory_bytes if waiting is None else 0,
            detail=command.detail[:most_detail]
            if waiting is None
            else f"waits for the end of attempt {command.attempt}",
        )


def _remember(command: _Command, body: Mapping[str, Any] | None) -> list[Effect]:
    return [Remember(Remembered(command.id, command.attempt, body, command.inline, command.legacy))]
