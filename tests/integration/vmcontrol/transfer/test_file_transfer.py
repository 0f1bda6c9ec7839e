"""Files to and from an agent (a subprocess), through a proxy that breaks things."""

import hashlib
import json
import logging
import os
import resource
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as global_reactor
from twisted.internet.defer import CancelledError
from twisted.internet.task import LoopingCall

from guest.agent.linkserver import HTTP_LIMIT
from guest.files.downloads import LISTING_LIMIT
from tests.support.linkproxy import Proxy
from tests.support.linkrig import SECRET, Agent
from vmcontrol.common import eventloop
from vmcontrol.common.filestream import CHUNK
from vmcontrol.link.dialler import COPIES_AT_ONCE, GuestLink
from vmcontrol.link.errors import LinkEnded
from vmcontrol.link.guesthttp import ANSWER_LIMIT
from vmcontrol.transfer import tries
from vmcontrol.transfer.http import HttpTransfer
from vmcontrol.transfer.interface import (
    FileMissing,
    FileUnusable,
    LocalFileMissing,
    TransferFailed,
)

reactor: Any = global_reactor
log = logging.getLogger(__name__)
MB = 1000 * 1000


class Rig:
    def __init__(self, agent: Agent, proxy: Proxy, link: GuestLink, folder: Path) -> None:
        self.agent, self.proxy, self.link = agent, proxy, link
        self.here, self.base = folder / "here", folder / "guest"
        self.files = HttpTransfer(link)

    def make(self, name: str, size: int) -> Path:
        path = self.here / name
        path.write_bytes(os.urandom(1 << 16) * (size // (1 << 16)) + b"x" * (size % (1 << 16)))
        return path

    def leftovers(self) -> list[str]:
        return [path.name for path in [*self.base.rglob(".*.part"), *self.here.rglob(".*.part")]]


@asynccontextmanager
async def rig(folder: Path, *more: str, secret: bytes = SECRET) -> AsyncIterator[Rig]:
    (folder / "here").mkdir()
    (folder / "guest").mkdir()
    agent = await Agent.start(reactor, folder / "guest", *more)
    proxy = Proxy(reactor, agent.address)
    link = GuestLink(reactor, name="guest1", address=proxy.address, secret=secret, broker=lambda: None)
    try:
        yield Rig(agent, proxy, link, folder)
    finally:
        await link.stop()
        await proxy.close()
        await agent.stop()


def digest(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def in_rig(test: Callable[[Rig], Awaitable[None]]) -> Callable[[Path], Any]:
    async def run(tmp_path: Path) -> None:
        async with rig(tmp_path) as made:
            await test(made)
            assert made.leftovers() == []

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return pytest_twisted.ensureDeferred(run)  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, 3 * CHUNK])
@pytest_twisted.ensureDeferred
async def test_there_and_back(tmp_path: Path, size: int) -> None:
    async with rig(tmp_path) as r:
        source = r.make("source", size)
        source.chmod(0o755)
        sent = await r.files.put(source, "deep/er/there")
        assert (sent.size, sent.sha256, sent.tries) == (size, digest(source), 1)
        there = r.base / "deep/er/there"
        assert there.read_bytes() == source.read_bytes()
        assert there.stat().st_mode & 0o777 == 0o755
        fetched = await r.files.get("deep/er/there", r.here / "back")
        assert (fetched.size, fetched.sha256) == (size, digest(source))
        assert (r.here / "back").read_bytes() == source.read_bytes()
        assert (r.here / "back").stat().st_mode & 0o777 == 0o644
        assert r.leftovers() == []


@in_rig
async def test_names_of_all_kinds(r: Rig) -> None:
    source = r.make("source", 10)
    for name in (
        "a b",
        "100%20%",
        "ü€",
        "a+b&c=d?e#f;g",
        "-rf",
        "'\"\\",
        "new\nline",
        b"\xff\xfe".decode(errors="surrogateescape"),
    ):
        await r.files.put(source, name)
        assert (r.base / name).exists(), name
        await r.files.get(name, r.here / "back")
    absolute = str(r.base / "by absolute path")
    await r.files.put(source, absolute)
    assert Path(absolute).exists()
    listing = await r.link.list_folder()
    assert {"name": "a b", "size": 10, "folder": False} in listing
    assert len(listing) == 9


LONG_NAMES = {"ascii": "x" * 255, "cjk": "\u4e2d" * 85, "emoji": "\U0001f600" * 63 + "xyz"}


@pytest.mark.parametrize("kind", LONG_NAMES)
@pytest.mark.parametrize("size", [10, 3 * MB])
@pytest_twisted.ensureDeferred
async def test_names_may_be_as_long_as_the_disks_allow(tmp_path: Path, kind: str, size: int) -> None:
    name = LONG_NAMES[kind]
    assert len(os.fsencode(name)) == 255
    async with rig(tmp_path) as r:
        source = r.make("source", size).rename(r.here / name)
        sent = await r.files.put(source, f"folder/{name}")
        assert digest(r.base / "folder" / name) == sent.sha256
        source.unlink()
        fetched = await r.files.get(f"folder/{name}", source)
        assert digest(source) == fetched.sha256 == sent.sha256
        assert r.leftovers() == []


@in_rig
async def test_a_folder_is_listed_as_far_as_an_answer_goes(r: Rig) -> None:
    short, long = r.base / "short", r.base / "long"
    short.mkdir()
    for number in range(LISTING_LIMIT + 1):
        (short / f"{number}").touch()
    assert len(await r.link.list_folder("short")) == LISTING_LIMIT
    long.mkdir()
    for number in range(LISTING_LIMIT):
        (long / f"{number:05}{LONG_NAMES['cjk'][5:]}").touch()
    answer = await r.link.http("GET", "/v1/list", query={"path": "long"})
    assert answer["truncated"] is True
    assert 3 * MB < len(json.dumps(answer)) < ANSWER_LIMIT
    assert await r.link.list_folder("long") == answer["listing"]


@in_rig
async def test_an_existing_file_is_replaced_and_progress_is_told(r: Rig) -> None:
    source, told = r.make("source", 5 * MB), list[tuple[int, int]]()
    (r.base / "there").write_bytes(b"old")
    await r.files.put(source, "there", mode=0o600, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (5 * MB, 5 * MB)
    assert told == sorted(told)
    assert len(told) > 3
    assert (r.base / "there").stat().st_mode & 0o777 == 0o600
    told.clear()
    await r.files.get("there", r.here / "back", progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (5 * MB, 5 * MB)


@in_rig
async def test_a_missing_file_is_told_with_what_is_there(r: Rig) -> None:
    (r.base / "out").mkdir()
    (r.base / "out" / "result.dat").write_bytes(b"12345")
    with pytest.raises(FileMissing, match=r"result\.dat") as caught:
        await r.files.get("out/results/1", r.here / "back")
    assert caught.value.folder == str(r.base / "out")
    assert [(entry.name, entry.size) for entry in caught.value.listing] == [("result.dat", 5)]
    assert list(r.here.iterdir()) == []
    with pytest.raises(LocalFileMissing, match="nothing-here"):
        await r.files.put(r.here / "nothing-here", "x")
    with pytest.raises(LocalFileMissing, match="regular"):
        await r.files.put(r.here, "x")


@in_rig
async def test_a_file_of_more_than_was_asked_for_is_not_copied(r: Rig) -> None:
    with (r.base / "sparse").open("wb") as file:
        file.truncate(10**12)
    (r.base / "small").write_bytes(b"12345")
    with pytest.raises(FileUnusable, match="has 1000000000000 bytes, more than the 5"):
        await r.files.get("sparse", r.here / "back", most=5)
    assert list(r.here.iterdir()) == []
    assert (await r.files.get("small", r.here / "back", most=5)).size == 5


@in_rig
async def test_what_is_no_regular_file_is_refused(r: Rig) -> None:
    os.mkfifo(r.base / "pipe")
    (r.base / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(FileUnusable, match="regular") as caught:
            await r.files.get(name, r.here / "back")
        assert (caught.value.path, caught.value.reason) == (name, "is no regular file")
    for size in (1, 2 * MB):
        with pytest.raises(TransferFailed, match="older"):
            await r.files.put(r.make("source", size), "folder")
        with pytest.raises(TransferFailed, match="pipe"):
            await r.files.put(r.make("source", size), "pipe/x")
    with pytest.raises(TransferFailed):
        await r.files.get("pipe", r.here / "no such folder" / "back")


@in_rig
async def test_an_upload_that_breaks_goes_on_where_it_was(r: Rig) -> None:
    source = r.make("source", 40 * MB)
    r.proxy.to_guest.cut_after = [12 * MB, 15 * MB]
    sent = await r.files.put(source, "there")
    assert sent.tries == 3
    assert digest(r.base / "there") == digest(source) == sent.sha256
    assert r.proxy.to_guest.seen < 60 * MB  # from zero each time it would be 67; what was in buffers goes twice


@in_rig
async def test_a_download_that_breaks_goes_on_where_it_was(r: Rig) -> None:
    source = r.make("source", 40 * MB)
    source.rename(r.base / "there")
    r.proxy.to_host.cut_after = [12 * MB, 15 * MB]
    fetched = await r.files.get("there", r.here / "back")
    assert fetched.tries == 3
    assert digest(r.base / "there") == digest(r.here / "back") == fetched.sha256
    assert r.proxy.to_host.seen < 48 * MB


@in_rig
async def test_a_confirmation_that_gets_lost_is_asked_for_again(r: Rig) -> None:
    source = r.make("source", 2 * MB)
    r.proxy.to_host.cut_after = [1, 200, 230, 150, 150]
    sent = await r.files.put(source, "there")
    assert sent.tries > 2
    assert digest(r.base / "there") == sent.sha256 == digest(source)


@in_rig
async def test_a_changed_byte_is_noticed_and_the_copy_repeated(r: Rig) -> None:
    source = r.make("source", 3 * MB)
    r.proxy.to_guest.flip_at = [MB]
    sent = await r.files.put(source, "there")
    assert sent.tries == 2
    assert digest(r.base / "there") == digest(source)
    r.proxy.to_host.flip_at = [r.proxy.to_host.seen + MB]
    fetched = await r.files.get("there", r.here / "back")
    assert fetched.tries == 2
    assert digest(r.here / "back") == digest(source)


@in_rig
async def test_bytes_that_always_change_end_in_an_error(r: Rig) -> None:
    source = r.make("source", 3 * MB)
    r.proxy.to_guest.flip_at = [MB + n * 3 * MB for n in range(3)]
    with pytest.raises(TransferFailed, match="SHA-256"):
        await r.files.put(source, "there")
    assert not (r.base / "there").exists()
    source.rename(r.base / "there")
    r.proxy.to_host.flip_at = [r.proxy.to_host.seen + MB + n * 3 * MB for n in range(3)]
    with pytest.raises(TransferFailed, match="SHA-256"):
        await r.files.get("there", r.here / "back")
    assert not (r.here / "back").exists()


@in_rig
async def test_a_file_that_grows_meanwhile_is_fetched_anew(r: Rig) -> None:
    there = r.make("there", 30 * MB).rename(r.base / "there")
    grown: list[int] = []

    def grow(done: int, _total: int) -> None:
        if not grown and done > 10 * MB:
            grown.append(done)
            with there.open("ab") as out:
                out.write(b"more")

    fetched = await r.files.get("there", r.here / "back", progress=grow)
    assert grown
    assert fetched.size == 30 * MB + 4
    assert digest(r.here / "back") == digest(there)


@in_rig
async def test_an_agent_that_is_gone_ends_in_an_error_after_some_tries(r: Rig) -> None:
    r.proxy.refuse = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tries, "WAIT_S", 0.001)
        with pytest.raises(TransferFailed, match="given up after 11 tries"):
            await r.files.put(r.make("source", MB), "there")
        with pytest.raises(TransferFailed, match="given up"):
            await r.files.get("there", r.here / "back")


@in_rig
async def test_no_limit_counts_while_the_vm_is_paused(r: Rig) -> None:
    source = r.make("source", MB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tries, "STALL_LIMIT_S", 0.2)
        patch.setattr(tries, "WAIT_S", 0.01)
        await r.files.put(source, "warm")
        r.agent.transport.signalProcess("STOP")  # what a paused VM looks like from here
        r.link.pause()
        copying = eventloop.start(r.files.put(source, "there"))
        await eventloop.sleep(reactor, 0.6)
        assert not copying.called
        r.agent.transport.signalProcess(signal.SIGCONT)
        r.link.resume()
        sent = await copying
        assert sent.tries == 1
        r.agent.transport.signalProcess("STOP")  # and without saying so the try is broken off
        copying = eventloop.start(r.files.get("there", r.here / "back"))
        await eventloop.sleep(reactor, 0.5)
        r.agent.transport.signalProcess(signal.SIGCONT)
        assert (await copying).tries > 1


@pytest_twisted.ensureDeferred
async def test_a_wrong_secret_copies_nothing(tmp_path: Path) -> None:
    async with rig(tmp_path, secret=b"another secret than the guest's") as r:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tries, "WAIT_S", 0.001)
            with pytest.raises(TransferFailed):
                await r.files.put(r.make("source", 10), "there")
        assert list(r.base.iterdir()) == []


@pytest_twisted.ensureDeferred
async def test_a_full_disk_in_the_guest_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    async with rig(tmp_path, str(2 * MB)) as r:
        with pytest.raises(TransferFailed, match="File too large"):
            await r.files.put(r.make("source", 20 * MB), "there")
        assert list(r.base.iterdir()) == []
        await r.files.put(r.make("source", MB), "there")
        huge = r.here / "huge"
        huge.touch()
        os.truncate(huge, 1 << 43)
        before = r.proxy.to_guest.seen
        with pytest.raises(TransferFailed, match="no room"):
            await r.files.put(huge, "huge")
        assert r.proxy.to_guest.seen - before < MB  # asked before sending


@pytest_twisted.ensureDeferred
async def test_a_full_disk_on_the_host_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        r.make("there", 20 * MB).rename(r.base / "there")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MB, hard))
        try:
            with pytest.raises(TransferFailed, match="File too large"):
                await r.files.get("there", r.here / "back")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(r.here.iterdir()) == []


@pytest_twisted.ensureDeferred
async def test_a_gigabyte_costs_little_memory(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.files.put(r.make("source", 8 * MB), "warm")
        await r.files.get("warm", r.here / "warm")
        agent_before = r.agent.peak_memory()
        source = r.here / "sparse"
        source.touch()
        os.truncate(source, 1 << 30)
        here = [_resident()]
        watch = LoopingCall(lambda: here.append(_resident()))
        watch.start(0.05)
        try:
            sent = await r.files.put(source, "there")
            fetched = await r.files.get("there", r.here / "back")
        finally:
            watch.stop()
        assert sent.sha256 == fetched.sha256
        assert (r.here / "back").stat().st_size == 1 << 30
        assert r.agent.peak_memory() - agent_before < 24 * MB
        assert max(here) - here[0] < 24 * MB
        log.info("put %.0f MB/s, get %.0f MB/s", 1074 / sent.seconds, 1074 / fetched.seconds)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@in_rig
async def test_several_copies_at_a_time(r: Rig) -> None:
    sources = [r.make(f"source{n}", 2 * MB + n) for n in range(6)]
    puts = [eventloop.start(r.files.put(source, source.name)) for source in sources]
    for put, source in zip(puts, sources, strict=True):
        assert (await put).sha256 == digest(source)
    gets = [eventloop.start(r.files.get(source.name, r.here / f"back{n}")) for n, source in enumerate(sources)]
    for got, source in zip(gets, sources, strict=True):
        assert (await got).sha256 == digest(source)


@in_rig
async def test_many_copies_at_a_time_wait_for_each_other(r: Rig) -> None:
    sources = [r.make(f"source{n}", 3 * MB + n) for n in range(40)]
    puts = [eventloop.start(r.files.put(source, source.name)) for source in sources]
    for put, source in zip(puts, sources, strict=True):
        sent = await put
        assert (sent.sha256, sent.tries) == (digest(source), 1)
    gets = [eventloop.start(r.files.get(source.name, r.here / f"back{n}")) for n, source in enumerate(sources)]
    for got, source in zip(gets, sources, strict=True):
        fetched = await got
        assert (fetched.sha256, fetched.tries) == (digest(source), 1)


@in_rig
async def test_a_copy_that_waits_for_others_can_be_given_up(r: Rig) -> None:
    sources = [r.make(f"source{n}", 3 * MB + n) for n in range(COPIES_AT_ONCE + 2)]
    puts = [eventloop.start(HttpTransfer(r.link).put(source, source.name)) for source in sources]
    given_up = puts.pop(-2)
    assert not given_up.called
    given_up.cancel()
    with pytest.raises(CancelledError):
        await given_up
    del sources[-2]
    for put, source in zip(puts, sources, strict=True):
        assert (await put).sha256 == digest(source)
    assert not (r.base / f"source{COPIES_AT_ONCE}").exists()
    assert COPIES_AT_ONCE < HTTP_LIMIT, "or the agent ends one connection for the next"


@in_rig
async def test_copies_that_wait_end_with_the_link(r: Rig) -> None:
    sources = [r.make(f"source{n}", 3 * MB + n) for n in range(COPIES_AT_ONCE + 3)]
    puts = [eventloop.start(r.files.put(source, source.name)) for source in sources]
    await r.link.stop()
    assert all(put.called for put in puts[COPIES_AT_ONCE:])
    for put in puts:  # the others at their next try: the link of a machine that is started anew is another
        with pytest.raises(LinkEnded):
            await put


@in_rig
async def test_a_transfer_that_the_guest_gave_up_begins_anew(r: Rig) -> None:
    source = r.make("source", 3 * MB)
    ask = r.link.http
    given_up: list[str] = []

    async def give_up_first(method: str, path: str, **more: Any) -> dict[str, Any]:
        if path.endswith("/commit") and not given_up:
            given_up.append(path)
            await ask("DELETE", path.removesuffix("/commit"))
        return await ask(method, path, **more)

    r.link.http = give_up_first  # type: ignore[method-assign]
    sent = await r.files.put(source, "there")
    assert given_up
    assert (sent.tries, sent.sha256) == (2, digest(r.base / "there"))


def test_http_is_one_way_of_several() -> None:
    """What Chirp will be too."""
    from typing import get_type_hints

    assert "return" in get_type_hints(HttpTransfer.put)
