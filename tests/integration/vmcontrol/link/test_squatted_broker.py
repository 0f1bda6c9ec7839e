"""The port of the job's broker, taken by a program that is not the job's: it is told nothing, and ends nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import pytest_twisted

from tests.support.agenthost import wait_until
from tests.support.hostmains import LIMIT_S, embedded_broker, running_hostmain
from vmcontrol.common import eventloop
from vmcontrol.common.eventloop import the_reactor, with_limit
from vmcontrol.common.ownbroker import JobsPrograms, NotOurBroker
from vmcontrol.link.outerbroker import OuterBroker
from vmcontrol.link.streams import RelayEnd

SQUATTER = """
import os, socket, sys
listener = socket.create_server(("127.0.0.1", 0))
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():  # nobody's child: the job's processes are known by their descent
    os._exit(0)
print(os.getpid(), listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
connection.settimeout(60)
with open(sys.argv[1], "wb", buffering=0) as heard:
    while data := connection.recv(4096):
        heard.write(data)
"""


class Squatter:
    """Listens at a port of its own, and keeps what it is told."""

    def __init__(self, folder: Path) -> None:
        self.heard = folder / "heard"
        with subprocess.Popen([sys.executable, "-c", SQUATTER, str(self.heard)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            pid, port = process.stdout.readline().split()
        self.process, self.port = psutil.Process(int(pid)), int(port)

    def end(self) -> bytes:
        self.process.kill()
        return self.heard.read_bytes() if self.heard.exists() else b""


def adopted_by_us(process: psutil.Process) -> bool:
    return os.getpid() in [parent.pid for parent in process.parents()]


@pytest.fixture
def squatter(tmp_path: Path) -> Squatter:
    found = Squatter(tmp_path)
    if adopted_by_us(found.process):
        found.end()
        pytest.skip("NOT TESTED: this process adopts orphans, so a stranger cannot be made")
    return found


def test_a_squatter_is_not_told_the_passcode(tmp_path: Path, squatter: Squatter) -> None:
    login = {"VMWRAPPER_BROKER_LOGIN": "run", "VMWRAPPER_BROKER_PASSCODE": "the-passcode"}
    config = f"[Broker]\nhost = 127.0.0.1\nport = {squatter.port}\n"
    try:
        with running_hostmain(tmp_path, config, login) as host:
            wait_until(lambda: "no program of this job listens" in host.log(), "the refusal")
            assert host.api.getStatus()["broker"] is False
    finally:
        heard = squatter.end()
    assert heard == b""
    assert "the-passcode" not in host.log()


def test_a_broker_of_the_job_is_known_by_its_descent(tmp_path: Path) -> None:
    with embedded_broker() as (port, login, passcode):  # a child of this process, as HostMain is
        environment = {"VMWRAPPER_BROKER_LOGIN": login, "VMWRAPPER_BROKER_PASSCODE": passcode}
        with running_hostmain(tmp_path, f"[Broker]\nhost = localhost\nport = {port}\n", environment) as host:
            host.event("broker-connected", LIMIT_S)


@pytest_twisted.ensureDeferred
async def test_no_guest_is_carried_to_a_squatter(squatter: Squatter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmcontrol.common.ownbroker.OURS_LIMIT_S", 0.3)
    reactor = the_reactor()
    broker = OuterBroker(reactor, "127.0.0.1", squatter.port, "run", "pass", programs=JobsPrograms(os.getpid()))
    try:
        with pytest.raises(NotOurBroker, match="was not told"):
            await with_limit(reactor, LIMIT_S, "carrying", eventloop.start(broker.carry(RelayEnd(reactor), "worker")))
    finally:
        assert squatter.end() == b""


@pytest.mark.parametrize("address", ["127.0.0.1", "::ffff:127.0.0.1"])
def test_the_process_at_the_other_end_is_found_when_it_has_accepted(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET  # as a JVM listens
    with socket.socket(family) as listener, socket.socket() as client:
        listener.bind((address, 0))
        listener.listen()
        client.connect(("127.0.0.1", listener.getsockname()[1]))
        ends = client.getsockname(), client.getpeername()
        ours = JobsPrograms(os.getpid())
        assert not ours.have(*ends), "nobody has accepted it yet"
        with listener.accept()[0]:
            assert ours.have(*ends)
            ours.wait_in_thread(*ends, threading.Event())
            with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
                assert not JobsPrograms(other.pid).have(*ends)
                other.communicate(b"\n")
