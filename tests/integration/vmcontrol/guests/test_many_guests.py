"""Two hundred guests on one broker, of each kind; and on HostMain with its own broker."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import DeferredList

from tests.support.brokers import KINDS, BrokerAddress, running_broker
from tests.support.conversations import a_conversation
from tests.support.crowd import crowd, id_of
from tests.support.hostmains import running_hostmain, with_broker_port
from tests.support.limits import after
from vmcontrol.common import eventloop
from vmcontrol.common.eventloop import the_reactor
from vmcontrol.stomp.client import StompClient

GUESTS = 200
LIMIT_S = 30.0
ALLOWED_KB = 100_000
"""HostMain with the embedded broker and all guests; some 47 MB without any."""


@pytest.fixture(params=KINDS)
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BrokerAddress]:
    with running_broker(request.param, tmp_path) as address:
        yield address


async def until(condition: Callable[[], bool], what: str) -> None:
    async def look() -> None:
        while not condition():
            await eventloop.sleep(the_reactor(), 0.02)

    await eventloop.with_limit(the_reactor(), LIMIT_S, what, look())


@pytest_twisted.ensureDeferred
async def test_two_hundred_guests_on_one_broker(broker: BrokerAddress) -> None:
    conversation = a_conversation(the_reactor())
    client = StompClient(the_reactor(), name="HostMain", reconnect=True)
    conversation.use(client)
    client.connect(broker.host, broker.port, broker.login, broker.passcode)
    try:
        await until(lambda: conversation.connected, "the broker")
        everybody = {id_of(number) for number in range(GUESTS)}

        def known() -> set[str]:
            return {guest.id for guest in conversation.guests.all()}

        with crowd(broker, GUESTS) as guests:
            guests.say("beacons 1")  # a HELLO may be lost before a broker has acted on our subscription
            await until(lambda: known() == everybody, "all guests")
            asked = sorted(everybody)[
                ::10
            ]  # each is delivered to all of them: that is how the messages of protocol 1 are
            pings = [eventloop.start(conversation.ping(id, LIMIT_S)) for id in asked]
            answers: Any = await DeferredList(pings, fireOnOneErrback=True)
            assert len(answers) == len(asked)
            guests.say("bye")
            await until(lambda: not known(), "the guests' good-bye")
    finally:
        await conversation.close()


def test_hostmain_with_two_hundred_guests(tmp_path: Path) -> None:
    login = {"VMWRAPPER_BROKER_LOGIN": "guest", "VMWRAPPER_BROKER_PASSCODE": "secret"}
    with running_hostmain(tmp_path, with_broker_port(), login) as host:
        port = host.event("broker")["port"]
        with crowd(BrokerAddress("127.0.0.1", port, "guest", "secret"), GUESTS) as guests:
            deadline = after(LIMIT_S)
            while len(there := host.api.getStatus()["guests"]) < GUESTS:
                assert time.monotonic() < deadline, f"{len(there)} guests"
                guests.say("beacons 1")
                guests.wait("done")
            began = time.monotonic()
            host.vm()  # one more, with a real agent; everything works as with one
            assert host.api.ping("vm") == "PONG from vm"
            host.api.runCommand("vm", {"id": "c1", "command": "/bin/true"})
            assert host.finished("c1")["result"]["exit_status"] == 0
            assert time.monotonic() - began < LIMIT_S
            assert len(host.api.getStatus()["guests"]) == GUESTS + 1
        status = Path(f"/proc/{host.process.pid}/status").read_text()
        peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
        assert peak < ALLOWED_KB


def test_enough_files_may_be_open() -> None:
    """Else the two above fail for a reason that is not ours."""
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > GUESTS + 50
