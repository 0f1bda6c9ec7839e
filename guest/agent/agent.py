"""The agent: messages in -> command table -> effects on runner, journal and link. Owns the two timers.

Everything that is decided about commands is decided in guest/commands/table.py; here it is carried out, in order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from guest.agent.identity import Identity, refreshed
from guest.agent.link import Link
from guest.commands.journal import Journal
from guest.commands.outputtext import INLINE_LIMIT
from guest.commands.runner import Runner
from guest.commands.table import DropOutput, Effect, End, Erase, Remember, Send, SendResult, Start, Table
from vmcontrol.common import eventloop
from vmcontrol.protocol import messages
from vmcontrol.protocol.messages import (
    Bye,
    CommandCancel,
    CommandForget,
    CommandList,
    CommandQuery,
    CommandResult,
    CommandRun,
    Hello,
    Message,
    Ping,
    Pong,
    StillAlive,
)
from vmcontrol.protocol.text import BadMessage

log = logging.getLogger(__name__)

NAME = "VMMain"
"""What HELLO and /v1/status say that this agent is."""

BYE_LIMIT_S = 2.0
"""For the last message to reach the socket."""

STALE_CHECK_S = 600.0
"""Longest time without a look at what has to be repeated."""


class Agent:
    """Receiver of a link and listener of a runner. `attach` both before anything arrives."""

    def __init__(
        self,
        clock: eventloop.Clock,
        identity: Identity,
        table: Table,
        *,
        journal: Journal | None,
        beacon_s: float,
        when_up: Callable[[], object] = lambda: None,
    ) -> None:
        """`when_up` is called each time the link is up and HELLO is on its way."""
        self._clock = clock
        self._identity = identity
        self._table = table
        self._journal = journal
        self._beacon_s = beacon_s
        self._when_up = when_up
        self._runner: Runner | None = None
        self._link: Link | None = None
        self._beacon: eventloop.TimerHandle | None = None
        self._repeat: eventloop.TimerHandle | None = None
        self._leaving = False

    def attach(self, runner: Runner, link: Link) -> None:
        self._runner = runner
        self._link = link

    async def leave(self) -> None:
        """Say BYE, end the link, kill what runs."""
        self._leaving = True
        for timer in (self._beacon, self._repeat):
            if timer is not None and timer.active():
                timer.cancel()
        if self._link is not None:
            if self._link.up:
                bye = self._link.send(messages.encode(Bye(self._identity.id, self._identity.ip)))
                try:
                    await eventloop.with_limit(self._clock, BYE_LIMIT_S, "BYE", bye)
                except Exception as error:  # noqa: BLE001 (it is only a courtesy)
                    log.warning("BYE was not sent: %s", error)
            await self._link.close()
        if self._runner is not None:
            await self._runner.stop()

    # --- the link -----------------------------------------------------------------------------------------------------

    def link_up(self) -> None:
        """Connected: say who is there, then everything that may have been lost."""
        self._identity = refreshed(self._identity)  # a restored guest may have been given another address
        log.info("link up: %s %s", self._identity.id, self._identity.ip)
        self._say(Hello(self._identity.id, self._identity.ip, messages.PROTOCOL, NAME))
        self._wait_for_beacon()
        self._do(self._table.connected(self._now()))
        self._when_up()

    def link_down(self) -> None:
        """Nothing to say it to until the next connection."""
        if self._beacon is not None and self._beacon.active():
            self._beacon.cancel()
        self._beacon = None

    def receive(self, headers: Mapping[str, str], body: str) -> None:
        """A message on /topic/cmd_requests; never raises."""
        if self._leaving or not messages.addressed_to(headers.get("to", ""), self._identity.id):
            return
        try:
            message = messages.decode(headers, body)
        except BadMessage as error:
            log.warning("dropped: %s", error)
            return
        try:
            self._obey(message)
        except Exception:
            log.exception("%s could not be carried out", type(message).__name__)

    def _obey(self, message: Message) -> None:
        now = self._now()
        match message:
            case Ping(_, timestamp):
                self._say(Pong(self._identity.id, timestamp))
            case CommandRun():
                self._do(self._table.run(message, now))
            case CommandQuery(_, id):
                self._do(self._table.query(id, now))
            case CommandCancel(_, id, grace_s):
                self._do(self._table.cancel(id, grace_s, now))
            case CommandForget(_, id):
                self._do(self._table.forget(id))
            case CommandList(_, token):
                self._do(self._table.list_all(token))
            case _:
                log.warning("dropped: %s is no request", type(message).__name__)

    # --- the runner ---------------------------------------------------------------------------------------------------

    def command_started(self, id: str, attempt: int, pid: int) -> None:
        self._do(self._table.started(id, attempt, pid))

    def command_sampled(self, id: str, attempt: int, sample: Mapping[str, Any]) -> None:
        self._do(self._table.sample(id, attempt, **sample))

    def command_ended(self, id: str, attempt: int, body: Mapping[str, Any]) -> None:
        if self._leaving:
            return  # killed because the agent goes: the journal has it as lost
        self._do(self._table.ended(id, attempt, body, self._now()))

    # --- carrying out -------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return self._clock.seconds()

    def _do(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if not self._do_one(effect):
                break
        self._wait_for_repeat()

    def _do_one(self, effect: Effect) -> bool:
        """False: what comes after it must not happen."""
        runner = self._runner
        assert runner is not None  # noqa: S101 (attach comes first)
        match effect:
            case Send(message):
                self._say(message)
            case SendResult():
                self._say_result(effect)
            case Start(run):
                runner.start(run)
            case End(id, attempt, grace_s):
                runner.end(id, attempt, grace_s)
            case DropOutput(id, attempt):
                runner.drop_output(id, attempt)
            case Remember(entry):
                return self._write(entry.id, entry.attempt, lambda journal: journal.remember(entry), entry.body is None)
            case Erase(id):
                return self._write(id, 0, lambda journal: journal.erase(id), False)
        return True

    def _write(self, id: str, attempt: int, write: Callable[[Journal], None], before_start: bool) -> bool:
        """Change the journal. A command that cannot be journalled is not started: it might be run twice."""
        if self._journal is None:
            return True
        try:
            write(self._journal)
        except OSError as error:
            log.error("the journal cannot be written: %s", error)
            if before_start:
                assert self._runner is not None  # noqa: S101
                body = self._runner.not_started(id, attempt, f"the journal cannot be written: {error}")
                self._clock.callLater(0, self.command_ended, id, attempt, body)
                return False
        return True

    def _say(self, message: Message) -> None:
        if self._link is not None and self._link.up:
            try:
                encoded = messages.encode(message)
            except ValueError as error:  # what comes after it is still to be said
                log.error("%s cannot be sent: %s", type(message).__name__, error)
                return
            sent = self._link.send(encoded)
            sent.addErrback(lambda failure: log.debug("not sent: %s", failure.getErrorMessage()))

    def _say_result(self, result: SendResult) -> None:
        link, runner = self._link, self._runner
        if link is None or runner is None or not link.up:
            return
        try:
            encoded = self._result_message(runner, result)
        except Exception as error:  # noqa: BLE001 (an odd entry of a journal, say: the results behind it must go out)
            log.error("the result of %.200r cannot be sent: %r", result.id, error)
            return
        sent = link.send(encoded)
        sent.addCallbacks(
            lambda _: self._do(self._table.result_sent(result.id, result.attempt)),
            lambda failure: log.debug("result not sent: %s", failure.getErrorMessage()),
        )

    def _result_message(self, runner: Runner, result: SendResult) -> messages.StompMessage:
        """The result as a message; text that needs many escapes is cut shorter, so that the message can be read."""
        if not result.inline:
            return messages.encode(CommandResult(result.id, self._identity.id, result.body))
        limit = INLINE_LIMIT
        while True:
            body = runner.with_output(result.body, limit)
            try:
                return messages.encode(CommandResult(result.id, self._identity.id, body))
            except ValueError:
                limit //= 2
                if not limit:
                    raise

    # --- timers -------------------------------------------------------------------------------------------------------

    def _wait_for_beacon(self) -> None:
        if self._beacon is not None and self._beacon.active():
            self._beacon.cancel()
        self._beacon = self._clock.callLater(self._beacon_s, self._send_beacon)

    def _send_beacon(self) -> None:
        self._say(StillAlive(self._identity.id, self._identity.ip, messages.PROTOCOL, NAME))
        self._wait_for_beacon()

    def _wait_for_repeat(self) -> None:
        if self._repeat is not None and self._repeat.active():
            self._repeat.cancel()
        self._repeat = None
        due = self._table.next_repeat()
        if due is None or self._leaving:
            return
        delay = min(STALE_CHECK_S, max(0.0, due - self._now()))
        self._repeat = self._clock.callLater(delay, lambda: self._do(self._table.repeat(self._now())))
