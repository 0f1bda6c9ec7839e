"""Words through each broker: `python -m bench.brokers [--guests 1 20 200] [--kinds embedded activemq rabbitmq]`.

The guests are one process with a real connection each (tests.integration.crowd), HostMain's side is Conversation, the
broker a process of its own. For each number of guests:

    round trip    one PING and its PONG, one after the other. Each request reaches every guest, as in 2009.
    words/s       beacons that all guests send at once, until HostMain has read the last
    memory        of the broker's process, resident, after that

At the end: the memory of a HostMain that has its own broker, with no guest and with the most.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from twisted.internet.defer import Deferred

from tests.support.brokers import BrokerAddress, running_broker
from tests.support.conversations import no_outputs
from tests.support.crowd import crowd, id_of
from tests.support.hostmains import running_hostmain, with_broker_port
from vmcontrol.common.eventloop import sleep, start, the_reactor, with_limit
from vmcontrol.guests.conversation import Conversation
from vmcontrol.stomp.client import StompClient

LIMIT_S = 120.0


class Counting(Conversation):
    """Knows how many messages have come."""

    messages = 0
    awaited = 0
    last: Deferred[None] | None = None

    def received(self, headers: Mapping[str, str], body: str) -> None:
        super().received(headers, body)
        self.messages += 1
        if self.last is not None and self.messages >= self.awaited:
            waiting, self.last = self.last, None
            waiting.callback(None)

    def come(self, count: int) -> Deferred[None]:
        """Fires when so many more have come."""
        self.awaited, self.last = self.messages + count, Deferred()
        return self.last


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1000


async def measure(broker: BrokerAddress, guests: int, options: argparse.Namespace) -> str:
    reactor = the_reactor()
    host = Counting(
        reactor,
        grace_s=LIMIT_S,
        on_broker=lambda *_: None,
        on_guest=lambda _guest, _id: None,
        fetch=no_outputs,
    )
    client = StompClient(reactor, name="HostMain", reconnect=True)
    host.use(client)
    client.connect(broker.host, broker.port, broker.login, broker.passcode)
    try:
        while not host.connected:
            await sleep(reactor, 0.05)
        with crowd(broker, guests) as others:
            await sleep(reactor, 1.0)  # what began with HELLO is over
            trips = []
            for number in range(options.pings):
                began = time.perf_counter()
                await host.ping(id_of(number % guests), LIMIT_S)
                trips.append((time.perf_counter() - began) * 1000)
            each = max(1, options.words // guests)
            began = time.perf_counter()
            all_there = host.come(each * guests)
            others.say(f"beacons {each}")
            await with_limit(reactor, LIMIT_S, "the words", all_there)
            rate = each * guests / (time.perf_counter() - began)
            memory = resident_mb(broker.pid)
    finally:
        await host.close()
    worst = statistics.quantiles(trips, n=20)[-1]
    return f"{statistics.median(trips):8.2f} {worst:8.2f} {rate:9.0f} {memory:9.1f}"


async def run(options: argparse.Namespace, folder: Path) -> None:
    print(f"{'broker':<10} {'guests':>6} {'ms':>8} {'95 %':>8} {'words/s':>9} {'MB':>9}")
    for kind in options.kinds:
        for guests in options.guests:
            with running_broker(kind, folder) as broker:
                print(f"{kind:<10} {guests:>6} {await measure(broker, guests, options)}", flush=True)
    most = max(options.guests)
    slot = folder / "slot"
    slot.mkdir()
    login = {"VMWRAPPER_BROKER_LOGIN": "guest", "VMWRAPPER_BROKER_PASSCODE": "secret"}
    with running_hostmain(slot, with_broker_port(), login) as host:
        address = BrokerAddress("127.0.0.1", host.event("broker")["port"], "guest", "secret")
        before = resident_mb(host.process.pid)
        with crowd(address, most) as others:
            others.say("beacons 20")
            others.wait("done")
            await sleep(the_reactor(), 3.0)
            print(
                f"HostMain with its broker: {before:.1f} MB; with {most} guests: {resident_mb(host.process.pid):.1f} MB"
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.brokers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--guests", type=int, nargs="+", default=[1, 20, 200])
    parser.add_argument("--kinds", nargs="+", default=["embedded", "activemq", "rabbitmq"])
    parser.add_argument("--words", type=int, default=10_000, help="beacons in all (%(default)s)")
    parser.add_argument("--pings", type=int, default=100, help="round trips (%(default)s)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    status = 0

    def failed(failure: object) -> None:
        nonlocal status
        status = 1
        print(failure, file=sys.stderr)

    def begin() -> None:
        done = start(run(options, Path(folder)))
        done.addErrback(failed)
        done.addBoth(lambda _: the_reactor().stop())

    with tempfile.TemporaryDirectory() as folder:
        the_reactor().callWhenRunning(begin)
        the_reactor().run()
    return status


if __name__ == "__main__":
    sys.exit(main())
