"""Many guests in one process: real STOMP 1.2 connections and words, no programs. For tests and bench/brokers.

    with crowd(broker, 200) as guests:      # all connected, subscribed, and HELLO sent
        guests.say("beacons 100")           # each sends so many STILL_ALIVE at once

As a program (`python -m tests.support.crowd HOST PORT LOGIN COUNT`, passcode in CROWD_PASSCODE) it says "ready"
when every guest is subscribed, does what its standard input says, answers "done", and ends with its standard input. A
PING is answered by the guests that its `to` means.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.protocol import Protocol
from twisted.internet.stdio import StandardIO

from tests.support.brokers import BrokerAddress
from tests.support.limits import after
from vmcontrol.broker.frames import Frame, FrameDecoder, Version, encode
from vmcontrol.common.eventloop import start_logged, the_reactor
from vmcontrol.protocol import messages

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 60.0


def id_of(number: int) -> str:
    """The MAC of a guest."""
    return f"02:C0:00:00:{number >> 8:02X}:{number & 255:02X}"


class Crowd:
    """The process with the guests."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._said = b""
        self.pid = process.pid

    def say(self, command: str) -> None:
        """Have it done; returns at once."""
        assert self._process.stdin is not None
        self._process.stdin.write(command.encode() + b"\n")
        self._process.stdin.flush()

    def wait(self, word: str, limit_s: float = START_LIMIT_S) -> None:
        """Until it says so."""
        assert self._process.stdout is not None
        deadline = after(limit_s)
        while word.encode() + b"\n" not in self._said:
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._process.stdout], [], [], left)
            data = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            assert data, f"the crowd did not say {word!r} within {limit_s:g} s; it said {self._said!r}"
            self._said += data
        self._said = self._said.partition(word.encode() + b"\n")[2]


@contextlib.contextmanager
def crowd(broker: BrokerAddress, count: int) -> Iterator[Crowd]:
    """Guests on a broker; they are gone afterwards, without BYE."""
    command = [sys.executable, "-m", "tests.support.crowd", broker.host, str(broker.port), broker.login, str(count)]
    environment = {**os.environ, "CROWD_PASSCODE": broker.passcode, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            guests = Crowd(process)
            guests.wait("ready")
            yield guests
        finally:
            process.kill()


class _Guest(Protocol):
    transport: Any

    def __init__(self, id: str, login: str, passcode: str, ready: Any) -> None:
        self._id = id
        self._ready = ready
        self._credentials = {"login": login, "passcode": passcode}
        self._decoder = FrameDecoder(version=Version.V1_2)

    def connectionMade(self) -> None:
        self.transport.setTcpNoDelay(True)
        self._send(Frame("CONNECT", {"accept-version": "1.2", "host": "/", **self._credentials}))

    def dataReceived(self, data: bytes) -> None:
        self._decoder.receive(data)
        while (event := self._decoder.next_event()) is not None:
            if isinstance(event, Frame):
                self._frame(event)

    def _frame(self, frame: Frame) -> None:
        if frame.command == "CONNECTED":
            self._send(Frame("SUBSCRIBE", {"id": "1", "destination": messages.REQUESTS, "receipt": "r"}))
        elif frame.command == "RECEIPT":
            self.word(messages.Hello(self._id, "10.0.2.15", 2, "crowd"))
            self._ready()
        elif frame.command == "ERROR":
            raise RuntimeError(f"ERROR from the broker: {dict(frame.headers)} {frame.body!r}")
        elif frame.command == "MESSAGE" and messages.addressed_to(frame.headers.get("to", ""), self._id):
            message = messages.decode(frame.headers, frame.body.decode())
            if isinstance(message, messages.Ping):
                self.word(messages.Pong(self._id, message.timestamp))

    def word(self, message: messages.Message) -> None:
        encoded = messages.encode(message)
        self._send(Frame("SEND", {"destination": encoded.destination, **encoded.headers}, encoded.body.encode()))

    def beacons(self, count: int) -> None:
        for _ in range(count):
            self.word(messages.StillAlive(self._id, "10.0.2.15", 2, "crowd"))

    def bye(self) -> None:
        self.word(messages.Bye(self._id, "10.0.2.15"))

    def _send(self, frame: Frame) -> None:
        self.transport.write(encode(frame, Version.V1_2))


class _Orders(Protocol):
    """Standard input and output."""

    transport: Any

    def __init__(self, reactor: Any, guests: list[_Guest]) -> None:
        self._reactor = reactor
        self._guests = guests
        self._line = b""

    def dataReceived(self, data: bytes) -> None:
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            order, _, count = line.decode().partition(" ")
            for guest in self._guests:
                guest.bye() if order == "bye" else guest.beacons(int(count))
            self.transport.write(b"done\n")

    def connectionLost(self, reason: object = None) -> None:
        if self._reactor.running:
            self._reactor.stop()


async def _gather(reactor: Any, guests: list[_Guest], orders: _Orders, address: tuple[str, int, str, int]) -> None:
    host, port, login, count = address
    left = count

    def ready() -> None:
        nonlocal left
        left -= 1
        if not left:
            orders.transport.write(b"ready\n")

    for number in range(count):
        guest = _Guest(id_of(number), login, os.environ["CROWD_PASSCODE"], ready)
        await connectProtocol(TCP4ClientEndpoint(reactor, host, port, timeout=30), guest)
        guests.append(guest)


def main() -> None:
    """The program."""
    reactor = the_reactor()
    host, port, login, count = sys.argv[1:]
    guests: list[_Guest] = []
    orders = _Orders(reactor, guests)
    StandardIO(orders)
    start_logged(_gather(reactor, guests, orders, (host, int(port), login, int(count))), "the crowd")
    reactor.run()


if __name__ == "__main__":
    main()
