"""Files that come to the guest: what is confirmed twice, taken up or given up while it is brought to its place."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted

from guest.files.uploads import UNFINISHED_LIMIT, Refusal, Uploads
from vmcontrol.common import atomicfile
from vmcontrol.common.eventloop import Event, sleep, start, the_reactor, with_limit

CONTENT = b"0123456789"
SHA256 = {"sha256": hashlib.sha256(CONTENT).hexdigest()}
LIMIT_S = 10.0


class SlowDisk:
    """Holds the last step of bringing a file to its place, until `go`."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.error: OSError | None = None
        self.entered = 0

    def sync(self, _folder: Path) -> None:
        self.entered += 1
        assert self.go.wait(LIMIT_S)
        if self.error is not None:
            raise self.error


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    disk = SlowDisk()
    monkeypatch.setattr(atomicfile, "fsync_folder", disk.sync)
    yield disk
    disk.go.set()


async def sent(table: Uploads, transfer: str = "one") -> None:
    """The content is over, and waits for its confirmation."""
    assert (await table.begin(transfer, "there", len(CONTENT), 0o644))["have"] == 0
    connection = object()
    upload = table.receive(transfer, 0, len(CONTENT), connection)
    upload.receiver.write(CONTENT)
    assert await table.body_done(transfer, upload) == {"have": len(CONTENT)}


async def soon(work: Any) -> Any:
    return await with_limit(the_reactor(), LIMIT_S, "the answer", work)


async def placing(disk: SlowDisk) -> None:
    while not disk.entered:
        await sleep(the_reactor(), 0.01)
    await sleep(the_reactor(), 0.05)


@pytest_twisted.ensureDeferred
async def test_a_file_that_is_confirmed_twice_at_once_is_brought_to_its_place_once(
    tmp_path: Path, disk: SlowDisk
) -> None:
    table = Uploads(the_reactor(), tmp_path)
    await sent(table)
    both = [start(table.commit("one", SHA256)) for _ in range(2)]
    await placing(disk)
    assert not any(one.called for one in both)
    disk.go.set()
    for one in both:
        assert (await soon(one))["complete"] is True
    assert disk.entered == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_bytes() == CONTENT


@pytest_twisted.ensureDeferred
async def test_a_transfer_that_is_taken_up_while_it_is_confirmed_is_complete(tmp_path: Path, disk: SlowDisk) -> None:
    table = Uploads(the_reactor(), tmp_path)
    await sent(table)
    first = start(table.commit("one", SHA256))  # the connection breaks here: nobody waits for this answer
    await placing(disk)
    again = start(table.begin("one", "there", len(CONTENT), 0o644))
    await sleep(the_reactor(), 0.05)
    assert not again.called
    disk.go.set()
    assert (await soon(again))["complete"] is True
    assert (await soon(table.commit("one", SHA256)))["complete"] is True
    assert (await soon(first))["complete"] is True
    assert disk.entered == 1


@pytest_twisted.ensureDeferred
async def test_what_cannot_be_brought_to_its_place_fails_for_all_and_begins_anew(
    tmp_path: Path, disk: SlowDisk
) -> None:
    table = Uploads(the_reactor(), tmp_path)
    await sent(table)
    disk.error = OSError(28, "No space left on device")
    first, second = start(table.commit("one", SHA256)), start(table.commit("one", SHA256))
    await placing(disk)
    again = start(table.begin("one", "there", len(CONTENT), 0o644))
    disk.go.set()
    with pytest.raises(Refusal) as caught:
        await soon(first)
    assert caught.value.status == 507
    assert (await soon(again))["have"] == 0
    with pytest.raises(Refusal):  # it is unknown, or begun anew
        await soon(second)
    await soon(table.discard("one"))
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


@pytest_twisted.ensureDeferred
async def test_what_is_being_confirmed_is_not_given_up(tmp_path: Path, disk: SlowDisk) -> None:
    table = Uploads(the_reactor(), tmp_path)
    await sent(table)
    first = start(table.commit("one", SHA256))
    await placing(disk)
    for number in range(UNFINISHED_LIMIT + 2):
        await soon(table.begin(f"other{number}", f"file{number}", 10, 0o644))
    giving_up = start(table.discard("one"))
    disk.go.set()
    assert (await soon(first))["complete"] is True
    assert await soon(giving_up) == {"have": 0}
    assert (tmp_path / "there").read_bytes() == CONTENT
    assert table.state("one")["complete"] is True
    with pytest.raises(Refusal):
        table.state("other1")
    assert table.state("other2") == {"have": 0}
    table.close()
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest_twisted.ensureDeferred
async def test_a_wrong_digest_is_refused_also_while_another_request_confirms(tmp_path: Path, disk: SlowDisk) -> None:
    table = Uploads(the_reactor(), tmp_path)
    await sent(table)
    first = start(table.commit("one", SHA256))
    await placing(disk)
    wrong = start(table.commit("one", {"sha256": hashlib.sha256(b"other").hexdigest()}))
    disk.go.set()
    with pytest.raises(Refusal) as caught:
        await soon(wrong)
    assert caught.value.status == 422
    assert (await soon(first))["complete"] is True
    assert (tmp_path / "there").read_bytes() == CONTENT


class Busy:
    """An upload whose last bytes are still being written."""

    def __init__(self, upload: Any) -> None:
        self.go, self._drain = Event(), upload.receiver.drain
        upload.receiver.drain = self.drain

    async def drain(self) -> None:
        await self.go.wait()
        await self._drain()


@pytest_twisted.ensureDeferred
async def test_giving_up_late_removes_nothing_of_the_transfer_that_began_anew(tmp_path: Path) -> None:
    table = Uploads(the_reactor(), tmp_path)
    await table.begin("one", "there", 10, 0o644)
    busy = Busy(table._unfinished["one"])
    giving_up = start(table.discard("one"))
    assert (await table.begin("one", "there", 10, 0o644))["have"] == 0
    busy.go.set()
    await giving_up
    assert table._unfinished["one"].partial.exists()
    await table.discard("one")


@pytest_twisted.ensureDeferred
async def test_a_transfer_given_up_while_it_is_taken_up_begins_anew(tmp_path: Path) -> None:
    table = Uploads(the_reactor(), tmp_path)
    await table.begin("one", "there", 10, 0o644)
    busy = Busy(table._unfinished["one"])
    again, giving_up = start(table.begin("one", "there", 10, 0o644)), start(table.discard("one"))
    busy.go.set()
    assert (await again)["have"] == 0
    await giving_up
    assert table.state("one") == {"have": 0}, "what was answered is there"
    await table.discard("one")
