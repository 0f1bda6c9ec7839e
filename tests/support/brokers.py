"""Brokers for tests, each in a process of its own, ended in every case.

    with running_broker("activemq", tmp_path) as broker:
        ...  # broker.host, broker.port, broker.login, broker.passcode

As a program (`python -m tests.support.brokers`) it is the embedded broker: it prints its port and ends when its
standard input does, so it never outlives the tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import rabbitmq
from tests.support.limits import after
from tests.support.owned import owned

ROOT = Path(__file__).resolve().parents[2]
RUN_ACTIVEMQ = ROOT / "examples" / "activemq" / "run_activemq"
START_LIMIT_S = 60.0
KINDS = [
    pytest.param("embedded"),
    pytest.param("activemq", marks=pytest.mark.broker),
    pytest.param("rabbitmq", marks=pytest.mark.broker),
]
"""For `pytest.fixture(params=KINDS)`."""
KINDS_OF_2009 = KINDS[:2]
"""Those that programs of 2009 can use: RabbitMQ escapes colons for STOMP 1.0 too (docs/reference/brokers.md)."""


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where a broker is, and what it wants to be shown."""

    host: str
    port: int
    login: str
    passcode: str
    pid: int = 0


@contextlib.contextmanager
def running_broker(
    kind: str, tmp_path: Path, *, port: int = 0, limits: Mapping[str, Any] | None = None
) -> Iterator[BrokerAddress]:
    """A broker that accepts connections. `kind`: embedded, activemq or rabbitmq. `port` 0: a free one.

    `limits`: fields of BrokerLimits that differ, for the embedded one. Skips the test if the broker is not installed.
    """
    missing = {"activemq": _missing_of_activemq, "rabbitmq": rabbitmq.missing}.get(kind, list)()
    if missing:
        pytest.skip(f"{kind} cannot be had: {', '.join(missing)} missing (tools/setup check installs it)")
    login, passcode = "tester", secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        if kind == "embedded":
            command, mark = [sys.executable, "-m", "tests.support.brokers"], b"listening "
            environment = _environment(tmp_path, port, login, passcode, limits or {})
        elif kind == "activemq":
            port = port or free_port()
            command, mark = [str(RUN_ACTIVEMQ)], b"Connector stomp started"
            environment = _environment(tmp_path, port, login, passcode, {})
        else:
            port, mapper_port = port or free_port(), free_port()
            stack.enter_context(rabbitmq.port_mapper(mapper_port))
            command, mark = [str(rabbitmq.SERVER)], rabbitmq.MARK
            environment = rabbitmq.prepare(
                tmp_path,
                port=port,
                distribution_port=free_port(),
                mapper_port=mapper_port,
                login=login,
                passcode=passcode,
            )
        log = tmp_path / f"{kind}.log"
        with log.open("ab") as errors:
            process = subprocess.Popen(
                owned(command), cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        draining = threading.Thread(target=_drain, args=(process,), daemon=True)
        stack.callback(lambda: draining.join(10) if draining.ident else None)  # tests count threads
        stack.callback(_end, process, at_once=kind == "rabbitmq")
        line = _wait_for(process, mark, log)
        draining.start()
        yield BrokerAddress("127.0.0.1", port or int(line.split()[-1]), login, passcode, process.pid)


def _environment(slot: Path, port: int, login: str, passcode: str, limits: Mapping[str, Any]) -> dict[str, str]:
    """What the wrapper gives; for the embedded one its limits too."""
    return {
        **os.environ,
        "VMWRAPPER_SLOT": str(slot),
        "VMWRAPPER_BROKER_PORT": str(port),
        "VMWRAPPER_BROKER_LOGIN": login,
        "VMWRAPPER_BROKER_PASSCODE": passcode,
        "BROKER_LIMITS": json.dumps(dict(limits)),
    }


def _drain(process: subprocess.Popen[bytes]) -> None:
    """Read what it goes on saying: a full pipe would stop it."""
    assert process.stdout is not None
    with contextlib.suppress(OSError, ValueError):
        while os.read(process.stdout.fileno(), 65536):
            pass


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _missing_of_activemq() -> list[str]:
    home = os.environ.get("ACTIVEMQ_HOME", "/usr/share/activemq")
    needs = {"java": shutil.which("java") is not None, "activemq": (Path(home) / "bin/activemq.jar").exists()}
    return [what for what, there in needs.items() if not there]


def _wait_for(process: subprocess.Popen[bytes], mark: bytes, log: Path) -> str:
    assert process.stdout is not None
    deadline = after(START_LIMIT_S)
    seen = b""
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([process.stdout], [], [], left)
        data = os.read(process.stdout.fileno(), 65536) if ready else b""
        if not data:
            break
        seen += data
        for line in seen.splitlines(keepends=True):
            if mark in line and line.endswith(b"\n"):
                return line.decode()
    said = seen.decode(errors="replace") + log.read_text(errors="replace")
    raise AssertionError(f"the broker did not start within {START_LIMIT_S:g} s; it said:\n{said[-3000:]}")


def _end(process: subprocess.Popen[bytes], *, at_once: bool) -> None:
    if at_once:  # RabbitMQ would take ten seconds to put things away that nobody wants
        process.kill()
    else:
        process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def main() -> None:
    """The embedded broker, until standard input ends."""
    import logging

    from twisted.internet.protocol import Protocol
    from twisted.internet.stdio import StandardIO

    from vmcontrol.broker.embedded import BrokerLimits, EmbeddedBroker
    from vmcontrol.common.eventloop import the_reactor

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    reactor = the_reactor()

    class Lifeline(Protocol):
        transport: Any

        def connectionLost(self, reason: object = None) -> None:
            reactor.stop()

    broker = EmbeddedBroker(
        reactor,
        port=int(os.environ["VMWRAPPER_BROKER_PORT"]),
        login=os.environ["VMWRAPPER_BROKER_LOGIN"],
        passcode=os.environ["VMWRAPPER_BROKER_PASSCODE"],
        limits=dataclasses.replace(BrokerLimits(), **json.loads(os.environ["BROKER_LIMITS"])),
    )
    port = broker.listen()
    lifeline = Lifeline()
    StandardIO(lifeline)
    lifeline.transport.write(f"listening {port}\n".encode())
    reactor.run()


if __name__ == "__main__":
    main()
