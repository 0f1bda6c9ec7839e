"""A hostile agent, as seen by HostMain over the real link: it knows the secret, behaves, and attacks when told to.

    python -m tests.support.hostile_agent PORT SECRET_FILE ID GO_FILE

GO_FILE holds the name of the attack, one of ATTACKS; it may change. Until it is there the agent says and answers what a
good one does, so that HostMain, or the whole wrapper, comes to rest. Blocking sockets, a thread a connection.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vmcontrol.broker.frames import Frame, FrameDecoder, Version, encode
from vmcontrol.protocol.handshake import GuestHandshake, Mode, Outcome
from vmcontrol.protocol.messages import CONNECTIONS, REQUESTS, RESPONSES

MIB = 1024 * 1024
WAIT_S = 20.0
OTHER = "02:00:00:00:00:99"

# What is answered to HTTP requests: raw bytes, for as long as the host takes them

_OK = b"HTTP/1.1 200 OK\r\n"


def _json(value: object, status: bytes = b"200 OK") -> bytes:
    body = json.dumps(value).encode()
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def _nested(_: str) -> Iterator[bytes]:
    body = b'{"error": [' + b"[]," * (4 * MIB // 3 - 20) + b'[]], "time": 1}'
    yield b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def _deep(_: str) -> Iterator[bytes]:
    body = b'{"time": ' + b"[" * (2 * MIB - 10) + b"]" * (2 * MIB - 10) + b"}"
    yield _OK + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _headers(_: str) -> Iterator[bytes]:
    yield _OK
    for number in itertools.count():
        yield b"".join(b"X-%d-%d: %s\r\n" % (number, one, b"x" * 1000) for one in range(60))


def _continues(_: str) -> Iterator[bytes]:
    while True:
        yield b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n" * 2000


def _body(_: str) -> Iterator[bytes]:
    yield _OK + b"Transfer-Encoding: chunked\r\n\r\n"
    while True:
        yield b"10000\r\n" + b"x" * 0x10000 + b"\r\n"


def _exabyte(_: str) -> Iterator[bytes]:
    yield _OK + b'ETag: "1"\r\nContent-Length: 1152921504606846976\r\n\r\n'
    while True:
        yield bytes(MIB)


def _listing(_: str) -> Iterator[bytes]:
    entries = [{"name": f"{one:06d}" + "x" * 200, "size": one, "folder": False} for one in range(9000)]
    answer = _json({"folder": "/", "listing": entries, "time": 1})
    yield answer[: 4 * MIB]


def _odd(target: str) -> Iterator[bytes]:
    if "list" in target:
        yield _json(
            {"folder": [1], "listing": [{"name": ["x"], "size": {"a": []}}, 5, None, {"name": "y", "size": "z"}]}
        )
    else:
        yield _json({"time": {"not": "a time"}, "base_folder": [[]], "have": "much"})


def _drip(_: str) -> Iterator[bytes]:
    yield _OK + b"Content-Length: 1000000\r\n\r\n"
    while True:
        time.sleep(0.2)
        yield b"x"


def _zeros(target: str) -> Iterator[bytes]:
    if "files" not in target:
        yield _json({"time": 1, "listing": []})
        return
    yield _OK + b'ETag: "1"\r\nContent-Length: %d\r\n\r\n' % (8 * MIB)
    for _ in range(8):
        yield bytes(MIB)


HTTP: Mapping[str, Callable[[str], Iterator[bytes]]] = {
    "nested JSON": _nested,
    "deep JSON": _deep,
    "endless headers": _headers,
    "endless 100 Continue": _continues,
    "endless body": _body,
    "a body of 1 EB": _exabyte,
    "large listings": _listing,
    "odd answers": _odd,
    "answers that drip": _drip,
    "output that XML lacks": _zeros,
}

# What is sent over STOMP: frames, as fast as the host takes them


def _send(topic: str, body: bytes, **headers: str) -> bytes:
    return encode(Frame("SEND", {"destination": topic, **headers}, body), Version.V1_2)


def _say(id: str, word: str, body: bytes = b"", /, **headers: str) -> bytes:
    text = word.encode() + (b" " + body if body else b"")
    return encode(Frame("SEND", {"destination": RESPONSES, "from": id, **headers}, text), Version.V1_2)


def _hello_bye(id: str, _: list[str]) -> Iterator[bytes]:
    pair = _send(CONNECTIONS, b"HELLO", id=id, protocol="2") + _send(CONNECTIONS, b"BYE", id=id)
    while True:
        yield pair * 50


def _beacons(id: str, _: list[str]) -> Iterator[bytes]:
    while True:
        yield _send(CONNECTIONS, b"STILL_ALIVE", id=id, protocol="2", agent="x" * 4000) * 20


def _new_ids(id: str, _: list[str]) -> Iterator[bytes]:
    body = json.dumps({"state": "running", "attempt": 1, "detail": "d" * 500_000}).encode()
    for number in itertools.count():
        yield _say(id, "CMD_STATE", body, **{"cmd-id": f"new {number} " + "i" * 150})


def _results(id: str, known: list[str]) -> Iterator[bytes]:
    for number in itertools.count():
        for one in [*known, f"new {number}"]:
            body: dict[str, Any] = {
                "attempt": number + 1, "exit_status": 0, "signal": None, "finished": True, "exitCodeOrSignal": 0,
                "stderr_tail": "t" * 200_000, "stdout_path": "p" * 200_000, "out": "o" * 300_000, "x": [[]] * 20_000,
            }  # fmt: skip
            yield _say(id, "CMD_RESULT", json.dumps(body).encode(), **{"cmd-id": one})


def _details(id: str, known: list[str]) -> Iterator[bytes]:
    for number in itertools.count():
        for one in known or ["none"]:
            body = {"state": "running", "attempt": 1, "detail": f"{number}" + "d" * 900_000}
            yield _say(id, "CMD_STATE", json.dumps(body).encode(), **{"cmd-id": one})


def _values(id: str, _: list[str]) -> Iterator[bytes]:
    body = b'{"x": [' + b"[]," * 340_000 + b"1]}"
    while True:
        yield _say(id, "CMD_RESULT", body, **{"cmd-id": "c"})
        yield _say(id, "CMD_STATE", b"[" * 900_000, **{"cmd-id": "c"})


def _tables(id: str, _: list[str]) -> Iterator[bytes]:
    rows = [{"cmd-id": f"row {one}", "state": "running", "detail": "d" * 100} for one in range(7000)]
    body = json.dumps(rows).encode()[:1_000_000]
    while True:
        yield _say(id, "CMD_TABLE", body, token="guess")


def _escapes(id: str, _: list[str]) -> Iterator[bytes]:
    body = b'{"x": "' + b'\\"' * 450_000
    while True:
        yield _say(id, "CMD_STATE", body, **{"cmd-id": "c"})


def _for_others(_id: str, _: list[str]) -> Iterator[bytes]:
    while True:
        yield _send(CONNECTIONS, b"HELLO", id=OTHER, protocol="2")


def _unknown(id: str, _: list[str]) -> Iterator[bytes]:
    while True:
        yield _say(id, "NONSENSE") * 100


def _unfinished(_id: str, _: list[str]) -> Iterator[bytes]:
    yield b"SEND\ndestination:" + RESPONSES.encode() + b"\ncontent-length:1048000\n\n" + b"x" * 1_000_000
    while True:
        time.sleep(1)


def _head(_id: str, _: list[str]) -> Iterator[bytes]:
    yield b"SEND\n"
    for number in itertools.count():
        yield b"".join(b"h%d-%d:1\n" % (number, one) for one in range(1000))


STOMP: Mapping[str, Callable[[str, list[str]], Iterator[bytes]]] = {
    "HELLO and BYE": _hello_bye,
    "beacons": _beacons,
    "new ids": _new_ids,
    "results": _results,
    "details": _details,
    "messages of many values": _values,
    "tables": _tables,
    "strings without an end": _escapes,
    "words for another guest": _for_others,
    "unknown words": _unknown,
    "frames without an end": _unfinished,
    "headers of frames without an end": _head,
}
LINK = ("handshakes that drip", "long handshakes", "reconnects", "requests that are not read")
ATTACKS = (*HTTP, *STOMP, *LINK)


class Agent:
    """Serves each connection in a thread."""

    def __init__(self, port: int, secret: bytes, id: str, go: Path) -> None:
        self._secret, self._id, self._go = secret, id, go
        self._listener = socket.create_server(("127.0.0.1", port), backlog=200)
        self._known: list[str] = []
        self._attack = ""

    def run(self) -> None:
        threading.Thread(target=self._look, daemon=True).start()
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _look(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                self._attack = self._go.read_text()
            time.sleep(0.05)

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), connection:
            connection.settimeout(WAIT_S)
            while self._attack == "handshakes that drip":
                connection.sendall(b"P")
                time.sleep(0.2)
            while self._attack == "long handshakes":
                connection.sendall(b"PROOF " + b"0" * MIB)
            mode, rest = self._handshake(connection)
            if self._attack == "reconnects":
                return
            self._http(connection, rest) if mode is Mode.HTTP else self._stomp(connection, rest)

    def _handshake(self, connection: socket.socket) -> tuple[Mode | None, bytes]:
        handshake = GuestHandshake(self._secret)
        while True:
            data = connection.recv(4096)
            if not data:
                raise ValueError("gone")
            step = handshake.receive(data)
            connection.sendall(step.send)
            if step.outcome is Outcome.DENIED:
                raise ValueError("denied")
            if step.outcome is Outcome.OPEN:
                return handshake.mode, step.rest

    # HTTP

    def _http(self, connection: socket.socket, data: bytes) -> None:
        while True:
            while b"\r\n\r\n" not in data:
                piece = connection.recv(65536)
                if not piece:
                    return
                data += piece
            head, _, data = data.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: *(\d+)", head)
            missing = int(length[1]) - len(data) if length else 0
            while missing > 0:
                missing -= len(connection.recv(min(missing, 65536)) or sys.exit())
            data = b""
            method, target = head.split(b" ")[0], head.split(b" ")[1].decode()
            name = self._attack
            if name not in HTTP:
                connection.sendall(self._answer(method, target))
                continue
            for piece in HTTP[name](target):
                connection.sendall(piece)
                if self._attack != name:
                    return

    @staticmethod
    def _answer(method: bytes, target: str) -> bytes:
        if method == b"GET" and target.startswith("/v1/files"):
            return _json({"error": "no such file", "folder": "/", "listing": []}, b"404 Not Found")
        return _json({"time": time.time(), "listing": [], "folder": "/", "base_folder": "/", "have": 0})

    # STOMP

    def _stomp(self, connection: socket.socket, data: bytes) -> None:
        while b"\n" not in data:
            data += connection.recv(4096) or sys.exit()
        line, _, data = data.partition(b"\n")
        offer = json.loads(line)
        connect = {"login": offer["login"], "passcode": offer["passcode"], "host": "/", "accept-version": "1.2"}
        connection.sendall(encode(Frame("CONNECT", connect), Version.V1_2))
        subscribe = {"destination": REQUESTS, "id": "1"}
        connection.sendall(encode(Frame("SUBSCRIBE", subscribe), Version.V1_2))
        connection.sendall(_send(CONNECTIONS, b"HELLO", id=self._id, ip="10.0.2.15", protocol="2", agent="VMMain x"))
        lock = threading.Lock()
        over = threading.Event()
        threading.Thread(target=self._say, args=(connection, lock, over), daemon=True).start()
        try:
            self._obey(connection, data, lock)
        finally:
            over.set()

    def _say(self, connection: socket.socket, lock: threading.Lock, over: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while not over.wait(0.1):
                name = self._attack
                for piece in STOMP[name](self._id, self._known) if name in STOMP else ():
                    with lock:
                        connection.sendall(piece)
                    if over.is_set() or self._attack != name:
                        connection.close()  # what stands in the middle of a frame ends with it
                        return
                with lock:
                    connection.sendall(_send(CONNECTIONS, b"STILL_ALIVE", id=self._id, ip="10.0.2.15", protocol="2"))

    def _obey(self, connection: socket.socket, data: bytes, lock: threading.Lock) -> None:
        decoder = FrameDecoder(version=Version.V1_2)
        decoder.receive(data)
        while True:
            while (event := decoder.next_event()) is not None:
                if isinstance(event, Frame) and event.command == "MESSAGE":
                    answer = self._answer_to(event)
                    if answer:
                        with lock:
                            connection.sendall(answer)
            while self._attack == "requests that are not read":
                time.sleep(0.1)
            piece = connection.recv(65536)
            if not piece:
                return
            decoder.receive(piece)

    def _answer_to(self, frame: Frame) -> bytes:
        word, id = frame.body.split(b" ")[0], frame.headers.get("cmd-id", "")
        if word == b"PING":
            return _say(self._id, "PONG", timestamp=frame.headers["timestamp"])
        if word == b"CMD_LIST":
            return _say(self._id, "CMD_TABLE", b"[]", token=frame.headers["token"])
        if word in (b"CMD_RUN", b"CMD_QUERY"):
            if word == b"CMD_RUN" and id not in self._known:
                self._known.append(id)
            state = "running" if id in self._known else "unknown"
            body = json.dumps({"state": state, "attempt": 1}).encode()
            said = _say(self._id, "CMD_STATE", body, **{"cmd-id": id})
            if self._attack == "output that XML lacks" and word == b"CMD_RUN":
                result = {
                    "cmd-id": id, "attempt": 1, "exit_status": 0, "signal": None, "finished": True,
                    "exitCodeOrSignal": 0, "stdout_path": "out", "stderr_path": "err",
                    "stdout_size": 8 * MIB, "stderr_size": 8 * MIB,
                }  # fmt: skip
                said += _say(self._id, "CMD_RESULT", json.dumps(result).encode(), **{"cmd-id": id})
            return said
        if word == b"CMD_FORGET":
            with contextlib.suppress(ValueError):
                self._known.remove(id)
            return _say(self._id, "CMD_FORGOTTEN", b"", **{"cmd-id": id})
        return b""


def main() -> None:
    """The program."""
    port, secret_file, id, go = sys.argv[1:]
    Agent(int(port), Path(secret_file).read_bytes().strip(), id, Path(go)).run()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
