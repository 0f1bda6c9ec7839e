"""An agent of protocol 1, as tests see it: what it says and how, byte for byte, without what it runs."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tests.support.hostmains import LIMIT_S


class Agent2009:
    """An agent of protocol 1: STOMP 1.0 by hand, no heart-beats, no content-length; answers what `answer` says."""

    def __init__(self, port: int, login: str, passcode: str, id: str, ip: str = "192.168.56.101") -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), LIMIT_S)
        self._sending = threading.Lock()
        self._buffer = b""
        self.id = id
        self._who = f"id:{id}\nip:{ip}"
        self.seen: list[tuple[dict[str, str], str]] = []
        self._frame(f"CONNECT\nlogin:{login}\npasscode:{passcode}\n\n")
        assert self.read()[0] == "CONNECTED"
        self._frame("SUBSCRIBE\ndestination: /topic/cmd_requests\nack: auto\n\n")
        self.say("/topic/connections", self._who, "HELLO")

    def say(self, destination: str, headers: str, body: str) -> None:
        self._frame(f"SEND\ndestination: {destination}\n{headers}\n\n{body}")

    def serve(self, out: Callable[[dict[str, str]], str], **result: Any) -> None:
        """In the background: PINGs and commands, for as long as the connection lives. `result`: what else it says."""
        threading.Thread(target=self._serve, args=(out, result), daemon=True).start()

    @contextlib.contextmanager
    def beacons(self) -> Iterator[None]:
        """STILL_ALIVE, again and again."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(0.2):
                with contextlib.suppress(OSError):
                    self.say("/topic/connections", self._who, "STILL_ALIVE")

        beating = threading.Thread(target=beat)
        beating.start()
        try:
            yield
        finally:
            over.set()
            beating.join()

    def close(self) -> None:
        self._socket.close()

    def _serve(self, out: Callable[[dict[str, str]], str], more: dict[str, Any]) -> None:
        try:
            while True:
                command, headers, body = self.read()
                if command != "MESSAGE" or headers.get("to") != self.id:
                    continue
                self.seen.append((headers, body))
                if body == "PING":
                    stamp = headers["timestamp"]
                    self.say("/topic/cmd_responses", f"from:{self.id}\ntimestamp:{stamp}", "PONG")
                elif body == "CMD_RUN":
                    id = headers["cmd-id"]
                    result = {"cmd-id": id, "out": out(headers), "err": "", "finished": True}
                    result |= {"exitCodeOrSignal": 0, "resources": {"ru_utime": 1.0, "ru_stime": 0.5}, **more}
                    self.say("/topic/cmd_responses", f"cmd-id:{id}", f"CMD_RESULT {json.dumps(result)}")
        except (OSError, ValueError):
            return

    def _frame(self, text: str) -> None:
        with self._sending:
            self._socket.sendall(text.encode() + b"\0\n")

    def read(self) -> tuple[str, dict[str, str], str]:
        """The next frame, when nothing else reads."""
        while b"\0" not in self._buffer:
            data = self._socket.recv(65536)
            if not data:
                raise OSError("closed")
            self._buffer += data
        frame, _, self._buffer = self._buffer.lstrip(b"\n").partition(b"\0")
        head, _, body = frame.decode().partition("\n\n")
        command, *lines = head.split("\n")
        return command, dict(line.split(":", 1) for line in lines), body
