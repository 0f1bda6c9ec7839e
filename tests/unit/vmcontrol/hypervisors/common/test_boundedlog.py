"""A log that others make grow: its newest part, within a bound; and the pipe on which a guest prints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from vmcontrol.hypervisors.common import boundedlog
from vmcontrol.hypervisors.common.console import LIMIT, ConsoleLog
from vmcontrol.hypervisors.qemu import console
from vmcontrol.hypervisors.qemu.console import ConsolePipe


@given(pieces=st.lists(st.binary(max_size=120), max_size=30))
def test_it_never_has_more_than_its_bound_and_ends_with_what_came_last(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    for number, piece in enumerate(pieces):
        boundedlog.append(path, piece, 200, 50)
        assert path.stat().st_size <= 200
        assert path.read_bytes().endswith(b"".join(pieces[: number + 1])[-50:])
    assert [one.name for one in path.parent.iterdir()] in ([], ["log"])


def test_nobody_else_writes_it_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        for _ in range(2):
            boundedlog.append(tmp_path / "log", b"x" * 70, 100, 50)
            assert (tmp_path / "log").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "device"])
def test_what_is_no_file_is_not_written(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "log"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/full" if kind == "device" else tmp_path / "other")
    with pytest.raises((OSError, ValueError)):
        boundedlog.append(path, b"x", 100, 50)
    assert not (tmp_path / "other").exists()


class Reactor(Clock):
    """Readers are noted; the test says when one is readable."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: list[ConsolePipe] = []

    def addReader(self, reader: ConsolePipe) -> None:
        if reader not in self.readers:
            self.readers.append(reader)

    def removeReader(self, reader: ConsolePipe) -> None:
        if reader in self.readers:
            self.readers.remove(reader)


class Guest:
    """QEMU's end of the pipe."""

    def __init__(self, path: Path) -> None:
        self.reactor = Reactor()
        self.path = path
        self.pipe = ConsolePipe(self.reactor, ConsoleLog(path))
        self.fd = os.dup(self.pipe.theirs)
        os.close(self.pipe.theirs)
        os.set_blocking(self.fd, False)
        self.looks = 0

    def prints(self, data: bytes) -> int:
        """How much of it the pipe has taken."""
        try:
            return os.write(self.fd, data)
        except BlockingIOError:
            return 0

    def passes(self, seconds: float, flood: bytes = b"") -> int:
        """Time passes, while the guest prints as much as it can; how many bytes went through."""
        taken = 0
        for _ in range(round(seconds / 0.01)):
            while flood and (count := self.prints(flood)):
                taken += count
            for reader in list(self.reactor.readers):
                self.looks += 1
                reader.doRead()
            self.reactor.advance(0.01)
        return taken

    def said(self) -> bytes:
        return self.path.read_bytes() if self.path.exists() else b""


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path / "guest_console.log")


def test_what_a_guest_prints_is_there_at_once_and_gathered(guest: Guest) -> None:
    for character in b"booting\n":
        guest.prints(bytes([character]))
        guest.passes(0.01)
    assert guest.said().startswith(b"b")
    guest.passes(0.06)
    assert guest.said() == b"booting\n"


def test_a_boot_is_not_slowed(guest: Guest) -> None:
    line = b"[    0.000000] some line of a kernel that boots, as long as they are\n"
    assert guest.passes(1.0, line) > 10 * 60_000


def test_a_flood_is_slowed_bounded_and_costs_few_looks(guest: Guest) -> None:
    guest.passes(60, b"x" * 4096)
    guest.looks = 0
    taken = guest.passes(600, b"x" * 4096)
    assert taken <= 600 * console.RATE + 2 * console.PIECE
    assert taken >= 600 * console.RATE * 0.9, "it is never held up for ever"
    assert guest.looks <= 600
    assert guest.path.stat().st_size <= LIMIT
    assert [one.name for one in guest.path.parent.iterdir()] == ["guest_console.log"]
    guest.prints(b"the last words")
    guest.pipe.drain()
    guest.prints(b"the last words")
    guest.pipe.close()
    assert guest.said().endswith(b"the last words"), "the end can be quoted"


def test_who_hears_of_a_guest_that_stands_finds_all_that_it_printed(guest: Guest) -> None:
    guest.prints(b"one")
    guest.passes(0.01)
    guest.prints(b" two")
    guest.pipe.drain()
    assert guest.said() == b"one two"


@pytest.mark.parametrize("how", ["QEMU ends", "we close"])
def test_the_end_leaves_nothing(guest: Guest, how: str) -> None:
    guest.prints(b"the end")
    if how == "QEMU ends":
        os.close(guest.fd)
        guest.passes(0.2)
        guest.pipe.close()
    else:
        guest.pipe.close()
        guest.pipe.close()
    assert guest.said() == b"the end"
    assert guest.reactor.readers == []
    assert guest.reactor.getDelayedCalls() == []


def test_a_log_that_cannot_be_written_is_told_once(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    guest.path.mkdir()
    for _ in range(5):
        guest.prints(b"x")
        guest.passes(0.1)
    assert caplog.text.count("is not kept") == 1
