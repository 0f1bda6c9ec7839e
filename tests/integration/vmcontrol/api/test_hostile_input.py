"""HostMain and VMMain, running, while somebody sends them nonsense: neither ends, and neither grows by 64 MB."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import GUEST, seeds
from tests.fuzz.test_fuzz import broken
from tests.support.agenthost import GUEST_ID, wait_until
from tests.support.brokers import free_port
from tests.support.hostmains import LIMIT_S, SECRET, RunningHost, running_hostmain
from vmcontrol.protocol import messages
from vmcontrol.protocol.text import BODY_LIMIT, BadMessage

ALLOWED_KB = 64 * 1000
CONFIG = (
    f"[Broker]\ntype = embedded\nport = {free_port()}\nusername = guest\npassword = secret\n[Host]\nvm_gc_grace = 30\n"
)
many = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))


class Victims:
    """HostMain with its own broker, and an agent of ours."""

    def __init__(self, host: RunningHost) -> None:
        self.host = host
        host.vm()
        self.broker_port = int(json.loads((host.slot / "vmwrapper_ports.json").read_text())["broker"])
        self.pids = {"HostMain": host.process.pid, "VMMain": int(host.api.getVMInfo("vm")["pid"])}
        self.are_well()
        self.before = self.peaks_kb()
        self._stomp: socket.socket | None = None

    def peaks_kb(self) -> dict[str, int]:
        return {
            name: int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0])
            for name, pid in self.pids.items()
        }

    def are_well(self) -> None:
        assert self.host.api.waitGuest("vm", LIMIT_S) is True, self.host.log()
        assert self.host.api.ping("vm", LIMIT_S) == "PONG from vm"
        assert int(self.host.api.getVMInfo("vm")["pid"]) == self.pids["VMMain"], "the agent has never ended"

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.broker_port), LIMIT_S)
        connection.sendall(b"CONNECT\nlogin:guest\npasscode:secret\naccept-version:1.2\nhost:x\n\n\0")
        heard = b""
        while b"\0" not in heard:
            heard += connection.recv(4096)
        assert heard.startswith(b"CONNECTED"), heard
        return connection

    def stomp(self, data: bytes) -> None:
        """Over a connection that is kept for as long as the broker keeps it."""
        for _ in range(2):
            with contextlib.suppress(OSError):
                self._stomp = self._stomp or self.connect()
                self._stomp.sendall(data)
                return
            self._stomp = None

    def post(self, body: bytes) -> bytes:
        token = base64.b64encode(f"vmwrapper:{SECRET}".encode())
        head = b"POST /RPC2 HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/xml\r\nConnection: close\r\n"
        head += b"Authorization: Basic " + token + b"\r\nContent-Length: %d\r\n\r\n" % len(body)
        return self.raw(head + body)

    def raw(self, data: bytes, *, ends: bool = False) -> bytes:
        answer = b""
        connection = socket.create_connection(("127.0.0.1", self.host.port), LIMIT_S)
        with connection, contextlib.suppress(OSError):
            connection.sendall(data)
            if ends:  # a client that goes away is not answered: calls that wait are given up
                connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                answer += piece
        return answer


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victims]:
    with running_hostmain(tmp_path_factory.mktemp("hostile"), CONFIG) as host:
        victims = Victims(host)
        yield victims
        victims.are_well()
        host.api.runCommand("vm", {"id": "last", "command": "/bin/echo", "arguments": ["still here"]})
        assert host.finished("last")["result"]["exit_status"] == 0
        grown = {name: peak - victims.before[name] for name, peak in victims.peaks_kb().items()}
        assert max(grown.values()) < ALLOWED_KB, grown
        assert "Traceback" not in host.log()
        assert "Unhandled" not in host.log()
        assert all(psutil.pid_exists(pid) for pid in victims.pids.values())


def test_messages_on_every_topic(victims: Victims) -> None:
    @many
    @given(st.sampled_from([messages.CONNECTIONS, messages.REQUESTS, messages.RESPONSES]), broken("words"))
    def send(topic: str, data: bytes) -> None:
        text = data.decode("utf-8", "replace").replace("\0", "0").replace(GUEST, GUEST_ID)
        head, _, body = text.partition("\n\n")
        headers = dict(line.split(":", 1) for line in head.split("\n") if ":" in line)
        with contextlib.suppress(BadMessage):
            message = messages.decode(headers, body)
            if isinstance(message, messages.CommandRun) and shutil.which(message.command):
                return  # it would be run here
        lines = "".join(f"{_escaped(name)}:{_escaped(value)}\n" for name, value in headers.items())
        content = body.encode()
        length = f"content-length:{len(content)}\n"
        victims.stomp(f"SEND\ndestination:{topic}\n{length}{lines}\n".encode() + content + b"\0")

    send()
    victims.are_well()


def test_large_messages(victims: Victims) -> None:
    """Each as large as the broker carries; the cost of reading them must not add up."""
    size = BODY_LIMIT - 1000
    id = f"from:{GUEST_ID}\ncmd-id:large\nto:*\ncmd:/no/such/program\n"
    for topic, word in (
        (messages.RESPONSES, "CMD_RESULT"),
        (messages.REQUESTS, "CMD_RUN"),
        (messages.CONNECTIONS, "HELLO"),
    ):
        for text in ('{"out": "' + "x" * (size - 20) + '"}', "[" * size, '{"a":[' + "1," * (size // 2 - 10) + "1]}"):
            body = f"{word} {text}".encode()
            head = f"SEND\ndestination:{topic}\n{id}content-length:{len(body)}\n\n"
            victims.stomp(head.encode() + body + b"\0")
    victims.are_well()


def test_broken_frames(victims: Victims) -> None:
    @many
    @given(broken("frames"))
    def send(data: bytes) -> None:
        with contextlib.suppress(OSError), contextlib.closing(victims.connect()) as connection:
            connection.sendall(data[1:].replace(GUEST.encode(), GUEST_ID.encode()).replace(b"worker.py", b"no-such"))

    send()
    victims.are_well()


def test_broken_calls(victims: Victims) -> None:
    @many
    @given(broken("xmlrpc") | st.binary(max_size=200))
    def call(body: bytes) -> None:
        # what is whole is carried out: nothing that the seeds name does harm
        answer = victims.post(body)
        assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
        assert b"<methodResponse>" in answer

    call()
    victims.are_well()


def test_broken_requests(victims: Victims) -> None:
    good = b"POST /RPC2 HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/xml\r\nContent-Length: 5\r\n\r\nhello"

    @many
    @given(st.integers(0, len(good)), st.integers(0, 20), st.binary(max_size=20))
    def send(at: int, cut: int, put: bytes) -> None:
        answer = victims.raw(good[:at] + put + good[at + cut :], ends=True)
        assert not answer.startswith(b"HTTP/1.1 200"), "there is no secret in it"

    send()
    victims.are_well()


@pytest.mark.parametrize("secret", [SECRET, "a guess"])
def test_many_requests_that_do_not_end(victims: Victims, secret: str) -> None:
    """Each within its own limit; together they would be 150 MB."""
    token = base64.b64encode(f"vmwrapper:{secret}".encode())
    head = b"POST /RPC2 HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/xml\r\nAuthorization: Basic " + token
    with contextlib.ExitStack() as stack:
        for _ in range(75):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", victims.host.port), LIMIT_S))
            with contextlib.suppress(OSError):  # refused in the middle
                one.sendall(head + b"\r\nContent-Length: 2000001\r\n\r\n" + b"x" * 2_000_000)
        wait_until(lambda: victims.post(b"<methodCall/>").startswith(b"HTTP/1.1 200"), "a place for another")
    call = xmlrpc.client.dumps(("x" * 2_000_000,), "help").encode()
    wait_until(lambda: b"<fault>" in victims.post(call), "their end, and room for a large one")
    victims.are_well()


def test_nothing_waits_to_be_sent_for_ever(victims: Victims) -> None:
    status: Any = victims.host.api.getStatus()
    assert len(status["guests"]) <= 1000
    wait_until(lambda: len(victims.host.api.listCommands("vm")) < 1000, "a bounded table")


def _escaped(text: str) -> str:
    for plain, written in (("\\", "\\\\"), ("\r", "\\r"), ("\n", "\\n"), (":", "\\c")):
        text = text.replace(plain, written)
    return text


def test_the_seeds_reach_the_agent(victims: Victims) -> None:
    """What is sent above is no noise that the broker drops: a good message is answered."""
    assert any(b"CMD_LIST" in seed for seed in seeds("words"))
    token = "a token of this test"
    headers = f"to:*\ntoken:{token}\n"
    with contextlib.closing(victims.connect()) as connection:
        connection.sendall(f"SUBSCRIBE\nid:1\ndestination:{messages.RESPONSES}\n\n\0".encode())
        connection.sendall(f"SEND\ndestination:{messages.REQUESTS}\n{headers}\nCMD_LIST\0".encode())
        heard = b""
        connection.settimeout(LIMIT_S)
        while b"CMD_TABLE" not in heard or token.encode() not in heard:
            heard += connection.recv(65536)
    assert b"CMD_TABLE" in heard
