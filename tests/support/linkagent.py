"""A program that is the agent's end of the link and nothing else: LinkServer and FileServer, on free ports of loopback.

    python -m tests.support.linkagent SECRET BASE_FOLDER [FILE_SIZE_LIMIT | sha512 | slow-sync]

Prints one JSON line: {"port", "stomp_port"}; then one for each broker offered, each clock set, each line that its echo
client gets over the carrier. Ends at the end of its stdin.
"""

import faulthandler
import json
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from twisted.internet import reactor as global_reactor
from twisted.internet.protocol import ClientFactory, Protocol
from twisted.internet.stdio import StandardIO

from guest.agent.linkserver import LinkServer

reactor: Any = global_reactor


def say(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


class Secret:
    """In memory alone."""

    def __init__(self, secret: bytes) -> None:
        self.current = secret

    def replace(self, secret: bytes) -> None:
        self.current = secret


class ToldSecret(Secret):
    def replace(self, secret: bytes) -> None:
        super().replace(secret)
        say(secret=secret.decode())


class Speaker(Protocol):
    """Stands for the agent's STOMP client: says who it is, and tells what it hears."""

    transport: Any = None

    def __init__(self, login: str) -> None:
        self.login = login

    def connectionMade(self) -> None:
        self.transport.write(f"hello {self.login}\n".encode())

    def dataReceived(self, data: bytes) -> None:
        if data == b"flood\n":
            for _ in range(64):
                self.transport.write(bytes(1024 * 1024))
            return
        say(heard=data.decode("ascii", "replace")[:200], size=len(data))

    def connectionLost(self, reason: object = None) -> None:
        say(session="ended")


class OnEnd(Protocol):
    def connectionLost(self, reason: object = None) -> None:
        reactor.stop()


def main() -> None:
    faulthandler.register(signal.SIGUSR1)
    secret, base = sys.argv[1].encode(), Path(sys.argv[2])
    if sys.argv[3:] == ["sha512"]:
        patch("guest.files.server.digest_algorithm", return_value="sha512").start()  # as if it were emulated
    elif sys.argv[3:] == ["slow-sync"]:
        patch(
            "vmcontrol.common.atomicfile.fsync_folder", side_effect=lambda _: time.sleep(2)
        ).start()  # a disk with much to do
    elif len(sys.argv) > 3:
        limit = int(sys.argv[3])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    def offered(login: str, passcode: str) -> None:
        say(offered=login, passcode=passcode)
        factory: Any = ClientFactory()
        factory.buildProtocol = lambda _: Speaker(login)
        reactor.connectTCP("127.0.0.1", server.stomp_port, factory)

    server = LinkServer(
        reactor,
        ToldSecret(secret),
        base,
        offered,
        lambda seconds: say(clock=seconds),
        describe=lambda: {"id": "52:54:00:00:00:01", "ip": "10.0.2.15"},
        interface="127.0.0.1",
        port=0,
        stomp_port=0,
    )
    server.start()
    StandardIO(OnEnd())
    say(port=server.port, stomp_port=server.stomp_port)
    reactor.run()


if __name__ == "__main__":
    main()
