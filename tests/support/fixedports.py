"""The ports of 2009 (61613, 8080; Chirp's 9094), for one test of this computer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.limits import after

STOMP, XMLRPC = 61613, 8080
LIMIT_S = 100.0


@contextlib.contextmanager
def ports_of_2009(*ports: int) -> Iterator[None]:
    """All are free (STOMP and XMLRPC, if none are named), and no other test takes them.

    Skips, with the reason, when something else listens there.
    """
    with (Path(tempfile.gettempdir()) / f"vmwrapper-ports-of-2009-{os.getuid()}").open("w") as lock:
        deadline = after(LIMIT_S)
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, "another test does not give the ports of 2009 back"
                time.sleep(0.2)
        for port in ports or (STOMP, XMLRPC):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError as error:
                    pytest.skip(f"NOT TESTED: port {port} of 2009's configuration files is in use here: {error}")
        yield
