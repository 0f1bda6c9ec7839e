#!/usr/bin/env python3
"""A trickle handler: credits by the CPU time that vmwrapper reports at each snapshot. A daemon of a BOINC project.

    credit_trickles.py [--variety cpu_time] [--one_pass] [--project FOLDER]

It reads the rows of the table msg_from_host, into which the scheduler writes what computers send, as the handlers in
BOINC's sched/ do (trickle_handler.cpp); the amounts and averages are those of sched/credit.cpp. Needs Python 3.9 and
Debian's python3-mysqldb. Run one of it, as config.xml's <daemon> does, and the validator with --no_credit, which would
grant the same work once more.

A trickle says how much CPU time a result has used in all; granted is what is more than what was granted before. So it
does not matter that one comes twice, late, or never. Message, credit and what was granted change in one transaction.
What a computer can invent is bounded: only results that it has, no more than its processors can have used since the
result was sent, no faster than 95 of 100 computers.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

COBBLESTONE_SCALE = 200 / 86400e9
"""Credits for a floating-point operation (lib/common_defs.h)."""
HALF_LIFE_S = 7 * 86400
"""Of the average credit (sched/sched_util_basic.h)."""
LOOK_EVERY_S = 5
BATCH = 1000
OWN_TABLE = "create table if not exists vmwrapper_credited (resultid integer primary key, cpu_time double not null)"

log = logging.getLogger("credit_trickles")


class BadTrickle(Exception):  # noqa: N818
    """A message that credits nothing; `str` says why."""


class Database:
    """The project's database, by a connection of Python's DB-API."""

    def __init__(self, connection: Any, paramstyle: str) -> None:
        self.connection = connection
        self._mark = "?" if paramstyle == "qmark" else "%s"

    def rows(self, query: str, *values: object) -> list[Any]:
        cursor = self.connection.cursor()
        try:
            cursor.execute(query.replace("?", self._mark), values)
            return list(cursor.fetchall())
        finally:
            cursor.close()

    def change(self, query: str, *values: object) -> None:
        cursor = self.connection.cursor()
        try:
            cursor.execute(query.replace("?", self._mark), values)
        finally:
            cursor.close()


def reported(xml: str) -> tuple[str, float]:
    """Result name and CPU time of a message's text. Raises BadTrickle.

    The client puts name and time before what the application wrote; variety is a column of its own. A message without
    <fraction_done> is that of trickle_up_period: it reports the run time.
    """
    found = {
        name: re.findall(f"<{name}>([^<]*)</{name}>", xml) for name in ("result_name", "cpu_time", "fraction_done")
    }
    if not found["result_name"] or not found["cpu_time"]:
        raise BadTrickle("it names no result or no CPU time")
    if not found["fraction_done"]:
        raise BadTrickle("it reports the run time, not the CPU time")
    try:
        cpu_time = float(found["cpu_time"][-1])
    except ValueError:
        cpu_time = math.nan
    if not math.isfinite(cpu_time) or cpu_time < 0:
        raise BadTrickle(f"its CPU time is {found['cpu_time'][-1]!r}")
    return found["result_name"][0].strip(), cpu_time  # the first one: the client wrote it


def average(value: float, at: float, now: float, began: float, work: float) -> float:
    """lib/util.cpp, update_average: the new average credit a day."""
    if not at:
        return work * 86400 / max(now - began, 1)
    passed = max(now - at, 0)
    weight = math.exp(-passed * math.log(2) / HALF_LIFE_S)
    if 1 - weight > 1e-6:
        return value * weight + (1 - weight) * work * 86400 / passed
    return value * weight + math.log(2) * work * 86400 / HALF_LIFE_S


class Handler:
    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._db = database
        self._clock = clock
        self._db.change(OWN_TABLE)
        self._db.connection.commit()

    def one_pass(self, variety: str) -> int:
        """Handle all messages that are there; how many. Raises what the database raises: nothing is half done then."""
        count = 0
        while True:
            rows = self._db.rows(
                "select id, hostid, create_time, xml from msg_from_host where variety=? and handled=0"
                f" order by id limit {BATCH}",
                variety,
            )
            for row in rows:
                self._handle(*row)
            count += len(rows)
            if not rows:
                self._db.connection.commit()  # the next look is a transaction of its own: it sees what is new
                return count

    def _handle(self, message: int, hostid: int, create_time: float, xml: str | bytes) -> None:
        try:
            try:
                self._credit(hostid, create_time, xml if isinstance(xml, str) else xml.decode("utf-8", "replace"))
            except BadTrickle as why:
                log.info("message %d of host %d credits nothing: %s", message, hostid, why)
            self._db.change("update msg_from_host set handled=1 where id=?", message)
            self._db.connection.commit()
        except BaseException:
            self._db.connection.rollback()
            raise

    def _credit(self, hostid: int, create_time: float, xml: str) -> None:
        name, cpu_time = reported(xml)
        results = self._db.rows("select id, hostid, sent_time from result where name=?", name)
        hosts = self._db.rows(
            "select id, userid, p_ncpus, p_fpops, expavg_credit, expavg_time from host where id=?", hostid
        )
        if not results or not hosts or results[0][1] != hostid:
            raise BadTrickle(f"this computer has no result {name}")
        (result, _, sent), (_, userid, ncpus, fpops, *host_average) = results[0], hosts[0]
        most = max(create_time - sent, 0) * max(ncpus, 1)
        if cpu_time > most:
            log.warning("%s: %.0f s of CPU time since it was sent cannot be; taken as %.0f s", name, cpu_time, most)
            cpu_time = most
        before = self._db.rows("select cpu_time from vmwrapper_credited where resultid=?", result)
        more = cpu_time - (before[0][0] if before else 0)
        if more <= 0:
            return
        credit = more * self._speed(fpops) * COBBLESTONE_SCALE
        if before:
            self._db.change("update vmwrapper_credited set cpu_time=? where resultid=?", cpu_time, result)
        else:
            self._db.change("insert into vmwrapper_credited (resultid, cpu_time) values (?, ?)", result, cpu_time)
        self._db.change("update result set granted_credit=granted_credit+? where id=?", credit, result)
        self._grant("host", hostid, credit, host_average, sent)
        self._grant_others("user", userid, credit, sent)
        log.info("%s: %.3f credits for %.1f s more of CPU time", name, credit, more)

    def _grant_others(self, table: str, identity: int, credit: float, sent: float) -> None:
        extra = ", teamid" if table == "user" else ""
        rows = self._db.rows(f"select expavg_credit, expavg_time{extra} from {table} where id=?", identity)
        if rows:
            self._grant(table, identity, credit, rows[0][:2], sent)
            if table == "user" and rows[0][2]:
                self._grant_others("team", rows[0][2], credit, sent)

    def _grant(self, table: str, identity: int, credit: float, averaged: Sequence[float], sent: float) -> None:
        now = self._clock()
        self._db.change(
            f"update {table} set total_credit=total_credit+?, expavg_credit=?, expavg_time=? where id=?",
            credit,
            average(averaged[0], averaged[1], now, sent, credit),
            now,
            identity,
        )

    def _speed(self, fpops: float) -> float:
        """A processor's speed, as sched/trickle_credit.cpp bounds it."""
        if fpops <= 0:
            return self._percentile(50, 1e9)
        return min(fpops, self._percentile(95, fpops))

    def _percentile(self, percent: int, default: float) -> float:
        ((count,),) = self._db.rows("select count(*) from host where expavg_credit>10")
        if not count:
            return default
        rows = self._db.rows(
            "select p_fpops from host where expavg_credit>10 order by p_fpops"
            f" limit 1 offset {min(int(count * percent / 100), count - 1)}"
        )
        return float(rows[0][0])


def connect(project: Path) -> Database:
    """To the database that the project's config.xml names."""
    import MySQLdb

    config = ElementTree.parse(project / "config.xml").getroot().find("config")
    if config is None:
        raise SystemExit(f"{project / 'config.xml'} has no <config>")
    words = {"db": "db_name", "host": "db_host", "user": "db_user", "passwd": "db_passwd"}
    given = {name: (config.findtext(element) or "").strip() for name, element in words.items()}
    return Database(MySQLdb.connect(**{name: value for name, value in given.items() if value}), MySQLdb.paramstyle)


def main() -> int:
    parser = argparse.ArgumentParser(description="Credits by the CPU time that vmwrapper's trickles report.")
    parser.add_argument("--variety", default="cpu_time")
    parser.add_argument("--one_pass", action="store_true", help="handle what is there and end")
    parser.add_argument("--project", type=Path, default=Path(".."), help="the project's folder (default: %(default)s)")
    options, _ = parser.parse_known_args()  # bin/start adds -d LEVEL
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    handler = Handler(connect(options.project))
    while True:
        handler.one_pass(options.variety)
        if options.one_pass:
            return 0
        for _ in range(LOOK_EVERY_S):
            if (options.project / "stop_daemons").exists():
                return 0
            time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
