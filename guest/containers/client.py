"""The agent's way to the root helper: one socket, inherited from start-agent and handed on to nobody."""

from __future__ import annotations

import array
import os
import socket

VARIABLE = "VMWRAPPER_CONTAINERS"
"""Environment variable with the number of the descriptor."""


class ContainerHelper:
    """The helper. What is sent to it is a container to run; all else is said over that container's own socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def run(self, request: bytes, fds: list[int]) -> socket.socket:
        """Ask for a container; its control socket. fds: stdin, stdout, stderr, the task's folder. Raises OSError."""
        ours, theirs = socket.socketpair()
        try:
            rights = array.array("i", [*fds, theirs.fileno()])
            self._connection.sendmsg([b"run"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            ours.settimeout(10)  # the helper reads as soon as it has forked
            ours.sendall(len(request).to_bytes(4, "little") + request)
            ours.setblocking(False)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        return ours


def inherited() -> ContainerHelper | None:
    """The helper that start-agent has made; None: there is none."""
    number = os.environ.pop(VARIABLE, "")
    if not number.isascii() or not number.isdigit():
        return None
    try:
        os.set_inheritable(int(number), False)
        return ContainerHelper(socket.socket(fileno=int(number)))
    except OSError:
        return None
