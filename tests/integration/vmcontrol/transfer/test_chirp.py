"""Files by Chirp with the real programs: the agent's server, HostMain's clients, then HostMain as a whole."""

import contextlib
import hashlib
import logging
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_twisted
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.protocol import Protocol

from guest.files.chirp import ChirpServer
from tests.support.agenthost import wait_until
from tests.support.brokers import free_port
from tests.support.fixedports import ports_of_2009
from tests.support.hostmains import running_hostmain
from vmcontrol.common import eventloop
from vmcontrol.common.clock import PausableClock
from vmcontrol.transfer import chirp
from vmcontrol.transfer.chirp import ChirpFailed, ChirpPrograms, ChirpTransfer
from vmcontrol.transfer.interface import FileMissing, FileUnusable, LocalFileMissing, TransferFailed
from vmcontrol.transfer.parts import PREFIX

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("chirp_server", "chirp_put", "chirp_get", "chirp"))),
    reason="Chirp cannot be had: coop-computing-tools is not installed (tools/setup check installs it)",
)
reactor: Any = eventloop.the_reactor()
MB = 1000 * 1000
log = logging.getLogger(__name__)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Readable for the user that the server becomes when the tests run as root: pytest's own folders are not."""
    path = Path(tempfile.mkdtemp(prefix="vmwrapper-chirp-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


class Rig:
    def __init__(self, folder: Path, port: int) -> None:
        self.here, self.base, self.port = folder / "here", folder / "guest", port
        self.clock = PausableClock(reactor)
        self.server: ChirpServer

    def files(self, port: int = 0, place: str = "", base: str | None = None) -> ChirpTransfer:
        async def folder() -> str:
            return str(self.base) if base is None else base

        address = ("127.0.0.1", port or self.port)
        return ChirpTransfer(reactor, self.clock, address=address, programs=ChirpPrograms(place), base=folder)

    def make(self, name: str, size: int) -> Path:
        path = self.here / name
        path.write_bytes(os.urandom(1 << 16) * (size // (1 << 16)) + b"x" * (size % (1 << 16)))
        return path

    def servers(self) -> list[psutil.Process]:
        """The server and its children, one for each connection."""
        return _servers(self.base)


def _servers(folder: Path) -> list[psutil.Process]:
    """They rewrite their arguments; what is left is their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name() == "chirp_server" and process.environ().get("HOME", "").startswith(str(folder)):
                found.append(process)
    return found


@asynccontextmanager
async def rig(folder: Path, *, hosts: tuple[str, ...] = ("127.0.0.1",)) -> AsyncIterator[Rig]:
    made = Rig(folder, free_port())
    state = made.base / ".vmwrapper"
    for path in (made.here, made.base, state):
        path.mkdir()
    state.chmod(0o700)
    if os.geteuid() == 0:
        shutil.chown(made.base, "nobody")
        shutil.chown(state, "nobody")
    program = shutil.which("chirp_server")
    assert program
    server = ChirpServer(
        reactor, program, folder=made.base, state_folder=state, interface="127.0.0.1", port=made.port, hosts=hosts
    )
    made.server = server
    server.start()
    try:
        await _listens(made.port)
        yield made
    finally:
        await server.stop()
        wait_until(lambda: not made.servers(), "the end of Chirp's server and its children", 5)


async def _listens(port: int) -> None:
    """chirp's own second try would come a second later."""

    async def listens() -> None:
        while True:
            try:
                connection: Any = await connectProtocol(TCP4ClientEndpoint(reactor, "127.0.0.1", port), Protocol())
            except ConnectionRefusedError:
                await eventloop.sleep(reactor, 0.02)
            else:
                connection.transport.abortConnection()
                return

    await eventloop.with_limit(reactor, 10, "Chirp's server", listens())


def digest(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def in_rig(test: Callable[[Rig], Awaitable[None]]) -> Callable[[Path], Any]:
    async def run(folder: Path) -> None:
        async with rig(folder) as made:
            await test(made)
            assert not list(made.here.glob(f"{PREFIX}*"))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return pytest_twisted.ensureDeferred(run)  # type: ignore[no-any-return]


@in_rig
async def test_there_and_back_with_names_of_all_kinds(r: Rig) -> None:
    files = r.files()
    for size, name in ((0, "empty"), (1, "a b"), (3 * MB, "deep er/there is/a 100%20&?#"), (10, "-rf"), (5, "'\"\\")):
        source = r.make("source file", size)
        sent = await files.put(source, name)
        assert (sent.size, sent.sha256, sent.tries) == (size, digest(source), 1)
        assert (r.base / name).read_bytes() == source.read_bytes()
        fetched = await files.get(name, r.here / "back again")
        assert (fetched.size, fetched.sha256) == (size, digest(source))
        assert (r.here / "back again").read_bytes() == source.read_bytes()
        assert (r.here / "back again").stat().st_mode & 0o777 == 0o644
    for name in ("ü", "new\nline"):  # chirp would make another name of it
        with pytest.raises(TransferFailed, match="cannot carry"):
            await files.put(source, name)
    source.chmod(0o755)
    await files.put(source, "a b")
    assert (r.base / "a b").stat().st_mode & 0o100
    await files.put(source, str(r.base / "by absolute path"))
    assert (r.base / "by absolute path").exists()
    await r.files(base="").put(source, "/by the name of 2009")
    assert (r.base / "by the name of 2009").exists()


@in_rig
async def test_the_server_is_nobody_of_importance(r: Rig) -> None:
    """Not root, on the agent's address alone, known to no catalog, with rights for the host's address alone."""
    await r.files().put(r.make("x", 1), "x")

    looked_at = 0
    for server in r.servers():
        with contextlib.suppress(psutil.NoSuchProcess):  # the server forks for each connection, and that one has ended
            assert server.uids().effective != 0
            assert {c.laddr.ip for c in server.net_connections() if c.status == psutil.CONN_LISTEN} <= {"127.0.0.1"}
            looked_at += 1
    assert looked_at
    words = r.server._options(r.base / "x")
    assert words[words.index("-u") + 1] == "127.0.0.1:1"
    assert (r.base / ".vmwrapper/chirp/rights").read_text() == "address:127.0.0.1 rwl\n"


@pytest_twisted.ensureDeferred
async def test_another_address_than_the_hosts_gets_nothing(folder: Path) -> None:
    async with rig(folder, hosts=("192.0.2.1",)) as r:
        (r.base / "secret").write_bytes(b"12345")
        with pytest.raises(ChirpFailed, match="denied") as caught:
            await r.files().get("secret", r.here / "back")
        assert caught.value.program_result is not None
        assert caught.value.program_result[2] == 1
        with pytest.raises(ChirpFailed, match="denied"):
            await r.files().put(r.make("x", 1), "x")
        assert not (r.base / "x").exists()


@in_rig
async def test_a_missing_file_is_told_with_what_is_there(r: Rig) -> None:
    source = r.make("source", 5)
    await r.files().put(source, "out/result 1.dat")
    with pytest.raises(FileMissing, match=r"result 1\.dat") as caught:
        await r.files().get("out/results/1", r.here / "back")
    assert caught.value.folder == "/out"
    assert ("result 1.dat", 5, False) in [(e.name, e.size, e.folder) for e in caught.value.listing]
    with pytest.raises(LocalFileMissing, match="nothing-here"):
        await r.files().put(r.here / "nothing-here", "x")
    with pytest.raises(LocalFileMissing, match="regular"):
        await r.files().put(r.here, "x")
    assert [path.name for path in r.here.iterdir()] == ["source"]


@in_rig
async def test_nothing_outside_of_the_served_folder_is_reached(r: Rig) -> None:
    source, outside = r.make("source", 5), r.here.parent / "outside"
    outside.write_text("not served")
    for name in ("../outside", "a/../../outside", "/../outside", str(r.base / "../outside")):
        with pytest.raises(TransferFailed, match="outside"):
            await r.files().get(name, r.here / "back")
        with pytest.raises(TransferFailed, match="outside"):
            await r.files().put(source, name)
    await r.files().put(source, "inside")
    (r.base / "link").symlink_to(outside)
    (r.base / "up").symlink_to(r.here.parent)
    for name in (str(outside), "/etc/passwd", "link", "up/outside"):  # the server's own root, whatever leads out of it
        with pytest.raises((TransferFailed, FileMissing)):
            await r.files().get(name, r.here / "back")
    assert outside.read_text() == "not served"
    assert [path.name for path in r.here.iterdir()] == ["source"]


@in_rig
async def test_a_folder_of_the_guest_is_never_copied_as_one(r: Rig) -> None:
    """chirp_get would, with all names that the guest likes."""
    await r.files().put(r.make("source", 5), "results/evil")
    with pytest.raises(FileUnusable, match="regular"):
        await r.files().get("results", r.here / "back")
    assert [path.name for path in r.here.iterdir()] == ["source"]


@in_rig
async def test_a_server_that_is_not_there_is_an_error_soon(r: Rig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chirp, "ANSWER_LIMIT_S", 1)
        nobody = r.files(port=free_port())
        with pytest.raises(ChirpFailed, match=r"127\.0\.0\.1.*Connection"):
            await nobody.put(r.make("source", 5), "x")
        with pytest.raises(ChirpFailed, match=r"127\.0\.0\.1.*Connection"):
            await nobody.get("x", r.here / "back")
    with pytest.raises(TransferFailed, match=r"chirp is not in /no/folder; .*coop-computing-tools"):
        await r.files(place="/no/folder/chirp_put").get("x", r.here / "back")


@in_rig
async def test_a_pause_of_the_vm_in_the_middle_breaks_no_copy(r: Rig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chirp, "COPY_LIMIT_S", 4)
        patch.setattr(chirp, "SLOWEST_BYTES_PER_S", 1 << 60)
        source = r.make("source", 100 * MB)
        server = psutil.Process().children()[-1]
        assert server.name() == "chirp_server"
        for put in (True, False):
            files = r.files()
            copying = eventloop.start(
                files.put(source, "there") if put else files.get("there", r.here / "back"),
            )
            await _some_bytes(r)
            stopped = [server, *server.children()]
            for process in stopped:  # what a paused VM looks like from here
                process.send_signal(signal.SIGSTOP)
            r.clock.pause()
            await eventloop.sleep(reactor, 5)  # longer than -t: the program fails meanwhile
            assert not copying.called
            for process in stopped:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)
            r.clock.resume()
            result = await copying
            assert result.size == 100 * MB
        assert digest(r.base / "there") == digest(r.here / "back") == digest(source)


async def _some_bytes(r: Rig) -> None:
    while not any(
        path.exists() and path.stat().st_size > MB for path in [r.base / "there", *r.here.glob(f"{PREFIX}*")]
    ):
        await eventloop.sleep(reactor, 0.005)


@in_rig
async def test_a_server_that_dies_is_started_again(r: Rig) -> None:
    source = r.make("source", 5)
    await r.files().put(source, "before")
    for process in r.servers():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    await r.files().put(source, "after")  # chirp itself tries again for as long
    assert (r.base / "after").exists()


@in_rig
async def test_a_gigabyte(r: Rig) -> None:
    source = r.here / "sparse"
    source.touch()
    os.truncate(source, 1 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sent = await r.files().put(source, "there")
    assert (r.base / "there").stat().st_size == sent.size == 1 << 30
    fetched = await r.files().get("there", r.here / "back")
    assert fetched.sha256 == sent.sha256
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 24 * 1024  # KiB
    log.info("put %.1f s, get %.1f s", sent.seconds, fetched.seconds)


@in_rig
async def test_a_copy_that_differs_is_made_again_three_times_in_all(r: Rig) -> None:
    with pytest.MonkeyPatch.context() as patch:

        async def other(*_: object) -> str:
            return "0" * 32

        patch.setattr(ChirpTransfer, "_md5", other)
        with pytest.raises(TransferFailed, match="after 3 copies"):
            await r.files().put(r.make("source", 5), "there")
        with pytest.raises(TransferFailed, match="after 3 copies"):
            await r.files().get("there", r.here / "back")


CHIRP = "[Broker]\ntype = embedded\n[Host]\nfile_transfer = chirp\n"


def test_hostmain_copies_by_chirp_as_in_2009(folder: Path) -> None:
    slot = folder / "slot"
    slot.mkdir()
    with running_hostmain(slot, CHIRP) as host:
        host.vm()
        (slot / "in put").write_bytes(b"1234")
        assert host.api.cpFileToVM("vm", "in put", "work/in put") == ["", "", 0]
        assert (host.home() / "work/in put").read_bytes() == b"1234"
        assert host.api.cpFileFromVM("vm", "work/in put", "back") == ["", "", 0]
        assert (slot / "back").read_bytes() == b"1234"
        assert host.api.putFile("vm", "in put", "again")["size"] == 4
        assert host.api.getFile("vm", str(host.home() / "again"), "back 2")["sha256"] == digest(slot / "in put")
        out, err, status = host.api.cpFileFromVM("vm", "nothing", "back")
        assert (out, status) == ("", 1)
        assert "nothing: no such file in the guest" in err
        assert "again" in err
        host.api.runCommand("vm", {"id": "c1", "command": "cat", "arguments": ["again"]})
        result = host.finished("c1")["result"]
        if os.geteuid() != 0:  # else the agent is root and the server is not: outputs are the agent's alone
            host.api.getFile("vm", result["stdout_path"], "out")  # as the wrapper fetches what a program has written
            assert (slot / "out").read_bytes() == b"1234"
        assert host.api.getVMInfo("vm")["forwards"].keys() == {"9094"}
    wait_until(lambda: not _servers(folder), "the end of Chirp's server", 10)


def test_a_guest_without_port_forwards_is_reached_at_the_address_that_it_has_told(folder: Path) -> None:
    """As on a host-only network."""
    slot = folder / "slot"
    slot.mkdir()
    (slot / "direct.img").touch()
    with ports_of_2009(chirp.CHIRP_PORT), running_hostmain(slot, CHIRP) as host:
        host.vm(image="direct.img")
        assert host.api.waitGuest("vm", 30.0) is True, host.log()
        assert host.api.getVMInfo("vm")["forwards"] == {}
        (slot / "there").write_bytes(b"1234")
        assert host.api.cpFileToVM("vm", "there") == ["", "", 0]
        assert (host.home() / "there").read_bytes() == b"1234"
    wait_until(lambda: not _servers(folder), "the end of Chirp's server", 10)
