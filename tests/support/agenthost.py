"""A scripted host of 2009 (raw STOMP 1.0 frames over a blocking socket) and VMMain as a subprocess, for the tests.

The host's frames are written by hand on purpose: it shares no STOMP code with the agent that it drives.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tests.support.brokers import BrokerAddress, free_port
from tests.support.limits import after
from vmcontrol.protocol import messages
from vmcontrol.protocol.command import CommandStatus
from vmcontrol.protocol.messages import (
    CONNECTIONS,
    RESPONSES,
    CommandForget,
    CommandForgotten,
    CommandResult,
    CommandRun,
    Message,
)
from vmcontrol.protocol.text import BadMessage

GUEST_ID = "00:00:00:00:00:00"
"""Of the loopback, which every computer has."""
LIMIT_S = 30.0

M = TypeVar("M", bound=Message)


class ScriptedHost:
    """Connected and subscribed when it is made. `messages`: everything that came, in order."""

    def __init__(self, broker: BrokerAddress) -> None:
        self._socket = socket.create_connection((broker.host, broker.port), LIMIT_S)
        self._buffer = b""
        self.raw: list[tuple[dict[str, str], str]] = []
        self.messages: list[Message] = []
        self._seen = 0
        self._ran: set[str] = set()
        self.frame("CONNECT", {"login": broker.login, "passcode": broker.passcode})
        command, _, body = self._read_frame(after(LIMIT_S))
        assert command == "CONNECTED", body
        for topic in (CONNECTIONS, RESPONSES):
            self.frame("SUBSCRIBE", {"destination": topic, "ack": "auto"})
        # a broker may answer CONNECTED before it knows the subscriptions; a message to ourselves shows that it does
        for topic in (CONNECTIONS, RESPONSES):
            self.frame("SEND", {"destination": topic}, f"echo {topic}")
            while self._read_frame(after(LIMIT_S))[2] != f"echo {topic}":
                pass

    def frame(self, command: str, headers: Mapping[str, str], body: str = "") -> None:
        """Send as the stomper of 2009 wrote it: no content-length, a blank after the colon of destination."""
        lines = [command] + [
            f"{key}: {value}" if key == "destination" else f"{key}:{value}" for key, value in headers.items()
        ]
        self._socket.sendall(("\n".join(lines) + f"\n\n{body}\0\n").encode())

    def send(self, message: Message) -> None:
        """One of ours. Only for headers without colons in their names and without newlines."""
        encoded = messages.encode(message)
        headers = {
            key: value
            for key, value in encoded.headers.items()
            if key not in {"args", "env", "path"} or "\\" not in value
        }
        self.frame("SEND", {"destination": encoded.destination, **headers}, encoded.body)

    def close(self) -> None:
        self._socket.close()

    def expect(self, kind: type[M], wanted: Callable[[M], bool] = lambda _: True, limit_s: float = LIMIT_S) -> M:
        """The next message (of those not yet expected) that is wanted; others in between are passed over."""
        deadline = after(limit_s)
        while True:
            while self._seen < len(self.messages):
                message = self.messages[self._seen]
                self._seen += 1
                if isinstance(message, kind) and wanted(message):
                    return message
            self._receive(deadline)

    def collect(self, seconds: float) -> list[Message]:
        """Everything that comes within this time (for what must not come)."""
        first = self._seen
        deadline = after(seconds)
        with contextlib.suppress(TimeoutError):
            while True:
                self._receive(deadline)
        self._seen = len(self.messages)
        return self.messages[first:]

    def run(self, id: str, command: str, *arguments: str, **more: Any) -> CommandRun:
        run = CommandRun(GUEST_ID, id, command, arguments, **more)
        self._ran.add(id)
        self.send(run)
        return run

    def forget_all(self, limit_s: float) -> None:
        """End and forget every command that was run here: what one test leaves is beside the commands of the next."""
        for id in self._ran:
            self.send(CommandForget(GUEST_ID, id))
        while self._ran:
            self._ran.discard(self.expect(CommandForgotten, limit_s=limit_s).id)

    def state(self, id: str, wanted: Callable[[CommandStatus], bool] = lambda _: True, **more: Any) -> CommandStatus:
        return self.expect(CommandStatus, lambda status: status.id == id and wanted(status), **more)

    def result(self, id: str, **more: Any) -> Mapping[str, Any]:
        return self.expect(CommandResult, lambda result: result.id == id, **more).body

    def _receive(self, deadline: float) -> None:
        command, headers, body = self._read_frame(deadline)
        assert command == "MESSAGE", (command, headers, body)
        self.raw.append((headers, body))
        with contextlib.suppress(BadMessage):
            self.messages.append(messages.decode(headers, body))

    def _read_frame(self, deadline: float) -> tuple[str, dict[str, str], str]:
        while True:
            frame = self._take_frame()
            if frame is not None:
                return frame
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no more messages; the last: {self.messages[-3:]}")
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(1 << 20)
            except TimeoutError:
                continue
            assert data, "the broker closed the connection"
            self._buffer += data

    def _take_frame(self) -> tuple[str, dict[str, str], str] | None:
        self._buffer = self._buffer.lstrip(b"\n")
        head, separator, rest = self._buffer.partition(b"\n\n")
        if not separator:
            return None
        command, *lines = head.decode().split("\n")
        headers = dict(line.split(":", 1) for line in lines)
        length = int(headers["content-length"]) if "content-length" in headers else rest.find(b"\0")
        if length < 0 or len(rest) <= length:
            return None
        self._buffer = rest[length + 1 :]
        return command, headers, rest[:length].decode()


class AgentProcess:
    """VMMain with `home` as base and `work` as working folder. With a broker: on the link of protocol 1."""

    program: Sequence[str] = (sys.executable, "-m", "guest.agent")

    def __init__(self, folder: Path, broker: BrokerAddress | None, secret: str = "", *, interface: str = "lo") -> None:
        self.home = folder / "home"
        self.work = folder / "work"
        for path in (self.home, self.work):
            path.mkdir(exist_ok=True)
        self._config = folder / "VMConfig.cfg"
        self.port = free_port()
        (folder / "smbios").write_text(secret)
        lines = [
            "[VM]",
            f"network_interface = {interface}",
            "beacon_interval = 1",
            "chirp_server = none",
            f"dir_to_serve = {self.home}",
        ]
        lines += ["listen_on = 127.0.0.1", f"listen_port = {self.port}", f"stomp_port = {free_port()}"]
        lines += [f"secret_file = {folder / 'smbios'}"]
        if broker is not None:
            lines += ["[Broker]", f"host = {broker.host}", f"port = {broker.port}"]
            lines += [f"username = {broker.login}", f"password = {broker.passcode}"]
        self._config.write_text("\n".join(lines))
        self.log = folder / "agent.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self.program, str(self._config)],
                cwd=self.work,
                stdin=subprocess.DEVNULL,
                stderr=log,
                stdout=log,
                env={**os.environ, "PYTHONPATH": str(Path(messages.__file__).parents[2]), "MARK": "the agent's"},
            )

    def stop(self) -> int:
        """TERM; the exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(LIMIT_S)

    def wait(self) -> int:
        """Its exit status, when it ends by itself."""
        assert self._process is not None
        return self._process.wait(LIMIT_S)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(LIMIT_S)


@contextlib.contextmanager
def agent_process(
    folder: Path, broker: BrokerAddress | None, secret: str = "", *, interface: str = "lo"
) -> Iterator[AgentProcess]:
    """A running agent, ended in every way the test can end."""
    with running(AgentProcess(folder, broker, secret, interface=interface)) as agent:
        yield agent


@contextlib.contextmanager
def running(agent: AgentProcess) -> Iterator[AgentProcess]:
    """Started, and ended in every way the test can end."""
    agent.start()
    try:
        yield agent
    finally:
        if agent._process is not None and agent._process.poll() is None:
            try:
                agent.stop()
            except subprocess.TimeoutExpired:
                agent.kill()
                raise


@contextlib.contextmanager
def killed_at_the_end(*pids: int) -> Iterator[None]:
    """Processes that only a working agent would end: a test that fails leaves none of them."""
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    """For what no message tells: files and processes."""
    deadline = after(limit_s)
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {limit_s:g} s"
        time.sleep(0.02)


def exists(pid: int) -> bool:
    """A process that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
