"""The pump of large bodies: the right bytes, from any place in a file, on any file system."""

from __future__ import annotations

import hashlib
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred

from guest.files import pump
from guest.files.pump import BLOCK, BUFFER, ReceivingPump, SendingPump
from vmcontrol.common.eventloop import the_reactor
from vmcontrol.common.filestream import RunningHash

SIZE = 3 * BUFFER + 4321
CONTENT = bytes(range(251)) * (SIZE // 251 + 1)


class Transport:
    """A connection as the pump borrows it."""

    connected = True

    def __init__(self, handle: socket.socket) -> None:
        self._handle = handle
        self.events: list[str] = []

    def getHandle(self) -> socket.socket:
        return self._handle

    def pauseProducing(self) -> None:
        self.events.append("paused")

    def resumeProducing(self) -> None:
        self.events.append("resumed")


@pytest.fixture(params=["direct", "cached"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Past the page cache where the file system allows it; and as where it does not."""
    if request.param == "cached":
        monkeypatch.setattr(pump, "_open_direct", lambda _fd, _mode: None)
    return str(request.param)


@pytest.mark.parametrize("position", [0, 1, BLOCK - 1, BLOCK, BUFFER - 1, BUFFER, 2 * BUFFER + 7, SIZE - 1])
@pytest.mark.usefixtures("way")
@pytest_twisted.ensureDeferred
async def test_a_file_is_sent_from_any_place(tmp_path: Path, position: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT[:SIZE])
    digest = RunningHash()
    digest.feed(0, CONTENT[:position])
    ours, theirs = socket.socketpair()
    transport, over, got = Transport(ours), Deferred[Any](), bytearray()

    def read() -> None:
        while data := theirs.recv(BUFFER):
            got.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    with path.open("rb") as file:
        SendingPump(
            the_reactor(), transport, head=b"head", fd=file.fileno(), position=position, end=SIZE, digest=digest,
            over=over.callback,
        )  # fmt: skip
        assert await over is None
    assert transport.events == ["paused", "resumed"]
    ours.close()
    reader.join(30)
    theirs.close()
    assert bytes(got) == b"head" + CONTENT[position:SIZE]
    assert digest.hexdigest() == hashlib.sha256(CONTENT[:SIZE]).hexdigest()


@pytest.mark.usefixtures("way")
@pytest_twisted.ensureDeferred
async def test_a_file_that_became_shorter_is_no_file_of_zeros(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT[: BUFFER + 10])
    ours, theirs = socket.socketpair()
    over: Deferred[Any] = Deferred()
    reader = threading.Thread(target=lambda: [None for _ in iter(lambda: theirs.recv(BUFFER), b"")])
    reader.start()
    with path.open("rb") as file:
        SendingPump(
            the_reactor(), Transport(ours), head=b"", fd=file.fileno(), position=0, end=SIZE, digest=RunningHash(),
            over=over.callback,
        )  # fmt: skip
        assert isinstance(await over, EOFError)
    ours.close()
    reader.join(30)
    theirs.close()


@pytest.mark.parametrize("position", [0, 1, BLOCK, BUFFER - 1, BUFFER + 5])
@pytest.mark.usefixtures("way")
@pytest_twisted.ensureDeferred
async def test_a_body_is_written_to_any_place(tmp_path: Path, position: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT[:position])
    digest = RunningHash()
    digest.feed(0, CONTENT[:position])
    ours, theirs = socket.socketpair()
    counts: list[int] = []
    writer = threading.Thread(target=lambda: theirs.sendall(CONTENT[position:SIZE]))
    writer.start()
    with path.open("rb+") as file:
        receiving = ReceivingPump(
            the_reactor(), Transport(ours), fd=file.fileno(), position=position, count=SIZE - position, digest=digest,
            arrived=counts.append, failed=lambda error: pytest.fail(str(error)),
        )  # fmt: skip
        await receiving.ended()
    writer.join(30)
    ours.close()
    theirs.close()
    assert path.read_bytes() == CONTENT[:SIZE]
    assert digest.hexdigest() == hashlib.sha256(CONTENT[:SIZE]).hexdigest()
    assert sum(counts) == SIZE - position
