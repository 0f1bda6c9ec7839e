"""The agent's command table: started once, refused when older, kept until forgotten."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from guest.commands import supervisor
from guest.commands import table as commands
from guest.commands.table import (
    DropOutput,
    Effect,
    End,
    Erase,
    Remember,
    Remembered,
    Send,
    SendResult,
    Start,
    Table,
)
from vmcontrol.protocol import messages
from vmcontrol.protocol.command import CommandState, CommandStatus
from vmcontrol.protocol.messages import CommandForgotten, CommandRun, CommandTable

ME = "52:54:00:12:34:56"
RESULT = {"exit_status": 0, "cpu_time_s": 1.5}


def run(id: str = "c", attempt: int = 1, **more: Any) -> CommandRun:
    return CommandRun(ME, id, "./worker.py", attempt=attempt, inline_output=False, **more)


def only(effects: list[Effect], kind: type[Effect]) -> list[Any]:
    return [effect for effect in effects if isinstance(effect, kind)]


def said(effects: list[Effect]) -> CommandStatus:
    [status] = [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, CommandStatus)]
    return status


def test_a_command_is_journalled_before_it_is_started() -> None:
    effects = Table(ME).run(run(), 0.0)
    assert effects[:2] == [Remember(Remembered("c", 1, None, inline=False)), Start(run())]
    assert said(effects).state is CommandState.RUNNING


def test_a_repeated_run_starts_nothing() -> None:
    table = Table(ME)
    table.run(run(), 0.0)
    assert not only(table.run(run(), 1.0), Start)
    table.started("c", 1, 77)
    assert said(table.run(run(), 2.0)).pid == 77
    table.ended("c", 1, RESULT, 3.0)
    effects = table.run(run(), 4.0)
    assert not only(effects, Start)
    assert said(effects).state is CommandState.FINISHED
    assert only(effects, SendResult) == [SendResult("c", 1, RESULT, False)]


def test_a_lower_attempt_is_refused_and_says_which_is_known() -> None:
    table = Table(ME)
    table.run(run(attempt=3), 0.0)
    effects = table.run(run(attempt=2), 1.0)
    assert not only(effects, Start)
    assert (said(effects).state, said(effects).attempt) == (CommandState.REFUSED, 3)


def test_a_higher_attempt_waits_for_the_end_of_the_running_one() -> None:
    table = Table(ME)
    table.run(run(), 0.0)
    table.started("c", 1, 77)
    effects = table.run(run(attempt=2), 1.0)
    assert only(effects, End)
    assert not only(effects, Start)
    assert (said(effects).state, said(effects).attempt, said(effects).pid) == (CommandState.RUNNING, 2, None)
    assert said(table.run(run(attempt=1), 1.5)).state is CommandState.REFUSED
    effects = table.ended("c", 1, RESULT, 2.0)
    assert only(effects, Start) == [Start(run(attempt=2))]
    assert only(effects, DropOutput) == [DropOutput("c", 1)]
    assert not only(effects, SendResult)
    assert table.ended("c", 1, RESULT, 3.0) == []


def test_a_higher_attempt_of_a_finished_command_drops_its_result() -> None:
    table = Table(ME)
    table.run(run(), 0.0)
    table.ended("c", 1, RESULT, 1.0)
    effects = table.run(run(attempt=2), 2.0)
    assert effects[0] == DropOutput("c", 1)
    assert only(effects, Start)
    assert table.next_repeat() is None


def test_a_result_is_repeated_until_it_is_forgotten() -> None:
    table = Table(ME)
    table.run(run(), 0.0)
    table.ended("c", 1, RESULT, 10.0)
    times = [10.0]
    for _ in range(8):
        due = table.next_repeat()
        assert due is not None
        assert table.repeat(due - 0.001) == []
        assert table.repeat(due) == [SendResult("c", 1, RESULT, False)]
        times.append(due)
    assert [b - a for a, b in itertools.pairwise(times)] == [2, 4, 8, 16, 30, 30, 30, 30]
    effects = table.forget("c")
    assert effects == [DropOutput("c", 1), Erase("c"), Send(CommandForgotten(ME, "c"))]
    assert table.next_repeat() is None
    assert table.forget("c") == [Send(CommandForgotten(ME, "c"))]


def test_a_forgotten_command_is_unknown_and_not_run_again_but_by_a_higher_attempt() -> None:
    table = Table(ME)
    table.run(run(attempt=2), 0.0)
    table.ended("c", 2, RESULT, 1.0)
    table.forget("c")
    asked = said(table.query("c", 2.0))
    assert (asked.state, asked.attempt) == (CommandState.UNKNOWN, 2)
    assert said(table.run(run(attempt=2), 3.0)).state is CommandState.REFUSED
    assert only(table.run(run(attempt=3), 4.0), Start)


def test_cancel_ends_a_running_command_and_its_result_stays() -> None:
    table = Table(ME)
    table.run(run(), 0.0)
    assert only(table.cancel("c", 7.0, 1.0), End) == [End("c", 1, 7.0)]
    assert only(table.ended("c", 1, RESULT, 2.0), SendResult)
    assert not only(table.cancel("c", 7.0, 3.0), End)
    assert said(table.cancel("other", 7.0, 3.0)).state is CommandState.UNKNOWN


def test_cancel_takes_a_waiting_attempt_away() -> None:
    table = Table(ME)
    table.run(run(), 0.0)
    table.run(run(attempt=2), 1.0)
    table.cancel("c", 5.0, 2.0)
    effects = table.ended("c", 1, RESULT, 3.0)
    assert not only(effects, Start)
    assert only(effects, SendResult)


def test_forget_of_a_running_command_is_acknowledged_when_it_is_gone() -> None:
    table = Table(ME)
    table.run(run(), 0.0)
    effects = table.forget("c")
    assert only(effects, End)
    assert not only(effects, Send)
    effects = table.ended("c", 1, RESULT, 1.0)
    assert Send(CommandForgotten(ME, "c")) in effects
    assert not only(effects, SendResult)


def test_a_higher_attempt_after_a_forget_starts_when_the_forgotten_one_is_gone() -> None:
    table = Table(ME)
    table.run(run(), 0.0)
    table.forget("c")
    assert said(table.run(run(attempt=2), 1.0)).attempt == 2
    effects = table.ended("c", 1, RESULT, 2.0)
    forgotten, begun = Send(CommandForgotten(ME, "c")), Start(run(attempt=2))
    assert effects.index(DropOutput("c", 1)) < effects.index(forgotten) < effects.index(begun)
    assert effects.index(Erase("c")) < effects.index(Remember(Remembered("c", 2, None, inline=False)))
    assert said(effects).state is CommandState.RUNNING
    assert only(table.ended("c", 2, RESULT, 3.0), SendResult)


def test_a_forget_takes_a_waiting_attempt_away() -> None:
    table = Table(ME)
    table.run(run(), 0.0)
    table.run(run(attempt=2), 1.0)
    table.forget("c")
    effects = table.ended("c", 1, RESULT, 2.0)
    assert not only(effects, Start)
    assert Send(CommandForgotten(ME, "c")) in effects


def test_a_host_of_2009_gets_its_result_once() -> None:
    table = Table(ME)
    table.run(run(legacy=True), 0.0)
    assert only(table.ended("c", 1, RESULT, 1.0), SendResult) == [SendResult("c", 1, RESULT, True)]
    assert table.result_sent("c", 1) == [DropOutput("c", 1), Erase("c")]
    assert table.next_repeat() is None


def test_our_hosts_results_stay_when_they_were_sent() -> None:
    table = Table(ME)
    table.run(run(), 0.0)
    table.ended("c", 1, RESULT, 1.0)
    assert table.result_sent("c", 1) == []
    assert table.next_repeat() is not None


def test_cpu_time_never_goes_back_and_a_fraction_stays() -> None:
    table = Table(ME)
    table.run(run(), 0.0)
    table.sample("c", 1, cpu_time_s=5.0, memory_bytes=100, fraction_done=0.5)
    status = said(table.sample("c", 1, cpu_time_s=4.0, memory_bytes=50, fraction_done=None))
    assert (status.cpu_time_s, status.memory_bytes, status.fraction_done) == (5.0, 50, 0.5)


def test_after_a_cold_boot_what_was_started_is_lost_and_what_was_finished_is_there() -> None:
    table = Table(ME, remembered=[Remembered("a", 1, None), Remembered("b", 1, RESULT)])
    assert said(table.query("a", 0.0)).state is CommandState.LOST
    assert said(table.run(run("a"), 0.0)).state is CommandState.LOST
    assert only(table.run(run("a", 2), 0.0), Start)
    assert only(table.connected(0.0), SendResult) == [SendResult("b", 1, RESULT, True)]


def test_a_lost_command_of_a_host_of_2009_ends_with_a_result() -> None:
    table = Table(ME, remembered=[Remembered("a", 1, None, legacy=True)])
    [result] = only(table.connected(0.0), SendResult)
    assert result.body["finished"] is False
    assert "started anew" in result.body["err"]


def test_list_names_everything() -> None:
    table = Table(ME)
    table.run(run("a"), 0.0)
    table.run(run("b"), 0.0)
    table.ended("b", 1, RESULT, 1.0)
    [answer] = table.list_all("t")
    assert isinstance(answer, Send)
    assert isinstance(answer.message, CommandTable)
    assert answer.message.token == "t"
    assert {c.id: c.state for c in answer.message.commands} == {"a": CommandState.RUNNING, "b": CommandState.FINISHED}


def test_a_full_table_fits_into_one_message() -> None:
    failed = {"exit_status": None, "error": "not-started: " + "\x01" * 5000}
    table = Table(ME, remembered=[Remembered(f"{n:0200}", 1, failed) for n in range(commands.KNOWN_LIMIT)])
    [answer] = table.list_all("t")
    assert isinstance(answer, Send)
    sent = messages.encode(answer.message)
    assert messages.decode(sent.headers, sent.body) == answer.message


def test_too_many_at_once_are_refused() -> None:
    table = Table(ME)
    for number in range(commands.RUNNING_LIMIT):
        assert only(table.run(run(str(number)), 0.0), Start)
    assert said(table.run(run("more"), 0.0)).state is CommandState.REFUSED


_step = st.one_of(
    st.tuples(st.just("run"), st.sampled_from("ab"), st.integers(1, 3)),
    st.tuples(st.sampled_from(["forget", "cancel", "query", "end"]), st.sampled_from("ab"), st.just(0)),
)


class Watched:
    """A table whose effects are checked, and the programs that it starts: they run until they are ended."""

    def __init__(self) -> None:
        self.table = Table(ME)
        self.running: dict[str, int] = {}
        self.started: set[tuple[str, int]] = set()
        self.promised: dict[str, int] = {}
        """What the host was told to be running, and has not taken back."""

    def look(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Start(new):
                    assert new.id not in self.running
                    assert (new.id, new.attempt) not in self.started
                    assert all(new.attempt > attempt for id, attempt in self.started if id == new.id)
                    self.started.add((new.id, new.attempt))
                    self.running[new.id] = new.attempt
                case End(id, attempt, _):
                    assert self.running.get(id) == attempt
                case DropOutput(id, attempt):
                    assert self.running.get(id) != attempt

    def run(self, id: str, attempt: int, now: float) -> None:
        effects = self.table.run(run(id, attempt), now)
        self.look(effects)
        if said(effects).state is CommandState.RUNNING:
            self.promised[id] = said(effects).attempt

    def take_back(self, id: str, *, forget: bool, now: float) -> None:
        self.promised.pop(id, None)
        self.look(self.table.forget(id) if forget else self.table.cancel(id, 1.0, now))

    def end(self, id: str, now: float) -> None:
        if id in self.running:
            self.look(self.table.ended(id, self.running.pop(id), RESULT, now))


@given(st.lists(_step, max_size=40))
@example([("run", "a", 1), ("forget", "a", 0), ("run", "a", 2), ("end", "a", 0)])
def test_whatever_the_host_says_each_attempt_starts_once_and_never_two_at_a_time(
    steps: list[tuple[str, str, int]],
) -> None:
    watched = Watched()
    for now, (what, id, attempt) in enumerate(steps):
        if what == "run":
            watched.run(id, attempt, now)
        elif what in ("forget", "cancel"):
            watched.take_back(id, forget=what == "forget", now=now)
        elif what == "query":
            watched.look(watched.table.query(id, now))
        else:
            watched.end(id, now)
        watched.look(watched.table.repeat(now))
    for id in list(watched.running):
        watched.end(id, len(steps))
    assert set(watched.promised.items()) <= watched.started


def test_a_long_command_is_looked_at_more_rarely_but_still_within_seconds() -> None:
    pauses = [supervisor.pause_after(elapsed) for elapsed in (0, 30, 60, 120, 300, 86_400)]
    assert pauses == [1, 1, 1, 2, 5, 5]
