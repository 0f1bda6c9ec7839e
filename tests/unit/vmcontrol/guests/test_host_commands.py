"""The host's table of commands: repeated until acknowledged, results kept until taken, versions for who waits.

The property test joins it to the agent's own table (guest.commands) by a channel that loses messages.
"""

from __future__ import annotations

import dataclasses
import functools
import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock

from guest.commands.table import End, Send, SendResult, Start, Table
from tests.support.conversations import no_outputs
from vmcontrol.common import eventloop
from vmcontrol.common.clock import PausableClock
from vmcontrol.guests.commands import (
    FETCHES_AT_ONCE,
    HELD_CHARACTERS,
    TAKEN_LIMIT,
    UNASKED_LIMIT,
    Commands,
    NotPossible,
)
from vmcontrol.guests.registry import Guest
from vmcontrol.guests.repeater import Dropped, NoAnswer
from vmcontrol.link.errors import LinkDown
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
    Message,
)
from vmcontrol.protocol.xmltext import TEXT_LIMIT

A, B = "02:00:00:00:00:0A", "02:00:00:00:00:0B"
RUN = CommandRun(A, "c1", "/bin/true", inline_output=False)
_2009 = {"finished": True, "exitCodeOrSignal": 0, "resources": {"ru_utime": 1.0, "ru_stime": 0.5}}
BODY = {**_2009, "attempt": 1, "exit_status": 0, "signal": None}


def new_clock() -> Any:
    """Twisted's annotations say less than it does."""
    return Clock()


def guest(id: str = A, protocol: int = 2) -> Guest:
    return Guest(id, "10.0.2.15", protocol, "VMMain", 0, 0)


class Host:
    """Commands with a clock, and what it sent."""

    def __init__(self) -> None:
        self.clock = new_clock()
        self.sent: list[Message] = []
        self.fetch: Any = no_outputs
        self.commands = Commands(self.clock, self._send, lambda guest, result: self.fetch(guest, result))  # noqa: PLW0108

    def _send(self, message: Message) -> Deferred[None]:
        self.sent.append(message)
        return succeed(None)

    def start(self, work: Any) -> Any:
        """What the coroutine came to: [value] or [error], [] while it waits."""
        outcome: list[Any] = []
        eventloop.start(work).addBoth(lambda result: outcome.append(getattr(result, "value", result)))
        return outcome

    def pass_time(self, seconds: float) -> None:
        self.clock.pump([0.25] * int(seconds * 4))

    def count(self, kind: type[Message]) -> int:
        return sum(isinstance(m, kind) for m in self.sent)


def state(state: CommandState, attempt: int = 1, **more: Any) -> CommandStatus:
    return CommandStatus("c1", A, state, attempt=attempt, **more)


def test_a_request_is_repeated_with_back_off_until_it_is_acknowledged() -> None:
    host = Host()
    outcome = host.start(host.commands.run(guest(), RUN, 600))
    times = []
    for _ in range(4 * 60):
        before = len(host.sent)
        host.clock.advance(0.25)
        if len(host.sent) > before:
            times.append(host.clock.seconds())
    assert times == [1, 3, 7, 15, 25, 35, 45, 55]
    assert all(message == RUN for message in host.sent)
    assert not outcome
    host.commands.heard(state(CommandState.RUNNING, pid=7))
    assert outcome[0].status.state is CommandState.RUNNING
    sent = len(host.sent)
    host.pass_time(60)
    assert len(host.sent) == sent


def test_without_an_answer_the_outcome_is_unknown_and_the_repeating_ends() -> None:
    host = Host()
    outcome = host.start(host.commands.run(guest(), RUN, 20))
    host.pass_time(21)
    assert isinstance(outcome[0], NoAnswer)
    sent = len(host.sent)
    host.pass_time(60)
    assert len(host.sent) == sent
    assert not host.clock.getDelayedCalls()


def test_the_limit_of_a_request_counts_on_the_clock_that_it_is_given() -> None:
    host = Host()
    of_the_vm = PausableClock(host.clock)
    outcome = host.start(host.commands.run(guest(), RUN, 60, clock=of_the_vm))
    of_the_vm.pause()
    host.pass_time(600)
    assert not outcome
    of_the_vm.resume()
    sent = host.count(CommandRun)
    host.pass_time(30)
    assert host.count(CommandRun) > sent
    host.pass_time(31)
    assert isinstance(outcome[0], NoAnswer)


def test_a_command_that_is_given_up_is_a_failed_result() -> None:
    host = Host()
    host.start(host.commands.run(guest(), RUN, 60, fetched=True))
    host.commands.give_up(A, "c1", "it was not started")
    assert host.commands.finished() == ["c1"]
    command = host.commands.waiting_result("c1")
    assert command is not None
    assert command.status.result is not None
    assert (command.status.result["finished"], command.status.result["err"]) == (False, "it was not started\n")
    host.commands.heard(CommandResult("c1", A, BODY))
    assert command.status.result["err"] == "it was not started\n", (
        "who is told so once is not told something else later"
    )


def test_a_caller_that_goes_away_ends_the_repeating() -> None:
    host = Host()
    waiting = eventloop.start(host.commands.query(guest(), "c1", 600))
    waiting.addErrback(lambda _: None)
    waiting.cancel()
    assert not host.clock.getDelayedCalls()


def test_an_open_way_repeats_at_once() -> None:
    host = Host()
    host.start(host.commands.run(guest(), RUN, 600))
    host.pass_time(30)
    sent = len(host.sent)
    host.commands.way_is_open()
    assert len(host.sent) == sent + 1
    host.pass_time(1)
    assert len(host.sent) == sent + 2, "the back-off begins anew"


def test_a_failing_broker_is_only_a_lost_message() -> None:
    clock = new_clock()
    sent: list[Message] = []

    def send(message: Message) -> Deferred[None]:
        sent.append(message)
        return fail(ConnectionError("no broker"))

    commands = Commands(clock, send, no_outputs)
    outcome: list[Any] = []
    eventloop.start(commands.run(guest(), RUN, 60)).addBoth(outcome.append)
    clock.advance(1)
    assert len(sent) == 2
    commands.heard(state(CommandState.RUNNING))
    assert outcome[0].status.state is CommandState.RUNNING


def test_a_result_waits_until_it_is_taken_and_is_repeatable_until_it_is_acknowledged() -> None:
    host = Host()
    host.start(host.commands.run(guest(), RUN, 60))
    host.commands.heard(CommandResult("c1", A, BODY))
    assert host.commands.finished() == ["c1"]
    command = host.commands.waiting_result("c1")
    assert command is not None
    assert command.status.cpu_time_s == 1.5
    host.commands.take(command, guest())
    assert host.commands.finished() == []
    assert host.commands.waiting_result("c1") is None
    again = host.start(host.commands.wait(A, "c1", 0, 60))
    assert again[0].status.result == BODY
    host.commands.heard(CommandResult("c1", A, BODY))
    assert host.commands.finished() == [], "a late copy is no new result"
    assert host.count(CommandForget) == 0, "with it would go the files of its output"
    done = host.start(host.commands.acknowledge(guest(), "c1", 60))
    assert not done
    host.commands.heard(CommandForgotten(A, "c1"))
    assert done == [None]
    host.commands.heard(CommandResult("c1", A, BODY))
    assert host.commands.finished() == []


def test_the_agent_may_forget_a_result_that_was_taken_with_all_its_output() -> None:
    host = Host()
    body = {**BODY, "out": "x", "err": ""}
    host.start(host.commands.run(guest(), CommandRun(A, "c1", "/bin/true"), 60))
    for count in (1, 2):
        host.commands.heard(CommandResult("c1", A, body))
        command = host.commands.waiting_result("c1")
        if command is not None:
            host.commands.take(command, guest())
        assert host.count(CommandForget) == count, "told again with each late copy"
    host.commands.heard(CommandResult("of an earlier HostMain", A, body))
    command = host.commands.waiting_result("of an earlier HostMain")
    assert command is not None
    host.commands.take(command, guest())
    assert host.count(CommandForget) == 3


class Files:
    """Outputs in the guest: each fetch waits until the test says what became of it."""

    def __init__(self, host: Host) -> None:
        self.asked: list[Deferred[Mapping[str, str]]] = []
        host.fetch = self._fetch

    def _fetch(self, guest: str, result: Mapping[str, Any]) -> Deferred[Mapping[str, str]]:
        assert guest == A
        assert result["exit_status"] == 0
        self.asked.append(Deferred())
        return self.asked[-1]


def test_a_result_of_runcmd_is_finished_when_its_output_is_here_and_survives_the_vm() -> None:
    host = Host()
    files = Files(host)
    outcome = host.start(host.commands.run(guest(), RUN, 60, fetched=True))
    for _ in range(2):  # the agent repeats it
        host.commands.heard(CommandResult("c1", A, {**BODY, "stdout_size": 3}))
    assert outcome[0].status.state.value == "running"
    assert host.commands.finished() == []
    assert len(files.asked) == 1
    files.asked[0].callback({"out": "abc", "err": ""})
    assert outcome[0].status.state.value == "finished"
    host.commands.rolled_back(A, "powered off")
    assert host.commands.finished() == ["c1"]
    command = host.commands.waiting_result("c1")
    assert command is not None
    host.start(host.commands.complete(command))
    assert command.status.result is not None
    assert command.status.result["out"] == "abc"
    assert host.count(CommandForget) == 0, "until somebody has it"
    host.commands.take(command, guest())
    assert host.count(CommandForget) == 1
    assert len(files.asked) == 1


def test_an_output_that_breaks_off_on_the_way_is_fetched_with_the_next_repeat() -> None:
    host = Host()
    files = Files(host)
    host.start(host.commands.run(guest(), RUN, 60, fetched=True))
    host.commands.heard(CommandResult("c1", A, BODY))
    files.asked[0].errback(LinkDown("broken"))
    assert host.commands.finished() == []
    host.commands.heard(CommandResult("c1", A, BODY))
    host.commands.rolled_back(A, "powered off in the middle")
    files.asked[1].callback({"out": "of the past", "err": ""})
    assert host.commands.finished() == []


def test_an_output_that_never_comes_is_not_fetched_as_often_as_the_guest_likes() -> None:
    host = Host()
    files = Files(host)
    host.start(host.commands.run(guest(), RUN, 60, fetched=True))
    for _ in range(1000):
        host.commands.heard(CommandResult("c1", A, BODY))
        if not files.asked[-1].called:
            files.asked[-1].errback(LinkDown("refused"))
    assert len(files.asked) == FETCHES_AT_ONCE
    host.pass_time(1.25)
    host.commands.heard(CommandResult("c1", A, BODY))
    files.asked[-1].callback({"out": "at last", "err": ""})
    assert host.commands.finished() == ["c1"]


def test_outputs_that_nobody_takes_cannot_fill_the_memory() -> None:
    host = Host()
    files = Files(host)
    ids = [f"c{number}" for number in range(6)]
    for id in ids:
        host.start(host.commands.run(guest(), dataclasses.replace(RUN, id=id), 60, fetched=True))
        host.commands.heard(CommandResult(id, A, {**BODY, "stdout_size": 10**9, "stderr_size": 0}))
    assert len(files.asked) == HELD_CHARACTERS // TEXT_LIMIT == 4, "those under way count too"
    for one in files.asked:
        one.callback({"out": "x" * TEXT_LIMIT, "err": ""})
    assert sorted(host.commands.finished()) == ids
    last = host.commands.waiting_result("c5")
    assert last is not None
    done = host.start(host.commands.complete(last))
    assert not done
    files.asked[-1].callback({"out": "fetched now", "err": ""})
    assert last.status.result is not None
    assert last.status.result["out"] == "fetched now"


def test_commands_whose_output_is_in_the_guest_are_not_forgotten_for_being_many() -> None:
    host = Host()
    for number in range(TAKEN_LIMIT + 2):
        run = CommandRun(A, f"c{number}", "/bin/true", inline_output=False)
        host.start(host.commands.run(guest(), run, 60))
        host.commands.heard(CommandResult(run.id, A, BODY))
        command = host.commands.waiting_result(run.id)
        assert command is not None
        host.commands.take(command, guest())
    host.commands.heard(CommandResult("c0", A, BODY))
    assert host.count(CommandForget) == 0


def test_a_result_that_is_seen_before_the_acknowledgement_of_the_request_is_one() -> None:
    host = Host()
    outcome = host.start(host.commands.run(guest(), RUN, 60))
    host.commands.heard(CommandResult("c1", A, BODY))
    assert outcome[0].status.state is CommandState.FINISHED
    host.commands.heard(state(CommandState.RUNNING))
    assert outcome[0].status.state is CommandState.FINISHED, "a late word does not take it back"


def test_finished_is_told_when_the_result_is_here() -> None:
    host = Host()
    outcome = host.start(host.commands.query(guest(), "c1", 60))
    host.commands.heard(state(CommandState.FINISHED))
    assert not outcome
    host.commands.heard(CommandResult("c1", A, BODY))
    assert outcome[0].status.result == BODY


def test_waiting_for_the_next_version() -> None:
    host = Host()
    host.start(host.commands.run(guest(), RUN, 60))
    host.commands.heard(state(CommandState.RUNNING))
    now = host.start(host.commands.wait(A, "c1", 0, 60))
    version = now[0].status.version
    waiting = host.start(host.commands.wait(A, "c1", version, 60))
    host.commands.heard(state(CommandState.RUNNING))
    assert not waiting, "nothing has changed"
    host.commands.heard(state(CommandState.RUNNING, fraction_done=0.5))
    assert waiting[0].status.fraction_done == 0.5
    timed_out = host.start(host.commands.wait(A, "c1", waiting[0].status.version, 10))
    host.pass_time(10.25)
    assert timed_out[0].status.version == waiting[0].status.version
    cancelled = eventloop.start(host.commands.wait(A, "c1", waiting[0].status.version, 10))
    cancelled.addErrback(lambda _: None)
    cancelled.cancel()
    host.commands.heard(state(CommandState.RUNNING, fraction_done=0.6))


def test_results_are_kept_apart_for_each_guest() -> None:
    host = Host()
    for id in (A, B):
        host.start(host.commands.query(guest(id), "c1", 60))
        host.commands.heard(CommandResult("c1", id, {**BODY, "exitCodeOrSignal": id}))
    assert host.commands.finished() == ["c1", "c1"]
    first = host.commands.waiting_result("c1")
    assert first is not None
    assert first.status.result is not None
    assert first.status.result["exitCodeOrSignal"] == A
    host.commands.take(first, guest(A))
    second = host.commands.waiting_result("c1")
    assert second is not None
    assert second.guest == B


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ({"finished": True, "exitCodeOrSignal": 0}, 0),
        ({"finished": False, "exitCodeOrSignal": 3}, 3),
        ({"finished": False, "exitCodeOrSignal": 0}, -1),
        ({"finished": False, "exitCodeOrSignal": "?"}, -1),
        ({}, -1),
    ],
)
def test_a_result_of_2009_has_an_exit_status_too(said: dict[str, Any], status: int) -> None:
    host = Host()
    outcome = host.start(host.commands.run(guest(protocol=1), RUN, 60))
    host.commands.heard(CommandResult("c1", "", {"cmd-id": "c1", "out": "x", **said}))
    assert outcome[0].status.result == {"cmd-id": "c1", "out": "x", **said, "exit_status": status, "signal": None}


@pytest.mark.parametrize("nonsense", ["9", None, [], True, 1e999, -1e999, 10**400, float("nan")])
def test_numbers_of_a_result_are_numbers_whatever_the_agent_says(nonsense: object) -> None:
    host = Host()
    outcome = host.start(host.commands.query(guest(), "c1", 60))
    said = dict.fromkeys(("exit_status", "signal", "cpu_time_s", "elapsed_s", "started", "ended"), nonsense)
    host.commands.heard(CommandResult("c1", A, {**said, "attempt": 1, "resources": {"ru_utime": nonsense}}))
    result = outcome[0].status.result
    assert result is not None
    allowed = (None, -1) if nonsense is None else (-1,)
    assert result["exit_status"] in allowed
    assert result["signal"] in allowed
    for name in ("cpu_time_s", "elapsed_s", "started", "ended"):
        assert result[name] == (1.0 if nonsense is True else 0.0)
    assert outcome[0].status.cpu_time_s in (0.0, 1.0)


def test_an_unknown_command_is_told_so_also_after_it_was_forgotten() -> None:
    host = Host()
    outcome = host.start(host.commands.query(guest(), "c1", 60))
    host.commands.heard(state(CommandState.UNKNOWN, 0))
    assert outcome[0].status.state is CommandState.UNKNOWN
    host.start(host.commands.run(guest(), RUN, 60))
    host.commands.heard(CommandResult("c1", A, BODY))
    host.start(host.commands.acknowledge(guest(), "c1", 60))
    host.commands.heard(CommandForgotten(A, "c1"))
    outcome = host.start(host.commands.query(guest(), "c1", 60))
    host.commands.heard(state(CommandState.UNKNOWN, 1))
    assert outcome[0].status.state is CommandState.UNKNOWN


def test_unknown_is_no_acknowledgement_of_a_request_to_run() -> None:
    host = Host()
    running = host.start(host.commands.run(guest(), RUN, 60))
    host.commands.heard(state(CommandState.UNKNOWN, 0))
    assert not running
    host.commands.heard(state(CommandState.RUNNING, 1))
    assert running


def test_words_about_an_earlier_attempt_do_not_count() -> None:
    host = Host()
    later = CommandRun(A, "c1", "/bin/true", attempt=2, inline_output=False)
    running = host.start(host.commands.run(guest(), later, 60))
    host.commands.heard(state(CommandState.RUNNING, 1))
    assert not running
    host.commands.heard(state(CommandState.RUNNING, 2))
    assert running[0].status.attempt == 2
    host.commands.heard(CommandResult("c1", A, BODY))
    assert running[0].status.state is CommandState.RUNNING
    host.commands.heard(state(CommandState.REFUSED, 2, detail="a late copy of attempt 1"))
    assert running[0].status.state is CommandState.RUNNING


def test_a_refused_attempt() -> None:
    host = Host()
    running = host.start(host.commands.run(guest(), RUN, 60))
    host.commands.heard(state(CommandState.REFUSED, 3, detail="attempt 3 is known"))
    assert running[0].status.state is CommandState.REFUSED
    assert "attempt 3" in running[0].status.detail


def test_a_vm_that_is_taken_back_takes_its_words_with_it() -> None:
    host = Host()
    host.start(host.commands.run(guest(), RUN, 60))
    host.commands.heard(CommandResult("c1", A, BODY))
    query = host.start(host.commands.query(guest(), "c2", 60))
    waiting = host.start(host.commands.wait(A, "c1", 1, 60))
    host.commands.rolled_back(A, "taken back")
    assert isinstance(query[0], Dropped)
    assert waiting[0].status.state is CommandState.UNKNOWN
    assert host.commands.finished() == []
    host.commands.heard(state(CommandState.RUNNING))
    assert waiting[0].status.state.value == "running", "the agent of the snapshot knows it"


def test_results_of_runcmd_stay_until_they_are_taken() -> None:
    host = Host()
    host.start(host.commands.run(guest(), CommandRun(A, "c1", "/bin/true"), 60))
    host.commands.heard(CommandResult("c1", A, {**BODY, "out": "x"}))
    host.commands.rolled_back(A, "powered off")
    assert host.commands.finished() == ["c1"]


def test_cancel_is_repeated_until_the_command_has_ended_and_answers_at_the_first_word() -> None:
    host = Host()
    host.start(host.commands.run(guest(), RUN, 60))
    host.commands.heard(state(CommandState.RUNNING))
    outcome = host.start(host.commands.cancel(guest(), "c1", 5, 60))
    assert not outcome
    host.commands.heard(state(CommandState.RUNNING, cpu_time_s=1))
    assert outcome[0].status.state is CommandState.RUNNING
    sent = host.count(CommandCancel)
    host.pass_time(30)
    assert host.count(CommandCancel) > sent
    host.commands.heard(CommandResult("c1", A, BODY))
    sent = host.count(CommandCancel)
    host.pass_time(60)
    assert host.count(CommandCancel) == sent


def test_a_cancel_that_is_asked_for_again_and_again_costs_one() -> None:
    host = Host()
    host.commands.heard(state(CommandState.RUNNING))
    for _ in range(50):
        host.start(host.commands.cancel(guest(), "c1", 5, 1))
        host.pass_time(2)
    before = host.count(CommandCancel)
    assert len(host.clock.getDelayedCalls()) < 5, "the repeat and its limit"
    host.pass_time(30)
    assert host.count(CommandCancel) > before


def test_cancel_of_an_unknown_command_and_without_an_answer() -> None:
    host = Host()
    unknown = host.start(host.commands.cancel(guest(), "c1", 5, 60))
    host.commands.heard(state(CommandState.UNKNOWN, 0))
    assert unknown[0].status.state is CommandState.UNKNOWN
    again = host.start(host.commands.cancel(guest(), "c1", 5, 60))
    host.commands.heard(state(CommandState.UNKNOWN, 0))
    assert again[0].status.state is CommandState.UNKNOWN
    silent = host.start(host.commands.cancel(guest(), "c2", 5, 10))
    host.pass_time(11)
    assert isinstance(silent[0], NoAnswer)


def test_the_agents_list() -> None:
    host = Host()
    outcome = host.start(host.commands.table(guest(), 60))
    request = host.sent[-1]
    assert isinstance(request, CommandList)
    rows = (state(CommandState.RUNNING, fraction_done=0.1),)
    host.commands.heard(CommandTable(A, "another token", rows))
    assert not outcome
    host.commands.heard(CommandTable(A, request.token, rows))
    (status,) = outcome[0]
    assert (status.fraction_done, status.state) == (0.1, CommandState.RUNNING)
    assert status.version > 0, "callers can wait for its next change"


def test_a_guest_that_is_back_is_asked_about_what_ran() -> None:
    host = Host()
    host.start(host.commands.run(guest(), RUN, 60))
    host.commands.heard(state(CommandState.RUNNING))
    host.start(host.commands.acknowledge(guest(), "c0", 600))
    host.start(host.commands.acknowledge(guest(B), "c0", 600))
    host.pass_time(30)
    sent = len(host.sent)
    host.commands.guest_is_back(guest())
    assert host.sent[sent:] == [CommandForget(A, "c0"), CommandQuery(A, "c1")]


def test_an_agent_of_2009_is_asked_once_and_its_result_has_no_sender() -> None:
    host = Host()
    run = CommandRun(A, "c1", "/bin/true")
    outcome = host.start(host.commands.run(guest(protocol=1), run, 60))
    assert outcome[0].status.state is CommandState.RUNNING
    host.pass_time(60)
    host.start(host.commands.run(guest(protocol=1), run, 60))
    assert host.sent == [dataclasses.replace(run, legacy=True)], "as a HostMain of protocol 1 sends it"
    long = CommandRun(A, "c2", "/bin/true", ("x" * 9000,))
    assert isinstance(host.start(host.commands.run(guest(protocol=1), long, 60))[0], NotPossible)
    with_query = host.start(host.commands.query(guest(protocol=1), "c1", 60))
    assert with_query[0].status.state is CommandState.RUNNING
    assert isinstance(host.start(host.commands.cancel(guest(protocol=1), "c1", 5, 60))[0], NotPossible)
    host.commands.heard(CommandResult("c1", "", {"out": "1\n", "err": "", "finished": True, "exitCodeOrSignal": 0}))
    assert outcome[0].status.state.value == "finished"
    assert host.commands.finished() == ["c1"]
    host.commands.heard(CommandResult("never asked", "", BODY))
    assert host.commands.finished() == ["c1"]
    assert host.start(host.commands.acknowledge(guest(protocol=1), "c1", 60)) == [None]
    assert len(host.sent) == 1


def test_what_nobody_asked_about_cannot_fill_the_memory() -> None:
    host = Host()
    host.start(host.commands.query(guest(), "mine", 60))
    for number in range(3 * UNASKED_LIMIT):
        host.commands.heard(CommandResult(f"c{number}", A, BODY))
    assert len(host.commands.finished()) <= UNASKED_LIMIT
    host.commands.heard(CommandResult("mine", A, BODY))
    assert "mine" in host.commands.finished()
    before = len(host.commands.finished())
    host.commands.heard(CommandResult("large", A, {**BODY, "out": "x" * 1_000_000}))
    host.commands.heard(CommandResult("x" * 100_000, A, BODY))
    host.commands.heard(CommandResult("c1", A, {**BODY, "attempt": 10**9}))
    host.commands.heard(CommandResult("c1", A, {**BODY, "attempt": "many"}))
    assert len(host.commands.finished()) <= before


def test_who_waits_is_not_told_of_every_word_of_a_running_command() -> None:
    host = Host()
    host.start(host.commands.run(guest(), RUN, 60))
    host.commands.heard(state(CommandState.RUNNING))
    told = 0
    waiting = host.start(host.commands.wait(A, "c1", 1, 60))
    for number in range(100):  # in one second
        host.commands.heard(state(CommandState.RUNNING, fraction_done=number / 100))
        host.clock.advance(0.01)
        if waiting:
            told += 1
            waiting = host.start(host.commands.wait(A, "c1", waiting[0].status.version, 60))
    assert 9 <= told <= 11
    host.commands.heard(CommandResult("c1", A, BODY))
    assert waiting[0].status.state is CommandState.FINISHED, "its end is told at once"


def test_another_guests_word_about_a_command_counts_for_nothing() -> None:
    host = Host()
    running = host.start(host.commands.run(guest(A), RUN, 60))
    for forged in (
        CommandResult("c1", B, BODY),
        CommandStatus("c1", B, CommandState.RUNNING, 1),
        CommandForgotten(B, "c1"),
    ):
        host.commands.heard(forged)
    assert not running
    assert host.commands.finished() == []
    host.commands.heard(state(CommandState.RUNNING))
    host.commands.heard(CommandResult("c1", A, BODY))
    assert host.commands.finished() == ["c1"]
    host.commands.take(host.commands.waiting_result("c1") or pytest.fail("no result"), guest(A))
    host.commands.heard(CommandResult("c1", B, BODY))
    assert host.commands.finished() == [], "nor does a result that comes when the true one was taken"


def test_another_guest_cannot_answer_for_the_list_of_one() -> None:
    host = Host()
    asked = host.start(host.commands.table(guest(A), 60))
    token = next(message.token for message in host.sent if isinstance(message, CommandList))
    host.commands.heard(CommandTable(B, token, ()))
    assert not asked
    host.commands.heard(CommandTable(A, token, ()))
    assert asked == [[]]


def test_what_a_guest_says_of_its_commands_is_kept_in_bounds() -> None:
    """Details, results and ids for ever: 800 MB a minute before there was a bound."""
    host = Host()
    for number in range(40):
        run = dataclasses.replace(RUN, id=f"c{number}", inline_output=True)
        host.start(host.commands.run(guest(), run, 60))
    tracemalloc.start()
    try:
        for round in range(3):
            for number in range(40):
                for id in (f"c{number}", f"new {round} {number}"):
                    detail = id + "x" * 1_000_000
                    host.commands.heard(CommandStatus(id, A, CommandState.RUNNING, 1, detail=detail))
                body = {**BODY, "err": "", "out": f"{number}" + "y" * 4_000_000, "nested": [[]] * 1000}
                host.commands.heard(CommandResult(f"c{number}", A, body))
        assert tracemalloc.get_traced_memory()[0] < HELD_CHARACTERS + 6_000_000
    finally:
        tracemalloc.stop()
    finished = host.commands.finished()
    assert 7 <= len(finished) <= 8
    left = next(f"c{number}" for number in range(40) if f"c{number}" not in finished)
    command = host.commands.waiting_result(finished[0])
    assert command is not None
    assert command.status.result is not None
    assert "nested" not in command.status.result
    host.commands.take(command, guest())
    host.commands.heard(CommandResult(left, A, {**BODY, "out": "z" * 4_000_000}))
    assert left in host.commands.finished(), "the agent repeats what there was no room for"


def test_an_agent_of_2009_that_says_it_once_still_tells_the_end() -> None:
    host = Host()
    for number in range(6):
        run = dataclasses.replace(RUN, id=f"c{number}", inline_output=True)
        host.start(host.commands.run(guest(protocol=1), run, 60))
        host.commands.heard(CommandResult(run.id, "", {**_2009, "cmd-id": run.id, "out": "x" * 7_000_000}))
    assert len(host.commands.finished()) == 6
    last = host.commands.waiting_result("c5")
    assert last is not None
    assert last.status.result is not None
    assert "left out" in last.status.result["err"]


class LossyLink:
    """Host and agent tables joined by a channel that loses what `losses` says."""

    def __init__(self, losses: list[bool]) -> None:
        self.clock = new_clock()
        self.losses = losses
        self.table = Table(A)
        self.started: list[tuple[str, int]] = []
        self.host = Commands(self.clock, self.to_guest, no_outputs)
        self.ends: dict[str, int] = {}

    def lost(self) -> bool:
        return self.losses.pop() if self.losses else False

    def to_guest(self, message: Message) -> Deferred[None]:
        if not self.lost():
            self.clock.callLater(0.01, self.obey, message)
        return succeed(None)

    def obey(self, message: Message) -> None:
        now = self.clock.seconds()
        match message:
            case CommandRun():
                self.do(self.table.run(message, now))
            case CommandQuery(_, id):
                self.do(self.table.query(id, now))
            case CommandCancel(_, id, grace):
                self.do(self.table.cancel(id, grace, now))
            case CommandForget(_, id):
                self.do(self.table.forget(id))
            case _:
                raise AssertionError(message)

    def do(self, effects: Any) -> None:
        for effect in effects:
            match effect:
                case Start(run):
                    self.started.append((run.id, run.attempt))
                    self.do(self.table.started(run.id, run.attempt, 99))
                    self.clock.callLater(5, self.end, run.id, run.attempt, 0)
                case End(id, attempt, _):
                    self.clock.callLater(0.1, self.end, id, attempt, 15)
                case Send(message):
                    self.to_host(message)
                case SendResult(id, _, body):
                    self.to_host(CommandResult(id, A, body))
        due = self.table.next_repeat()
        if due is not None:
            self.clock.callLater(max(0, due - self.clock.seconds()), self.repeat)

    def repeat(self) -> None:
        if self.table.next_repeat() is not None:
            self.do_once(functools.partial(self.table.repeat, self.clock.seconds()))

    def do_once(self, effects: Callable[[], Any]) -> None:
        found = effects()
        if found:
            self.do(found)

    def end(self, id: str, attempt: int, code: int) -> None:
        body = {"finished": code == 0, "exitCodeOrSignal": code, "attempt": attempt, "cpu_time_s": 1.0}
        self.do(self.table.ended(id, attempt, body, self.clock.seconds()))

    def to_host(self, message: Any) -> None:
        if not self.lost():
            self.clock.callLater(0.01, self.host.heard, message)

    def until(self, work: Any) -> Any:
        outcome: list[Any] = []
        eventloop.start(work).addBoth(outcome.append)
        for _ in range(20_000):
            if outcome:
                result = outcome[0]
                if hasattr(result, "raiseException"):
                    result.raiseException()
                return result
            self.clock.advance(0.05)
        raise AssertionError("it never ended")


@settings(max_examples=60, deadline=None)
@given(losses=st.lists(st.booleans(), max_size=40), cancel=st.booleans())
def test_whatever_is_lost_the_command_runs_once_and_its_result_arrives(losses: list[bool], cancel: bool) -> None:
    link = LossyLink(losses)

    async def job() -> None:
        command: Any = await link.host.run(guest(), RUN, 900)
        if cancel:
            await link.host.cancel(guest(), "c1", 5, 900)
        while command.status.state is not CommandState.FINISHED:
            version = command.status.version
            command = await link.host.wait(A, "c1", version, 100)
            if command.status.version == version:
                await link.host.query(guest(), "c1", 900)
        assert command.status.result is not None
        assert command.status.result["exitCodeOrSignal"] in ({0, 15} if cancel else {0})
        await link.host.acknowledge(guest(), "c1", 900)

    link.until(job())
    assert link.started == [("c1", 1)]
    assert link.table.next_repeat() is None, "the agent forgot it"
    link.clock.advance(100)
    assert link.host.finished() == []


def test_results_that_were_taken_cannot_fill_the_memory() -> None:
    host = Host()
    for number in range(12):
        run = CommandRun(A, f"c{number}", "/bin/true")
        host.start(host.commands.run(guest(), run, 60))
        host.commands.heard(CommandResult(run.id, A, {**BODY, "out": "x" * 4_000_000}))
        command = host.commands.waiting_result(run.id)
        assert command is not None
        host.commands.take(command, guest())
    newest = host.start(host.commands.wait(A, "c11", 0, 0))
    assert newest[0].status.result is not None
    oldest = host.start(host.commands.wait(A, "c0", 0, 0))
    assert oldest[0].status.result is None
    host.commands.heard(CommandResult("c1", A, BODY))
    assert host.commands.finished() == [], "a late copy of one that has gone is no new result"


def test_closing_ends_every_wait() -> None:
    host = Host()
    query = host.start(host.commands.query(guest(), "c1", 600))
    waiting = host.start(host.commands.wait(A, "c1", 0, 600))
    host.commands.close()
    assert isinstance(query[0], Dropped)
    assert waiting
    assert not host.clock.getDelayedCalls()


@pytest.mark.parametrize("attempt", [10**12, -5, 0])
def test_absurd_attempts_cost_nothing(attempt: int) -> None:
    host = Host()
    host.start(host.commands.run(guest(), RUN, 60))
    host.commands.heard(state(CommandState.RUNNING, attempt))
    host.commands.heard(state(CommandState.REFUSED, attempt))
