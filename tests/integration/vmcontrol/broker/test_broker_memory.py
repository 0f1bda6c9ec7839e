"""What the embedded broker costs at most, whatever its clients do: measured in its own process."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.brokers import BrokerAddress, running_broker
from vmcontrol.broker.frames import FrameLimits

ALLOWED_KB = 64 * 1000


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerAddress]:
    with running_broker("embedded", tmp_path) as address:
        yield address


def peak_kb(broker: BrokerAddress) -> int:
    status = Path(f"/proc/{broker.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


@contextlib.contextmanager
def client(broker: BrokerAddress) -> Iterator[socket.socket]:
    with socket.create_connection((broker.host, broker.port), 30) as connection:
        connection.sendall(
            f"CONNECT\naccept-version:1.2\nhost:x\nlogin:{broker.login}\npasscode:{broker.passcode}\n\n\0".encode()
        )
        heard = b""
        while b"\0" not in heard:
            heard += connection.recv(4096)
        assert heard.startswith(b"CONNECTED")
        yield connection


def served(broker: BrokerAddress) -> bool:
    """Whether a well-behaved client gets its message."""
    with client(broker) as good:
        good.sendall(b"SUBSCRIBE\nid:1\ndestination:/topic/good\n\n\0SEND\ndestination:/topic/good\n\nhello\0")
        heard = b""
        while not heard.endswith(b"hello\0"):
            heard += good.recv(4096)
    return True


def shout(connection: socket.socket, data: bytes, times: int = 1) -> None:
    with contextlib.suppress(OSError):  # being dropped in the middle is what may happen
        for _ in range(times):
            connection.sendall(data)


def test_unfinished_frames_of_many_clients(broker: BrokerAddress) -> None:
    assert served(broker)
    before = peak_kb(broker)
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            shout(stack.enter_context(client(broker)), b"SEND\ndestination:/topic/a\n\n" + b"x" * 15_000_000)
        assert served(broker)
    assert peak_kb(broker) - before < ALLOWED_KB


def test_readers_that_do_not_read(broker: BrokerAddress) -> None:
    assert served(broker)
    before = peak_kb(broker)
    message = b"SEND\ndestination:/topic/%d\ncontent-length:1000000\n\n" + b"x" * 1_000_000 + b"\0"
    with contextlib.ExitStack() as stack:
        for number in range(8):
            lazy = stack.enter_context(client(broker))
            lazy.sendall(b"SUBSCRIBE\nid:1\ndestination:/topic/%d\n\n\0" % number)
        sender = stack.enter_context(client(broker))
        for number in range(8):
            shout(sender, message.replace(b"%d", b"%d" % number), 20)
        assert served(broker)
    assert peak_kb(broker) - before < ALLOWED_KB


def test_headers_without_end(broker: BrokerAddress) -> None:
    assert served(broker)
    before = peak_kb(broker)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            shout(stack.enter_context(client(broker)), b"SEND\n" + b"".join(b"h%d:1\n" % i for i in range(100_000)))
            shout(stack.enter_context(client(broker)), b"SEND\nlong:" + b"x" * 1_000_000)
        assert served(broker)
    assert peak_kb(broker) - before < ALLOWED_KB / 4


def test_a_message_of_the_largest_size_to_two_readers(broker: BrokerAddress) -> None:
    assert served(broker)
    before = peak_kb(broker)
    size = FrameLimits().body_bytes
    with client(broker) as first, client(broker) as second, client(broker) as sender:
        for reader in (first, second):
            reader.sendall(b"SUBSCRIBE\nid:1\ndestination:/topic/a\nreceipt:r\n\n\0")
            assert reader.recv(4096).startswith(b"RECEIPT")
        shout(sender, b"SEND\ndestination:/topic/a\ncontent-length:%d\n\n" % size + b"x" * size + b"\0")
        for reader in (first, second):
            count = 0
            while count < size:
                data = reader.recv(1 << 20)
                assert data, count
                count += len(data)
    assert peak_kb(broker) - before < ALLOWED_KB
