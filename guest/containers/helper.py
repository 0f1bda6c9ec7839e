"""The root helper: forks a keeper for each container that the agent asks for; ends with the agent, and all with it.

Started by start-agent, which imports this module at the first request. The agent's end of the socket is inherited by
nobody else. It takes one request, `run`, with five descriptors; the rest is between agent and keeper.
"""

from __future__ import annotations

import array
import contextlib
import os
import signal
import socket
import time
from pathlib import Path

from guest.containers import keeper, mounts

MOST_KEEPERS = 256
END_LIMIT_S = 10.0
FDS = 5


def serve(connection: socket.socket) -> None:
    """Until the agent is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    mounts.private_mounts()
    for folder, mode in ((keeper.BASE, 0o711), (keeper.STORE, 0o700)):
        Path(folder).mkdir(mode=mode, parents=True, exist_ok=True)
        Path(folder).chmod(mode)
    keeper.kill_all()
    keeper.remove_tree(keeper.STORE, keep_top=True)
    keeper.remove_tree(keeper.BASE, keep_top=True)
    children: set[int] = set()
    number = 0
    while True:
        data, fds = _receive(connection)
        if not data:
            break
        _reap(children)
        if data == b"run" and len(fds) == FDS and len(children) < MOST_KEEPERS:
            number += 1
            pid = os.fork()
            if pid == 0:
                connection.close()
                keeper.main(number, fds)
            children.add(pid)
        for fd in fds:
            os.close(fd)
    keeper.kill_all()
    limit = time.monotonic() + END_LIMIT_S
    while children and time.monotonic() < limit:
        _reap(children)
        time.sleep(0.05)


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    fds = array.array("i")
    data, ancillary, _, _ = connection.recvmsg(64, socket.CMSG_LEN(8 * fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)


def _reap(children: set[int]) -> None:
    for pid in list(children):
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                continue
        children.discard(pid)
