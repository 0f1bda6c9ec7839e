"""The agent's end of the link as a subprocess, and its lines as they come."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import ProcessProtocol

from vmcontrol.common.eventloop import Event, with_limit

SECRET = b"0123456789abcdef0123456789abcdef"
LIMIT_S = 20


class Agent(ProcessProtocol):
    """tests.support.linkagent, running."""

    transport: Any = None

    def __init__(self, reactor: Any) -> None:
        self.reactor = reactor
        self.lines: list[dict[str, Any]] = []
        self.more = Event()
        self.ended: Deferred[None] = Deferred()
        self._buffer = b""
        self.address = ("127.0.0.1", 0)
        self.stomp_port = 0

    @classmethod
    async def start(cls, reactor: Any, base: Path, *more: str, secret: bytes = SECRET) -> "Agent":
        agent = cls(reactor)
        words = [sys.executable, "-m", "tests.support.linkagent", secret.decode(), str(base), *more]
        root = Path(__file__).parent.parent.parent
        reactor.spawnProcess(agent, words[0], words, env=None, path=str(root), childFDs={0: "w", 1: "r", 2: 2})
        ports = await agent.line("port")
        agent.address, agent.stomp_port = ("127.0.0.1", ports["port"]), ports["stomp_port"]
        return agent

    def outReceived(self, data: bytes) -> None:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        self.lines += [json.loads(line) for line in lines]
        self.more.pulse()

    def processEnded(self, reason: object) -> None:
        self.ended.callback(None)

    async def line(self, key: str) -> dict[str, Any]:
        """The next line that has `key`; earlier ones are dropped."""

        async def wait() -> dict[str, Any]:
            while True:
                while self.lines:
                    line = self.lines.pop(0)
                    if key in line:
                        return line
                await self.more.wait()

        return await with_limit(self.reactor, LIMIT_S, f"a line with {key}", wait())

    def peak_memory(self) -> int:
        """Bytes."""
        status = Path(f"/proc/{self.transport.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))

    async def stop(self) -> None:
        self.transport.signalProcess(signal.SIGCONT)
        self.transport.closeStdin()
        await with_limit(self.reactor, LIMIT_S, "the end of the agent", self.ended)
