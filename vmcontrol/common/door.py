"""The door: connections between the wrapper and its HostMain without a port, over a socket that the wrapper hands down.

For each connection the wrapper makes a pair of connected sockets and sends one of them through the door (unix(7),
SCM_RIGHTS). Nobody else on the computer can find, fill or take it, and who comes through it is the wrapper. What is
spoken over the connections is HTTP, as over the TCP port.

Where there is no such thing (Windows) `pair` answers None, and the wrapper goes to the TCP port with its secret.
"""

from __future__ import annotations

import logging
import socket
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectError
from twisted.internet.interfaces import IReadDescriptor, IStreamClientEndpoint
from twisted.internet.protocol import Factory
from twisted.python.failure import Failure
from zope.interface import implementer

log = logging.getLogger(__name__)

KNOCK = b"\n"
"""A descriptor needs a byte to travel with."""
_KNOCKS_AT_ONCE = 16
"""Taken in one go: calls that were waiting are looked at before more come."""


def pair() -> tuple[socket.socket, socket.socket] | None:
    """Our end of a new door, and the one to hand down; None where no descriptor can be sent. Raises OSError."""
    if not hasattr(socket, "AF_UNIX") or not hasattr(socket, "send_fds"):
        return None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    return ours, theirs


@implementer(IStreamClientEndpoint)
class DoorEndpoint:
    """The wrapper's end: each `connect` is a new connection to the HostMain behind it, at once or never."""

    def __init__(self, reactor: Any, door: socket.socket) -> None:
        self._reactor = reactor
        self._door = door

    def connect(self, protocolFactory: Any) -> Deferred[Any]:  # noqa: N803 (Twisted's names)
        """Errback ConnectError: HostMain is gone, takes nothing more, or we have no descriptor left."""
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with ours, theirs:
                socket.send_fds(self._door, [KNOCK], [theirs.fileno()])
                ours.setblocking(False)
                adopted = _Adopted(protocolFactory)
                self._reactor.adoptStreamConnection(ours.fileno(), socket.AF_UNIX, adopted)
        except OSError as error:
            return fail(ConnectError(string=f"HostMain cannot be reached: {error.strerror or error}"))
        return succeed(adopted.protocol)

    def close(self) -> None:
        """HostMain is gone. Connections that it took end by themselves."""
        self._door.close()


class _Adopted(Factory):
    """Remembers the protocol that another factory makes."""

    noisy = False

    def __init__(self, factory: Any) -> None:
        self._factory = factory
        self.protocol: Any = None

    def buildProtocol(self, addr: Any) -> Any:  # noqa: N802
        self._factory.doStart()
        self.protocol = self._factory.buildProtocol(addr)
        return self.protocol


@implementer(IReadDescriptor)
class DoorListener:
    """HostMain's end: `factory` makes a protocol for each connection that the wrapper sends."""

    def __init__(self, reactor: Any, fd: int, factory: Any) -> None:
        """fd: what was inherited. Raises OSError if it is no socket."""
        self._reactor = reactor
        self._factory = factory
        self._door: socket.socket | None = socket.socket(fileno=fd)
        self._door.set_inheritable(False)
        self._door.setblocking(False)

    def start(self) -> None:
        """Take connections, also those that were sent before."""
        self._reactor.addReader(self)

    def stop(self) -> None:
        """Take no more. Harmless when stopped."""
        door, self._door = self._door, None
        if door is not None:
            self._reactor.removeReader(self)
            door.close()

    def fileno(self) -> int:
        return -1 if self._door is None else self._door.fileno()

    def doRead(self) -> None:  # noqa: N802
        for _ in range(_KNOCKS_AT_ONCE):
            if self._door is None:
                return
            try:
                data, fds, _, _ = socket.recv_fds(self._door, len(KNOCK), 1, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
            except BlockingIOError:
                return
            except OSError as error:
                log.warning("the wrapper's door: %s", error)
                data, fds = b"", []
            if not data:
                self.stop()  # the wrapper is gone: its lifeline says so too
                return
            if not fds:
                log.warning("a connection of the wrapper is lost: HostMain has no file descriptor left for it")
            for fd in fds:
                self._take(fd)

    def connectionLost(self, reason: Failure) -> None:  # noqa: N802, ARG002
        """The reactor saw the end before we read it, or is stopping."""
        self.stop()

    def logPrefix(self) -> str:  # noqa: N802
        return "door"

    def _take(self, fd: int) -> None:
        with socket.socket(fileno=fd) as connection:
            connection.setblocking(False)
            try:
                self._reactor.adoptStreamConnection(connection.fileno(), socket.AF_UNIX, self._factory)
            except OSError as error:
                log.warning("a connection of the wrapper is lost: %s", error)
