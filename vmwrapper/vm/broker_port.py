"""The TCP port of a broker that a VMmanage task runs: chosen here, bound by the broker later."""

from __future__ import annotations

import errno
import os
import socket

HOST = "127.0.0.1"


def free() -> int:
    """A port that nobody uses now."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def is_taken(port: int) -> bool:
    """Whether somebody listens there; asked when no broker of ours does."""
    with socket.socket() as listener:
        if os.name == "posix":
            # What closed connections left does not count.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
        return False
