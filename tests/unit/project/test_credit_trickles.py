"""The example project's trickle handler: credit is the reported CPU time, once, whatever comes twice or lies."""

from __future__ import annotations

import importlib.util
import json
import re
import sqlite3
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent
RECORDED: list[str] = json.loads((HERE / "recorded_trickles.json").read_text())
"""As the real scheduler stores them: sent by the real client for a job in a VM with a snapshot each few seconds."""
SENT = 1_000_000
GIGA = 1e9
SCHEMA = """
create table msg_from_host (id integer primary key, create_time integer, hostid integer, variety text,
    handled integer, xml text);
create table result (id integer primary key, name text, hostid integer, sent_time integer, granted_credit double);
create table host (id integer primary key, userid integer, p_ncpus integer, p_fpops double, total_credit double,
    expavg_credit double, expavg_time double);
create table user (id integer primary key, teamid integer, total_credit double, expavg_credit double,
    expavg_time double);
create table team (id integer primary key, total_credit double, expavg_credit double, expavg_time double);
"""
"""Those columns of BOINC's db/schema.sql that the handler touches."""


def _load() -> ModuleType:
    path = HERE.parents[2] / "examples" / "boinc-project" / "bin" / "credit_trickles.py"
    specification = importlib.util.spec_from_file_location("credit_trickles", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


credit_trickles = _load()


class Server:
    """A project's database: host 7 of user 70 in team 700, 4 processors of 2 GFLOPS; host 8 of nobody's team."""

    def __init__(self, connection: sqlite3.Connection, sent: int = SENT) -> None:
        self.connection = connection
        self.sent = sent
        connection.executescript(SCHEMA)
        connection.executescript(
            f"insert into host values (7, 70, 4, {2 * GIGA}, 100, 0, 0), (8, 80, 1, {2 * GIGA}, 0, 0, 0);"
            "insert into user values (70, 700, 1000, 0, 0), (80, 0, 0, 0, 0);"
            "insert into team values (700, 5000, 0, 0);"
        )
        self.now = sent + 3600.0
        self.handler = credit_trickles.Handler(credit_trickles.Database(connection, "qmark"), lambda: self.now)

    def add_result(self, name: str, host: int = 7) -> None:
        self.connection.execute(
            "insert into result (name, hostid, sent_time, granted_credit) values (?, ?, ?, 0)", (name, host, self.sent)
        )

    def receive(self, xml: str, *, host: int = 7, at: int = SENT + 3600, variety: str = "cpu_time") -> None:
        """As handle_msgs_from_host of the scheduler."""
        self.connection.execute(
            "insert into msg_from_host (create_time, hostid, variety, handled, xml) values (?, ?, ?, 0, ?)",
            (at, host, variety, xml),
        )

    def value(self, query: str, *values: Any) -> float:
        row = self.connection.execute(query, values).fetchone()
        return float(row[0]) if row else 0.0

    def cpu_time_credited(self, result: str) -> float:
        query = "select cpu_time from vmwrapper_credited where resultid=(select id from result where name=?)"
        return self.value(query, result)


@pytest.fixture
def server() -> Server:
    server = Server(sqlite3.connect(":memory:"))
    server.add_result("r_0")
    return server


def text(cpu_time: object, result: str = "r_0", more: str = "<fraction_done>0.5</fraction_done>\n") -> str:
    return f"      <result_name>{result}</result_name>\n      <time>5</time>\n<cpu_time>{cpu_time}</cpu_time>\n{more}"


def credits_of(cpu_time: float, flops: float = 2 * GIGA) -> float:
    """200 credits: a day of a computer of one GFLOPS."""
    return cpu_time / 86400 * 200 * flops / GIGA


def test_recorded_trickles(server: Server) -> None:
    names = {re.findall("<result_name>(.*?)<", one)[0] for one in RECORDED}
    (name,) = names
    server.add_result(name)
    last = max(float(re.findall("<cpu_time>(.*?)<", one)[0]) for one in RECORDED)
    for one in RECORDED:
        server.receive(one)
    assert server.handler.one_pass("cpu_time") == len(RECORDED) > 1
    granted = credits_of(last)
    assert server.cpu_time_credited(name) == pytest.approx(last)
    for query, before in (
        ("select granted_credit from result where name='" + name + "'", 0),
        ("select total_credit from host where id=7", 100),
        ("select total_credit from user where id=70", 1000),
        ("select total_credit from team where id=700", 5000),
    ):
        assert server.value(query) == pytest.approx(before + granted), query
    assert server.value("select expavg_credit from host where id=7") > 0
    assert server.handler.one_pass("cpu_time") == 0, "all are handled"


def test_twice_late_and_out_of_order(server: Server) -> None:
    for cpu_time in (10, 10, 30, 20, 30):
        server.receive(text(cpu_time))
        server.handler.one_pass("cpu_time")
    assert server.value("select granted_credit from result") == pytest.approx(credits_of(30))


@pytest.mark.parametrize(
    ("message", "host"),
    [
        (text(10, more=""), 7),  # the run time, by trickle_up_period
        (text(10, result="r_1"), 7),
        (text(10), 8),  # of another computer
        (text(10), 99),
        (text("nan"), 7),
        (text("inf"), 7),
        (text(-5), 7),
        (text("ten"), 7),
        ("", 7),
        ("<cpu_time>10</cpu_time>", 7),
    ],
)
def test_what_credits_nothing_is_handled_all_the_same(server: Server, message: str, host: int) -> None:
    server.receive(message, host=host)
    server.receive(text(10), variety="another")
    assert server.handler.one_pass("cpu_time") == 1
    assert server.value("select sum(total_credit) from host") == 100
    assert server.value("select sum(handled) from msg_from_host") == 1


def test_no_more_than_its_processors_can_have_used(server: Server) -> None:
    server.receive(text(1e9), at=SENT + 100)
    server.handler.one_pass("cpu_time")
    assert server.cpu_time_credited("r_0") == 400


def test_no_faster_than_95_of_100_computers(server: Server) -> None:
    for speed in range(1, 101):
        server.connection.execute("insert into host values (null, 70, 1, ?, 0, 50, 0)", (speed * 1e7,))
    server.receive(text(10))
    server.handler.one_pass("cpu_time")
    assert server.value("select granted_credit from result") == pytest.approx(credits_of(10, 96e7))
    server.connection.execute("update host set p_fpops=0 where id=7")
    server.receive(text(20))
    server.handler.one_pass("cpu_time")
    assert server.value("select granted_credit from result") == pytest.approx(
        credits_of(10, 96e7) + credits_of(10, 51e7)
    )


def test_a_result_name_in_the_content_is_not_believed(server: Server) -> None:
    server.add_result("other_0")
    server.receive(text(10, more="<fraction_done>1</fraction_done><result_name>other_0</result_name>"))
    server.handler.one_pass("cpu_time")
    assert server.cpu_time_credited("other_0") == 0
    assert server.cpu_time_credited("r_0") == 10


class Failing:
    """A connection whose n-th change fails, as when the database goes away or the handler is killed there."""

    def __init__(self, connection: sqlite3.Connection, at: int) -> None:
        self._connection, self._left = connection, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def cursor(self) -> Any:
        self._left -= 1
        if self._left < 0:
            raise sqlite3.OperationalError("gone away")
        return self._connection.cursor()


def test_broken_off_anywhere_it_grants_once(server: Server) -> None:
    server.receive(text(10))
    server.connection.commit()
    broken = 0
    for at in range(2, 40):
        try:
            credit_trickles.Handler(credit_trickles.Database(Failing(server.connection, at), "qmark")).one_pass(
                "cpu_time"
            )
        except sqlite3.OperationalError:
            broken += 1
            server.connection.rollback()
            granted = credits_of(10) if server.value("select handled from msg_from_host") else 0
            assert server.value("select total_credit from user where id=70") == pytest.approx(1000 + granted)
        else:
            break
    assert broken > 8
    assert server.value("select total_credit from host where id=7") == pytest.approx(100 + credits_of(10))
    assert server.value("select total_credit from user where id=70") == pytest.approx(1000 + credits_of(10))


def test_the_average_is_boincs() -> None:
    """lib/util.cpp: half of it is left after a week without work; work adds what it is a day, weighted."""
    week = 7 * 86400
    assert credit_trickles.average(80, 1, 1 + week, 0, 0) == pytest.approx(40)
    assert credit_trickles.average(0, 0, 86400, 0, 5) == pytest.approx(5)
    assert credit_trickles.average(0, 1, 1 + week, 0, 70) == pytest.approx(5)
    assert credit_trickles.average(10, 100, 100, 0, 7) == pytest.approx(10 + 0.6931472, rel=1e-6)
