"""Attacks on a real HostMain and on the whole wrapper, measured: for bench.attack and tests.integration.test_attacks.

    measured = attack_hostmain("new ids", folder, seconds=3.0)

USS is what psutil calls so: memory that belongs to these processes alone. A stall is how long HostMain took to answer a
call that asks nobody.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import xmlrpc.client
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.support.brokers import free_port
from tests.support.hostile_world import GO, MODULE
from tests.support.hostmains import EMBEDDED, LIMIT_S, ROOT, SECRET, RunningHost, xmlrpc_quote
from tests.support.limits import after
from tests.support.slots import HOST_MAIN_TASK
from vmcontrol.common.atomicfile import write_atomically
from vmcontrol.protocol.messages import CONNECTIONS, REQUESTS, RESPONSES

PROBE_S, SAMPLE_S = 0.1, 0.1
CALLS_S = 0.3


@dataclass(frozen=True, slots=True)
class Measured:
    """What an attack did."""

    uss_bytes: int
    """Most, of all our processes, above what they had before it."""
    stall_s: float
    log_bytes_per_s: float
    quit_s: float
    log: str
    refused: int = 0
    """Calls of who has the secret that got no answer."""


class _Sampler:
    """Looks at memory and latency in threads while the attack goes on."""

    def __init__(self, pids: Callable[[], list[int]], probe: Callable[[], object] | None) -> None:
        self._pids, self._probe = pids, probe
        self.most = 0
        self.stall_s = 0.0
        self.refused = 0
        """Calls of who has the secret that got no answer."""
        self._over, self._asked_enough = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=self._look, daemon=True)]
        if probe is not None:
            self._threads.append(threading.Thread(target=self._ask, daemon=True))

    def __enter__(self) -> _Sampler:
        for thread in self._threads:
            thread.start()
        return self

    def stop_asking(self) -> None:
        self._asked_enough.set()
        self._threads[-1].join(LIMIT_S)

    def __exit__(self, *_: object) -> None:
        self._asked_enough.set()
        self._over.set()
        for thread in self._threads:
            thread.join(LIMIT_S)

    def _look(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self.most = max(self.most, uss(self._pids()))

    def _ask(self) -> None:
        assert self._probe is not None
        while not self._asked_enough.wait(PROBE_S):
            began = time.monotonic()
            try:
                self._probe()
            except (OSError, xmlrpc.client.Error):
                self.refused += 1
            self.stall_s = max(self.stall_s, time.monotonic() - began)


def uss(pids: list[int]) -> int:
    """Bytes, of processes that are there."""
    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            total += psutil.Process(pid).memory_full_info().uss
    return total


def settled(pids: list[int], seconds: float = 1.0) -> int:
    """What they have when nothing happens."""
    time.sleep(seconds)
    return uss(pids)


class _Timeout(xmlrpc.client.Transport):
    def make_connection(self, host: Any) -> Any:
        connection = super().make_connection(host)
        connection.timeout = LIMIT_S
        return connection


def _client(host: RunningHost) -> Any:
    url = f"http://vmwrapper:{xmlrpc_quote(SECRET)}@127.0.0.1:{host.port}/RPC2"
    return xmlrpc.client.ServerProxy(url, allow_none=True, transport=_Timeout())


@contextlib.contextmanager
def victim(folder: Path, config: str = EMBEDDED) -> Iterator[RunningHost]:
    """HostMain with a guest that behaves until it is told to attack."""
    folder.mkdir(parents=True, exist_ok=True)
    host = RunningHost(folder, config, program=MODULE)
    try:
        host.ready()
        host.vm()
        _client(host).runCommand("vm", {"id": "mine", "command": "/bin/true"})
        yield host
    finally:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            host.close()


def begin(folder: Path, attack: str) -> None:
    """Tell the guest to attack."""
    write_atomically(folder / GO, attack.encode())


def attack_hostmain(attack: str, folder: Path, seconds: float = 3.0) -> Measured:
    """A guest attacks while callers do what callers do: list, run, fetch."""
    with victim(folder) as host:
        return measured(host, seconds, [lambda: begin(folder, attack)])


def attack_port(attack: str, folder: Path, seconds: float = 3.0) -> Measured:
    """Another account attacks the XML-RPC port: it has no secret."""
    over = threading.Event()
    with victim(folder) as host:
        flood = threading.Thread(target=PORT[attack], args=(host.port, over), daemon=True)
        try:
            return measured(host, seconds, [flood.start])
        finally:
            over.set()


def measured(host: RunningHost, seconds: float, begin_each: Sequence[Callable[[], object]]) -> Measured:
    """Attacks one after the other, `seconds` each; then HostMain is ended under the last."""
    pids, probe, call = [host.process.pid], _client(host), _caller(host)
    probe.getStatus()
    before, log_before = settled(pids), host.stderr.stat().st_size
    with _Sampler(lambda: pids, probe.getStatus) as sampler:
        for begin in begin_each:
            begin()
            deadline = after(seconds)
            while (left := deadline - time.monotonic()) > 0:
                call()
                time.sleep(min(CALLS_S, max(left, 0)))
        sampler.stop_asking()
        log_after = host.stderr.stat().st_size
        began = time.monotonic()
        host.process.send_signal(signal.SIGTERM)
        host.ended()
        quit_s = time.monotonic() - began
    return Measured(
        max(0, sampler.most - before), sampler.stall_s, (log_after - log_before) / seconds / len(begin_each), quit_s,
        host.stderr.read_text(errors="replace"), sampler.refused,
    )  # fmt: skip


def _caller(host: RunningHost) -> Callable[[], None]:
    """Calls that a wrapper and a user of 2009 make, one after the other; each may fail, and none may hang."""
    (host.slot / "upload").write_bytes(bytes(100_000))
    calls: list[tuple[Any, ...]] = [
        ("listFiles", "vm", ""),
        ("runCmd", "vm", "/bin/true"),
        ("getFile", "vm", "out", "fetched"),
        ("listCommands", "vm"),
        ("putFile", "vm", "upload", "there"),
        ("waitCommand", "vm", "mine", 1, 0.1),
        ("getCmdResults", ""),
    ]
    numbers = iter(range(10**9))

    def ask(api: Any, method: str, *arguments: object) -> None:
        with contextlib.suppress(Exception):  # HostMain ends in the middle of an answer, at last
            if method == "getCmdResults":
                for id in api.listFinishedCmds()[:1]:
                    api.getCmdResults(id)
            else:
                getattr(api, method)(*arguments)

    def next_call() -> None:
        method, *arguments = calls[next(numbers) % len(calls)]
        threading.Thread(target=ask, args=(_client(host), method, *arguments), daemon=True).start()

    return next_call


# another account, at the XML-RPC port


def _connections(port: int, over: threading.Event, first: bytes, more: bytes, count: int) -> None:
    kept: list[socket.socket] = []
    while not over.is_set():
        with contextlib.suppress(OSError):
            one = socket.create_connection(("127.0.0.1", port), 1.0)
            one.settimeout(0.2)
            kept.append(one)
            one.sendall(first)
        for old in list(kept) if more else ():
            try:
                old.sendall(more)
            except OSError:
                kept.remove(old)
                old.close()
        if len(kept) > count:
            kept.pop(0).close()


_HEAD = b"POST /RPC2 HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/xml\r\nContent-Length: %d\r\n"
PORT: dict[str, Callable[[int, threading.Event], None]] = {
    "idle connections": lambda port, over: _connections(port, over, b"", b"", 400),
    "half requests": lambda port, over: _connections(port, over, _HEAD % 100, b"", 400),
    "huge bodies": lambda port, over: _connections(port, over, _HEAD % 2_000_000 + b"\r\n", b"x" * 65536, 60),
    "headers without end": lambda port, over: _connections(port, over, _HEAD % 1, b"X-Y: " + b"z" * 8000 + b"\r\n", 60),
}


# a guest on the link of protocol 1: it dials the broker, and has the common passcode

_NAMED = "[Broker]\ntype = embedded\nport = {}\nusername = guest\npassword = secret\n[Host]\nvm_gc_grace = 30\n"
_LARGE = 7_900_000


def _send(topic: str, headers: str, body: bytes) -> bytes:
    return f"SEND\ndestination:{topic}\n{headers}content-length:{len(body)}\n\n".encode() + body + b"\0"


DIALLING: dict[str, Callable[[int], bytes]] = {
    "large results": lambda number: _send(
        RESPONSES, f"cmd-id:c{number}\nfrom:{number % 7}\n", b'CMD_RESULT {"out": "' + b"x" * _LARGE + b'"}'
    ),
    "large and wide results": lambda number: _send(
        RESPONSES, f"cmd-id:c{number}\nfrom:{number}\n", b'CMD_RESULT {"out": "\xe4\xb8\xad' + b"x" * _LARGE + b'"}'
    ),
    "ever new guests": lambda number: b"".join(
        _send(CONNECTIONS, f"id:{number}-{one}\nip:{'1' * 200}\n", b"HELLO") for one in range(100)
    ),
    "large nonsense": lambda number: _send(REQUESTS, f"to:{number}\n", b"CMD_RUN " + b"[" * _LARGE),
}


def attack_dialling(attack: str, folder: Path, seconds: float = 3.0) -> Measured:
    """A guest that dials the broker's port attacks."""
    over = threading.Event()

    def flood(port: int) -> None:
        number = 0
        while not over.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), LIMIT_S) as connection:
                connection.sendall(b"CONNECT\nlogin:guest\npasscode:secret\naccept-version:1.2\nhost:x\n\n\0")
                connection.recv(4096)
                while not over.is_set():
                    connection.sendall(DIALLING[attack](number))
                    number += 1

    port = free_port()
    with victim(folder, _NAMED.format(port)) as host:
        thread = threading.Thread(target=flood, args=(port,), daemon=True)
        try:
            return measured(host, seconds, [thread.start])
        finally:
            over.set()


# the whole wrapper

JOB = (
    f"<job_desc>{HOST_MAIN_TASK}<task><virtualmachine>vm</virtualmachine><image>guest.vdi</image>"
    "<application>./worker</application><copy_app_to_VM>1</copy_app_to_VM><command_line>x</command_line>"
    "<trickle_trigger_file>trickle</trickle_trigger_file><stdout_filename>out</stdout_filename></task></job_desc>"
)


def attack_wrapper(attack: str | Sequence[str], folder: Path, seconds: float = 6.0) -> Measured:
    """The same guest below the whole wrapper, which quits by TERM at the end. Several: one after the other."""
    attacks = [attack] if isinstance(attack, str) else attack
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("job.xml", JOB), ("HostConfig.cfg", EMBEDDED), ("guest.vdi", "image"), ("worker", "x")):
        (folder / name).write_text(text)
    (folder / "worker").chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("VMWRAPPER_")}
    wrapper = subprocess.Popen(
        [sys.executable, "-m", MODULE, "wrapper", "job.xml"], cwd=folder, env={**clean, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    logs = [folder / "stderr.txt", folder / "stderr_HostMain"]
    try:
        _until(lambda: "running ./worker" in logs[0].read_text(errors="replace"), logs[0])
        before, log_before = settled(_ours(wrapper.pid)), _sizes(logs)
        with _Sampler(lambda: _ours(wrapper.pid), None) as sampler:
            for one in attacks:
                begin(folder, one)
                time.sleep(seconds)
            log_after = _sizes(logs)
            began = time.monotonic()
            wrapper.terminate()
            wrapper.wait(LIMIT_S)
            quit_s = time.monotonic() - began
        said = "".join(path.read_text(errors="replace") for path in logs)
        rate = (log_after - log_before) / seconds / len(attacks)
        return Measured(max(0, sampler.most - before), 0.0, rate, quit_s, said)
    finally:
        left = _tree(wrapper.pid)
        if wrapper.poll() is None:
            wrapper.kill()
            wrapper.wait(LIMIT_S)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()


def _tree(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def _ours(pid: int) -> list[int]:
    """Wrapper and HostMain, not the guest."""
    found = [pid]
    for process in _tree(pid):
        with contextlib.suppress(psutil.Error):
            if "tests.support.hostile_agent" not in process.cmdline():
                found.append(process.pid)
    return found


def _sizes(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.exists())


def _until(condition: Callable[[], bool], path: Path) -> None:
    deadline = after(LIMIT_S)
    while not (path.exists() and condition()):
        said = path.read_text(errors="replace") if path.exists() else ""
        assert time.monotonic() < deadline, f"not reached:\n{said}"
        time.sleep(0.05)
