"""Runs in the guest in the agent's place: commands for /bin/sh, and containers by the root helper.

Each line that comes in is JSON, ["sh", COMMAND] or ["run", REQUEST, STDIN, CANCEL_AFTER_S or null, GRACE_S]; one line
of JSON goes back. A task folder is /home/vm/task.
"""

import array
import json
import os
import pathlib
import queue
import select
import socket
import socketserver
import subprocess
import sys
import threading
import time
from typing import Any

from guest.commands.runner import Runner
from guest.containers import client
from vmcontrol.common import eventloop
from vmcontrol.protocol.container import ContainerRun
from vmcontrol.protocol.messages import CommandRun

HELPER: Any = None
REACTOR: Any = None
RUNNER: Any = None
LISTENER: Any = None
TASK = pathlib.Path("/home/vm/task")


def contain(request: object, text: str, cancel_after_s: float | None = None, grace_s: float = 5.0) -> dict[str, Any]:
    TASK.mkdir(exist_ok=True)
    files = [pathlib.Path(f"/home/vm/{name}") for name in ("in", "out", "err")]
    for path in files:
        path.write_text("")
    files[0].write_text(text)
    fds = [os.open(path, os.O_RDONLY if path is files[0] else os.O_WRONLY) for path in files]
    fds.append(os.open(TASK, os.O_RDONLY | os.O_DIRECTORY))
    control = HELPER.run(json.dumps(request).encode(), fds)
    for fd in fds:
        os.close(fd)
    control.setblocking(True)
    buffer = b""
    cancel_at: float | None = None
    while True:
        if cancel_at is not None and time.monotonic() >= cancel_at:
            control.sendall(json.dumps({"cancel": grace_s}).encode() + b"\n")
            cancel_at = None
        if not select.select([control], [], [], 0.1)[0]:
            continue
        data = control.recv(65536)
        if not data:
            break
        buffer += data
        if b"started" in data and cancel_after_s is not None:
            cancel_at = time.monotonic() + cancel_after_s
    events = [json.loads(line) for line in buffer.splitlines()]
    return {"events": events, "out": files[1].read_text(errors="replace"), "err": files[2].read_text(errors="replace")}


def hostile(message: str, count: int) -> bool:
    """Whatever is sent to the helper itself."""
    fds = array.array("i", [os.open("/etc/passwd", os.O_RDONLY) for _ in range(count)])
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if count else []
    HELPER._connection.sendmsg([message.encode()], ancillary)
    for fd in fds:
        os.close(fd)
    return True


class Listener:
    """Hears what the agent's runner says."""

    def __init__(self) -> None:
        self.ended: queue.Queue[Any] = queue.Queue()

    def command_started(self, id: str, attempt: int, pid: int) -> None: ...
    def command_sampled(self, id: str, attempt: int, sample: Any) -> None: ...
    def command_ended(self, id: str, attempt: int, body: Any) -> None:
        self.ended.put(dict(body))


def by_the_runner(container: object, arguments: list[str], cancel_after_s: float | None) -> Any:
    """A command with a container as the agent runs it; its result."""
    run = CommandRun("*", "c1", arguments[0], tuple(arguments[1:]), container=ContainerRun.from_json(container))
    REACTOR.callFromThread(RUNNER.start, run)
    if cancel_after_s is not None:
        time.sleep(cancel_after_s)
        REACTOR.callFromThread(RUNNER.end, "c1", run.attempt, 0.5)
    return LISTENER.ended.get(timeout=60)


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            kind, *arguments = json.loads(line)
            if kind == "run":
                answer: object = contain(*arguments)
            elif kind == "agent":
                answer = by_the_runner(*arguments)
            elif kind == "hostile":
                answer = hostile(*arguments)
            else:
                done = subprocess.run(["/bin/sh", "-c", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                answer = [done.returncode, done.stdout.decode(errors="replace")]
            self.wfile.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    HELPER = client.inherited()
    server = socketserver.ThreadingTCPServer(("0.0.0.0", 4616), Handler)
    print("shell is there", file=sys.stderr, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    REACTOR, LISTENER, HOME = eventloop.the_reactor(), Listener(), pathlib.Path("/home/vm")
    TASK.mkdir(exist_ok=True)
    state = HOME / ".vmwrapper"
    RUNNER = Runner(REACTOR, LISTENER, base_folder=HOME, working_folder=TASK, state_folder=state, containers=HELPER)
    RUNNER.prepare(set())
    REACTOR.run()
