"""HostMain as a process for tests, with the hypervisor of tests.support_hypervisor, and a proxy that loses frames.

with running_hostmain(tmp_path) as host:
    host.api.defineVM("vm", "disk.img", {})
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
import xmlrpc.client
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.brokers import free_port
from tests.support.hypervisor import CALLS
from tests.support.limits import after

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 30.0
SECRET = "the secret of this run"
EMBEDDED = "[Broker]\ntype = embedded\n[Host]\nvm_gc_grace = 30\n"


def with_broker_port() -> str:
    """EMBEDDED for agents and tools that dial the broker."""
    return EMBEDDED.replace("embedded", f"embedded\nport = {free_port()}")


class HostMainProcess:
    """A HostMain, started by something that behaves as the wrapper does."""

    def __init__(
        self,
        slot: Path,
        config: str = EMBEDDED,
        environment: Mapping[str, str] | None = None,
        *,
        standalone: bool = False,
        pass_fds: Sequence[int] = (),
        program: str = "tests.support.hypervisor",
    ) -> None:
        self.slot = slot
        (slot / "HostConfig.cfg").write_text(config)
        (slot / "disk.img").touch()
        lifeline_read, self._lifeline = os.pipe()
        self._status, status_write = os.pipe()
        wrapper = {
            "VMWRAPPER_SLOT": str(slot),
            "VMWRAPPER_LIFELINE_FD": str(lifeline_read),
            "VMWRAPPER_STATUS_FD": str(status_write),
            "VMWRAPPER_XMLRPC_SECRET": SECRET,
            "VMWRAPPER_SECRET_FILE": str(slot / "vmwrapper_secret"),
        }
        (slot / "vmwrapper_secret").write_text("0123456789abcdef" * 4)
        (slot / "vmwrapper_secret").chmod(0o600)
        self.stderr = slot / "hostmain.log"
        clean = {key: value for key, value in os.environ.items() if not key.startswith("VMWRAPPER_")}
        with self.stderr.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", program, "HostConfig.cfg"],
                cwd=slot,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**clean, "PYTHONPATH": str(ROOT), **({} if standalone else wrapper), **(environment or {})},
                pass_fds=() if standalone else (lifeline_read, status_write, *pass_fds),
            )
        os.close(lifeline_read)
        os.close(status_write)
        self._proxies: weakref.WeakSet[xmlrpc.client.ServerProxy] = weakref.WeakSet()
        self._lines = b""
        self.events: list[dict[str, Any]] = []

    def event(self, name: str, limit_s: float = LIMIT_S) -> dict[str, Any]:
        """The next status line of this name."""
        deadline = after(limit_s)
        while True:
            while self.events:
                event = self.events.pop(0)
                if event["event"] == name:
                    return event
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._status], [], [], left)
            data = os.read(self._status, 65536) if ready else b""
            assert data, f"no {name!r} from HostMain:\n{self.log()}"
            *lines, self._lines = (self._lines + data).split(b"\n")
            self.events += [json.loads(line) for line in lines]

    def log(self) -> str:
        agent = self.slot / "agent.log"
        return self.stderr.read_text() + (agent.read_text() if agent.exists() else "")

    def connect(self, port: int, secret: str | None = SECRET, path: str = "/RPC2") -> Any:
        user = "" if secret is None else f"vmwrapper:{xmlrpc_quote(secret)}@"
        proxy = xmlrpc.client.ServerProxy(f"http://{user}127.0.0.1:{port}{path}", allow_none=True)
        self._proxies.add(proxy)
        return proxy

    @property
    def calls(self) -> list[str]:
        """What the hypervisor was asked."""
        path = self.slot / CALLS
        return path.read_text().splitlines() if path.exists() else []

    def cut_lifeline(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def ended(self, limit_s: float = LIMIT_S) -> int:
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"HostMain does not end:\n{self.log()}") from None

    def close(self) -> None:
        for proxy in list(self._proxies):
            proxy("close")()
        self.cut_lifeline()
        if self.process.poll() is None:
            try:
                self.process.send_signal(signal.SIGTERM)
                self.process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise
        os.close(self._status)


class RunningHost(HostMainProcess):
    """With its client."""

    api: Any  # xmlrpc.client.ServerProxy
    port: int

    def ready(self) -> None:
        self.port = self.event("xmlrpc")["port"]
        self.api = self.connect(self.port)

    def vm(self, name: str = "vm", image: str = "disk.img", **settings: object) -> None:
        """A VM with a real agent that is there."""
        assert self.api.defineVM(name, image, settings) is True
        assert self.api.start(name) is True
        if image == "disk.img":
            assert self.api.waitGuest(name, LIMIT_S) is True, self.log()

    def home(self, name: str = "vm") -> Path:
        """The agent's base folder."""
        return self.slot / "vm" / name / "home"

    def finished(self, id: str, name: str = "vm", limit_s: float = LIMIT_S) -> dict[str, Any]:
        """Wait for a command by long polls."""
        version, deadline = 0, after(limit_s)
        while time.monotonic() < deadline:
            command: Any = self.api.waitCommand(name, id, version, 5.0)
            if command["state"] == "finished":
                return dict(command)
            version = command["version"]
        raise AssertionError(f"{id} does not finish: {command}\n{self.log()}")


@contextlib.contextmanager
def running_hostmain(
    slot: Path, config: str = EMBEDDED, environment: Mapping[str, str] | None = None
) -> Iterator[RunningHost]:
    host = RunningHost(slot, config, environment)
    try:
        host.ready()
        yield host
    finally:
        host.close()


def xmlrpc_quote(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode())


@contextlib.contextmanager
def embedded_broker(port: int = 0) -> Iterator[tuple[int, str, str]]:
    """The embedded broker in a process of its own: port, login, passcode. The same each time: it can be restarted."""
    login, passcode = "guest", "secret"
    environment = {
        **os.environ,
        "VMWRAPPER_BROKER_PORT": str(port),
        "VMWRAPPER_BROKER_LOGIN": login,
        "VMWRAPPER_BROKER_PASSCODE": passcode,
        "BROKER_LIMITS": "{}",
    }
    command = [sys.executable, "-m", "tests.support.brokers"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline().split()[-1]), login, passcode
        finally:
            process.kill()


class LossyProxy:
    """Between everybody and the broker: loses frames by their first word, and can cut all connections."""

    def __init__(self, broker_port: int) -> None:
        self._broker_port = broker_port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self.lose: dict[str, int] = {}
        """word -> how many of the next are lost."""
        self.lost: list[str] = []
        self._sockets: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Every connection breaks."""
        for one in list(self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            try:
                broker = socket.create_connection(("127.0.0.1", self._broker_port))
            except OSError:
                client.close()
                continue
            self._sockets |= {client, broker}
            for source, target, filtered in ((client, broker, True), (broker, client, False)):
                threading.Thread(target=self._carry, args=(source, target, filtered), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, filtered: bool) -> None:
        buffer = b""
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not filtered:
                    target.sendall(data)
                    continue
                buffer += data
                while (frame := self._take(buffer)) is not None:
                    buffer = buffer[len(frame) :]
                    if not self._is_lost(frame):
                        target.sendall(frame)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            self._sockets.discard(one)

    def _take(self, buffer: bytes) -> bytes | None:
        if buffer[:1] == b"\n":
            return b"\n"
        head, separator, rest = buffer.partition(b"\n\n")
        if not separator:
            return None
        lengths = [line.split(b":")[1] for line in head.split(b"\n") if line.startswith(b"content-length:")]
        length = int(lengths[0]) if lengths else rest.find(b"\0")
        if length < 0 or len(rest) <= length:
            return None
        return buffer[: len(head) + 2 + length + 1]

    def _is_lost(self, frame: bytes) -> bool:
        word = frame.partition(b"\n\n")[2].split(b" ")[0].strip(b"\0\n").decode(errors="replace")
        if self.lose.get(word, 0) > 0:
            self.lose[word] -= 1
            self.lost.append(word)
            return True
        return False
