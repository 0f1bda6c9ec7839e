"""Brokers for the agent's tests, as (port, login, passcode)."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

EMBEDDED = """
import sys
from twisted.internet import reactor
from twisted.internet.stdio import StandardIO
from twisted.internet.protocol import Protocol
from vmcontrol.broker.embedded import EmbeddedBroker

class Lifeline(Protocol):
    def connectionLost(self, reason=None):
        reactor.stop()

StandardIO(Lifeline())
broker = EmbeddedBroker(reactor, port=int(sys.argv[1]), login="guest", passcode="secret")
sys.stderr.write(f"{broker.listen()}\\n")
reactor.run()
"""


class Broker(NamedTuple):
    port: int
    login: str
    passcode: str


@contextlib.contextmanager
def embedded_broker(port: int = 0) -> Iterator[Broker]:
    """HostMain's embedded broker in a process of its own; it ends with the test."""
    command = [sys.executable, "-c", EMBEDDED, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        try:
            yield Broker(int(process.stderr.readline()), "guest", "secret")
        finally:
            process.kill()
