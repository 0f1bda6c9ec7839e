"""What another account of the computer can do at HostMain's ports while a job runs: nothing to the job."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import resource
import socket
import subprocess
import time
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.support.agenthost import wait_until
from tests.support.brokers import free_port
from tests.support.hostmains import (
    EMBEDDED,
    LIMIT_S,
    SECRET,
    HostMainProcess,
    RunningHost,
    running_hostmain,
    with_broker_port,
)
from tests.support.slots import HOST_MAIN_TASK, TestSlot
from vmcontrol.api import site as service
from vmcontrol.common import admission, door

AUTHORIZATION = "Basic " + base64.b64encode(f"vmwrapper:{SECRET}".encode()).decode()
CALL = xmlrpc.client.dumps((), "listAvailableVMs").encode()


def crowd(port: int, number: int) -> list[socket.socket]:
    """Connections that say nothing."""
    return [socket.create_connection(("127.0.0.1", port), LIMIT_S) for _ in range(number)]


def is_closed(connection: socket.socket, limit_s: float = LIMIT_S) -> bool:
    connection.settimeout(limit_s)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def until_the_end(connection: socket.socket) -> bytes:
    """What comes until the other side closes it; what it sent last may be lost when it had more to read."""
    connection.settimeout(LIMIT_S)
    said = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(65536):
            said += data
    return said


def still_open(connections: list[socket.socket]) -> int:
    return sum(not is_closed(one, 0.01) for one in connections)


@contextlib.contextmanager
def closing(connections: list[socket.socket]) -> Iterator[None]:
    try:
        yield
    finally:
        for one in connections:
            one.close()


def listening_ports(pid: int) -> set[int]:
    return {one.laddr.port for one in psutil.Process(pid).net_connections("tcp") if one.status == "LISTEN"}


class DoorTransport(xmlrpc.client.Transport):
    """Connections as the wrapper makes them."""

    def __init__(self, ours: socket.socket) -> None:
        super().__init__()
        self._ours = ours

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("localhost", timeout=LIMIT_S)
        connection.sock, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._ours, [door.KNOCK], [theirs.fileno()])
        return connection

    def single_request(self, *arguments: Any, **more: Any) -> Any:
        self.close()  # a connection for each call
        return super().single_request(*arguments, **more)


@contextlib.contextmanager
def hostmain_with_door(slot: Path, config: str = EMBEDDED) -> Iterator[tuple[HostMainProcess, Any]]:
    """HostMain and the wrapper's way to it."""
    ends = door.pair()
    assert ends is not None
    ours, theirs = ends
    ours.setblocking(True)
    host = HostMainProcess(slot, config, {"VMWRAPPER_DOOR_FD": str(theirs.fileno())}, pass_fds=[theirs.fileno()])
    theirs.close()
    try:
        yield host, xmlrpc.client.ServerProxy("http://localhost/RPC2", transport=DoorTransport(ours), allow_none=True)
    finally:
        host.close()
        ours.close()


# The whole job


@contextlib.contextmanager
def running_job(folder: Path, command: str) -> Iterator[tuple[TestSlot, subprocess.Popen[bytes]]]:
    slot = TestSlot(folder)
    slot.write("HostConfig.cfg", EMBEDDED)
    slot.write("disk.img", "")
    slot.job(
        HOST_MAIN_TASK,
        "<task><virtualmachine>worker</virtualmachine><image>disk.img</image><application>sh</application>"
        f"<app_pathVM>/bin</app_pathVM><command_line>-c '{command}'</command_line>"
        "<stdout_filename>out</stdout_filename></task>",
    )
    try:
        yield slot, slot.start("job.xml", DRIVE_HOST_MAIN="real")
    finally:
        slot.clean()


def test_a_job_runs_to_its_end_among_300_idle_connections(tmp_path: Path) -> None:
    crowded = tmp_path / "crowded"
    wait = f"for n in $(seq {int(LIMIT_S * 10)}); do test -e {crowded} && break; sleep 0.1; done"
    with running_job(tmp_path, f"{wait}; for n in 1 2 3 4 5 6; do echo $n; sleep 0.5; done") as (slot, started):
        slot.wait_for("vmwrapper_ports.json", "xmlrpc")
        ports = json.loads(slot.text("vmwrapper_ports.json"))
        assert ports["broker"] is None, "a broker's port that nobody asked for"
        with closing(crowd(ports["xmlrpc"], 300)):
            crowded.touch()
            assert started.wait(60) == 0, slot.text("stderr.txt")
        assert slot.text("out") == "1\n2\n3\n4\n5\n6\n"
        assert "died" not in slot.text("stderr.txt")


def test_a_hostmain_that_was_killed_gets_a_new_door(tmp_path: Path) -> None:
    first = tmp_path / "first"
    with running_job(tmp_path, f"test -e {first} || {{ touch {first}; sleep 60; }}; echo second") as (slot, started):
        slot.wait_for(first.name)
        [hostmain] = [one for one in psutil.Process(started.pid).children() if "HostConfig" in " ".join(one.cmdline())]
        hostmain.kill()
        assert started.wait(60) == 0, slot.text("stderr.txt")
        assert slot.text("out") == "second\n"
        assert "HostMain died" in slot.text("stderr.txt")


def test_a_squatter_at_the_brokers_port_is_a_temporary_exit(tmp_path: Path) -> None:
    slot = TestSlot(tmp_path)
    config = "[Broker]\nport = 0\n"
    slot.write("HostConfig.cfg", config)
    slot.write(
        "broker",
        '#!/bin/sh\necho "$VMWRAPPER_BROKER_PORT" > port.new && mv port.new port\n'
        "while [ ! -e go ]; do sleep 0.1; done\nexit 1\n",
        executable=True,
    )
    slot.write("disk.img", "")
    slot.job(
        "<VMmanage_task><application>broker</application></VMmanage_task>",
        HOST_MAIN_TASK,
        "<task><virtualmachine>worker</virtualmachine><image>disk.img</image><application>broker</application></task>",
    )
    started = slot.start("job.xml", DRIVE_HOST_MAIN="real")
    try:
        slot.wait_for("port", "\n")
        with socket.create_server(("127.0.0.1", int(slot.text("port")))) as squatter:
            (slot.folder / "go").touch()
            assert started.wait(30) == 75, slot.text("stderr.txt")
            squatter.settimeout(0.01)
        assert "something else on this computer uses port" in slot.text("stderr.txt")
    finally:
        slot.clean()


# The door


def test_through_the_door_calls_need_no_port_and_no_secret(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        hostmain_with_door(tmp_path, EMBEDDED + f"xmlrpc_port = {taken.getsockname()[1]}\n") as (host, api),
    ):
        assert host.event("xmlrpc") == {"event": "xmlrpc", "host": "127.0.0.1", "port": 0, "door": True}
        assert api.listAvailableVMs() == []
        assert listening_ports(host.process.pid) == set()
        assert "address already in use" in host.log().lower()
        taken.close()
        assert host.event("xmlrpc")["port"] in listening_ports(host.process.pid), "tried again"
        assert api.shutdown(False) is not None
        assert host.ended() == 0


def test_what_was_asked_before_hostmain_listens_is_answered(tmp_path: Path) -> None:
    with hostmain_with_door(tmp_path) as (host, api):
        assert api.listAvailableVMs() == []  # at once: the connection waits in the door
        assert host.process.poll() is None


def test_hundreds_of_calls_wait_at_once(tmp_path: Path) -> None:
    with hostmain_with_door(tmp_path) as (_, api):
        api.defineVM("vm", "disk.img", {})
        waiting = []
        for _ in range(200):
            body = xmlrpc.client.dumps(("vm", ["Running"], LIMIT_S), "waitVM").encode()
            connection = api("transport").make_connection("")
            connection.request("POST", "/RPC2", body, {"Content-Type": "text/xml"})
            waiting.append(connection)
        api.start("vm")
        for connection in waiting:
            assert b"Running" in connection.getresponse().read()
            connection.close()


# The port: with a secret


def test_who_does_not_show_the_secret_is_dropped_and_harms_nobody(tmp_path: Path) -> None:
    with running_hostmain(tmp_path) as host:
        inside = http.client.HTTPConnection("127.0.0.1", host.port, timeout=LIMIT_S)  # a tool that was there before
        assert ask(inside) == 200
        began = time.monotonic()
        with closing(crowd(host.port, 300)) as _, closing(crowd(host.port, 40)):
            assert host.api.listAvailableVMs() == []
        with closing(idle := crowd(host.port, 300)):
            wait_until(lambda: still_open(idle) <= service.NEWCOMERS, "the oldest to be dropped")
            assert still_open(idle[-service.NEWCOMERS :]) == service.NEWCOMERS, "the newest stay"
            for _ in range(20):  # one that speaks at once is always heard
                assert host.connect(host.port).listAvailableVMs() == []
            wait_until(lambda: still_open(idle) == 0, "the others, after 5 s", 10)
        assert time.monotonic() - began >= service.SECRET_LIMIT_S
        assert ask(inside) == 200, "who has shown the secret is not counted"
        inside.close()
        assert len(host.log().splitlines()) < 30


def ask(connection: http.client.HTTPConnection) -> int:
    connection.request("POST", "/RPC2", CALL, {"Content-Type": "text/xml", "Authorization": AUTHORIZATION})
    with connection.getresponse() as response:
        response.read()
        return response.status


def test_half_a_request_is_not_waited_for(tmp_path: Path) -> None:
    """A header line every second (slow loris); endless ones; a body for which no secret was shown; many at once."""
    with running_hostmain(tmp_path) as host:
        before = psutil.Process(host.process.pid).memory_info().rss
        slow, endless, body, many = crowd(host.port, 4)
        with closing([slow, endless, body, many]):
            began = time.monotonic()
            slow.sendall(b"POST /RPC2 HTTP/1.1\r\n")
            with contextlib.suppress(OSError):
                endless.sendall(b"POST /RPC2 HTTP/1.1\r\nX: " + b"x" * 30_000_000)
            assert is_closed(endless)
            body.sendall(b"POST /RPC2 HTTP/1.1\r\nContent-Type: text/xml\r\nContent-Length: 1000000\r\n\r\n")
            with contextlib.suppress(OSError):
                many.sendall(b"POST /RPC2 HTTP/1.1\r\nContent-Type: text/xml\r\nContent-Length: 0\r\n\r\n" * 100_000)
            assert until_the_end(many).count(b"HTTP/1.1 401") <= 1, "only the first of them is read"
            while time.monotonic() - began < 2 * service.SECRET_LIMIT_S:
                try:
                    slow.sendall(b"X: y\r\n")
                    body.sendall(b"x")
                except OSError:
                    break
                assert host.api.listAvailableVMs() == []
                time.sleep(0.2)
            assert time.monotonic() - began < service.SECRET_LIMIT_S + 2.0
            assert is_closed(body)
        assert psutil.Process(host.process.pid).memory_info().rss - before < 16_000_000


# Without a secret, as in the original


def test_without_a_secret_there_is_one_pool(tmp_path: Path) -> None:
    port = free_port()
    host = HostMainProcess(tmp_path, EMBEDDED + f"xmlrpc_port = {port}\n", standalone=True)
    try:
        wait_until(lambda: "XML-RPC at" in host.log(), "HostMain")
        with closing(crowd(port, service.NEWCOMERS + 10)):
            assert host.connect(port, None).listAvailableVMs() == []
        with closing(idle := crowd(port, service.CONNECTIONS + 20)):
            wait_until(lambda: still_open(idle) <= service.CONNECTIONS, "those beyond the pool to be refused")
            assert still_open(idle[: service.CONNECTIONS]) == service.CONNECTIONS
        wait_until(lambda: calls(host, port), "room for one")
    finally:
        host.close()


def calls(host: HostMainProcess, port: int) -> bool:
    try:
        return bool(host.connect(port, None).listAvailableVMs() == [])
    except OSError:
        return False


# Descriptors


def test_descriptors_are_kept_back_and_their_end_ends_nothing(tmp_path: Path) -> None:
    """Few descriptors, and a port at which others may stay: the door works all the same."""
    limit = 160
    with hostmain_with_door(tmp_path, with_broker_port()) as (host, api):
        port, broker = host.event("xmlrpc")["port"], host.event("broker")["port"]
        resource.prlimit(host.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        with closing(crowd(broker, 200) + crowd(port, 200)):
            assert api.listAvailableVMs() == []
            wait_until(lambda: open_fds(host) <= limit - admission.DESCRIPTORS_KEPT_BACK, "what is too much to go")
            assert api.defineVM("vm", "disk.img", {}) is True
            assert api.start("vm") is True  # a process with its pipes
            assert api.waitGuest("vm", LIMIT_S) is True
            assert host.connect(port).listAvailableVMs() == ["vm"], "and tools are served"


def test_when_there_is_no_descriptor_at_all_hostmain_waits_without_spinning(tmp_path: Path) -> None:
    with running_hostmain(tmp_path) as host:
        api = host.connect(host.port)
        assert api.listAvailableVMs() == []  # a connection that stays
        process = psutil.Process(host.process.pid)
        used = open_fds(host)
        _, hard = resource.prlimit(host.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(host.process.pid, resource.RLIMIT_NOFILE, (min(8, used), hard))
        with closing(crowd(host.port, 40)):
            before = process.cpu_times()
            time.sleep(1.5)
            after = process.cpu_times()
            assert api.listAvailableVMs() == []
        assert after.user + after.system - before.user - before.system < 0.5
        resource.prlimit(host.process.pid, resource.RLIMIT_NOFILE, (hard, hard))
        assert host.connect(host.port).listAvailableVMs() == []


def open_fds(host: HostMainProcess) -> int:
    return len(list(Path(f"/proc/{host.process.pid}/fd").iterdir()))


# Ports and secrets


def test_no_port_is_opened_that_nobody_needs(tmp_path: Path) -> None:
    with running_hostmain(tmp_path) as host:
        host.vm()
        host.api.runCommand("vm", {"id": "c1", "command": "/bin/true"})
        host.finished("c1")
        assert listening_ports(host.process.pid) == {host.port}
        assert json.loads((tmp_path / "vmwrapper_ports.json").read_text()) == {"xmlrpc": host.port, "broker": None}
        connected = psutil.Process(host.process.pid).net_connections("tcp")
        assert not [one for one in connected if one.raddr and one.raddr.port == host.port], "it dials itself"
        assert not [name for name in threads(host) if "stomp" in name]


def threads(host: RunningHost) -> list[str]:
    return [path.read_text() for path in Path(f"/proc/{host.process.pid}/task").glob("*/comm")]


def test_secrets_of_the_run_are_in_no_argument_and_in_no_childs_environment(tmp_path: Path) -> None:
    secrets = {"VMWRAPPER_BROKER_LOGIN": "run", "VMWRAPPER_BROKER_PASSCODE": "the-passcode-of-this-run"}
    with running_hostmain(tmp_path, environment=secrets) as host:
        host.vm()
        family = [psutil.Process(host.process.pid), *psutil.Process(host.process.pid).children(recursive=True)]
        assert len(family) > 1
        for process in family:
            said = " ".join(process.cmdline())
            if process.pid != host.process.pid:
                said += " ".join(process.environ().values())
            assert SECRET not in said
            assert secrets["VMWRAPPER_BROKER_PASSCODE"] not in said
        assert SECRET not in host.log()
        assert secrets["VMWRAPPER_BROKER_PASSCODE"] not in host.log()
