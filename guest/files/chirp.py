"""Chirp's server in the guest, as with protocol 1: reading and writing the base folder, for the host's addresses.

Owns the chirp_server process and starts it again when it ends. There is no secret: whoever has one of the addresses
may read, write and list the folder, nothing outside of it. Never runs as root; reports to no catalog but a closed port.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twisted.internet import error
from twisted.internet.defer import Deferred, succeed
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from vmcontrol.common import eventloop
from vmcontrol.common.eventloop import LimitReached, TimerHandle, with_limit
from vmcontrol.common.threads import defer_to_thread

log = logging.getLogger(__name__)

AGAIN_S, AGAIN_MOST_S = 1.0, 60.0
"""Seconds until it is started again; doubled each time, from the beginning after it ran longer than the most."""
END_LIMIT_S = 5.0
CLIENTS = 16
IDLE_S, STALLED_S = 60, 600
"""Seconds after which the server drops a client that asks nothing, or one whose transfer stands."""
RIGHTS = "rwl"
"""Read, write, list, as CERN's VMwrapper gave them."""
LINE_LIMIT = 4096


def rights(addresses: Sequence[str]) -> str:
    """The server's default access list."""
    return "".join(f"address:{address} {RIGHTS}\n" for address in addresses)


def resolved(hosts: Sequence[str]) -> list[str]:
    """IPv4 addresses of the hosts; a name that is not known is left out, with a warning. Blocks: for a thread."""
    addresses: dict[str, None] = {}
    for host in hosts:
        try:
            found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
        except OSError as problem:
            log.warning("[VM] chirp_hosts: %s: %s", host, problem.strerror or problem)
            continue
        addresses.update(dict.fromkeys(str(entry[4][0]) for entry in found))
    return list(addresses)


class ChirpServer:
    """chirp_server on `folder`, for as long as the agent runs. hosts: names or addresses that get the rights."""

    def __init__(
        self,
        reactor: Any,
        program: str,
        *,
        folder: Path,
        state_folder: Path,
        interface: str,
        port: int,
        hosts: Sequence[str],
    ) -> None:
        self._reactor = reactor
        self._program = program
        self._folder = folder
        self._own = state_folder / "chirp"
        self._interface = interface
        self._port = port
        self._hosts = tuple(hosts)
        self._process: _Server | None = None
        self._again: TimerHandle | None = None
        self._pause_s = AGAIN_S
        self._stopped = False

    def start(self) -> None:
        """Start it now, and again whenever it ends."""
        eventloop.start_logged(self._start(), "Chirp's server")

    async def stop(self) -> None:
        """End it for good."""
        self._stopped = True
        if self._again is not None and self._again.active():
            self._again.cancel()
        if self._process is not None:
            try:
                await with_limit(self._reactor, END_LIMIT_S, "Chirp's server", self._process.end())
            except LimitReached as problem:
                log.error("%s", problem)

    async def _start(self) -> None:
        addresses = await defer_to_thread(self._reactor, resolved, self._hosts)
        if self._stopped:
            return
        if not addresses:
            log.error("files are not served by Chirp: no address of a host is known")
            self._start_again()
            return
        account = _account_for(self._folder)
        if account is not None and account.pw_uid == 0:
            log.error("files are not served by Chirp: it never runs as root, and %s belongs to root", self._folder)
            return
        self._own.mkdir(mode=0o700, exist_ok=True)
        access = self._own / "rights"
        access.write_text(rights(addresses))
        if account is not None:
            for path in (self._own, access):
                os.chown(path, account.pw_uid, account.pw_gid)
            self._own.parent.chmod(0o711)  # the server has to find its own folder; outputs stay the agent's alone
        arguments = [self._program, *self._options(access)]
        # its working folder and home are its own: it leaves no files elsewhere
        environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self._own), "LC_ALL": "C.UTF-8"}
        self._process = _Server(self._ended, self._reactor.seconds())
        try:
            self._reactor.spawnProcess(
                self._process,
                arguments[0],
                arguments,
                environment,
                str(self._folder),
                uid=None if account is None else account.pw_uid,
                gid=None if account is None else account.pw_gid,
                childFDs={0: "w", 1: "r", 2: "r"},
            )
        except OSError as problem:
            self._process = None
            log.error("files are not served by Chirp: %s: %s", self._program, problem.strerror)
            return
        log.info("Chirp's server on port %d for %s serves %s", self._port, ", ".join(addresses), self._folder)

    def _options(self, access: Path) -> list[str]:
        options = ["-r", str(self._folder), "-y", str(self._own), "-p", str(self._port)]
        if self._interface != "0.0.0.0":  # noqa: S104 (compared only)
            options += ["-I", self._interface]
        options += ["-A", str(access), "--inherit-default-acl", "-a", "address"]
        options += ["-u", "127.0.0.1:1", "-U", "86400"]  # else it reports to a public catalog
        options += ["-M", str(CLIENTS), "-t", str(IDLE_S), "-s", str(STALLED_S), "-C", "-E", "-d", "notice"]
        return options

    def _ended(self, why: str, ran_from: float) -> None:
        self._process = None
        if self._stopped:
            return
        if self._reactor.seconds() - ran_from > AGAIN_MOST_S:
            self._pause_s = AGAIN_S
        log.warning("Chirp's server has ended (%s); again in %g s", why, self._pause_s)
        self._start_again()

    def _start_again(self) -> None:
        self._again = self._reactor.callLater(self._pause_s, self.start)
        self._pause_s = min(AGAIN_MOST_S, self._pause_s * 2)


def _account_for(folder: Path) -> pwd.struct_passwd | None:
    """The account that the server runs as; None: ours, as that is not root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwuid(folder.stat().st_uid)
    except KeyError:
        return pwd.getpwuid(0)


class _Server(ProcessProtocol):
    """The process; its lines go to our log."""

    transport: Any

    def __init__(self, ended: Any, since: float) -> None:
        self._on_end = ended
        self._since = since
        self._line = b""
        self._over: Deferred[None] = Deferred()
        self._is_over = False

    def end(self) -> Deferred[None]:
        if self._is_over:
            return succeed(None)
        with contextlib.suppress(error.ProcessExitedAlready):
            self.transport.signalProcess("KILL")  # it holds nothing that could be lost; its children end with it
        return self._over

    def childDataReceived(self, childFD: int, data: bytes) -> None:  # noqa: N802, N803, ARG002
        *lines, rest = (self._line + data).split(b"\n")
        self._line = rest[-LINE_LIMIT:]
        for line in lines:
            log.info("chirp_server: %s", line.decode("utf-8", "replace")[:LINE_LIMIT])

    def processEnded(self, reason: Failure) -> None:  # noqa: N802
        self._is_over = True
        if not self._over.called:
            self._over.callback(None)
        self._on_end(str(reason.value), self._since)
