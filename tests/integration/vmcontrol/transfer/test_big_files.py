"""Large files to and from a real guest with little memory, through everything that may happen to them on the way:
the connection is cut, and the virtual machine is saved and comes back with another port and dead connections."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as global_reactor
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread

from tests.support.linkproxy import Proxy
from tests.support.real_guests import BOOT_LIMIT_S, real_image
from vmcontrol.common import eventloop
from vmcontrol.hypervisors.choose import open_hypervisor
from vmcontrol.hypervisors.interface import Hypervisor, VmSpec
from vmcontrol.link.dialler import GuestLink
from vmcontrol.protocol.handshake import AGENT_PORT
from vmcontrol.transfer.http import HttpTransfer

reactor: Any = global_reactor
log = logging.getLogger(__name__)
SECRET = "0123456789abcdef" * 4
MIB = 1024 * 1024
MEMORY_MB = 256

pytestmark = [pytest.mark.qemu, pytest.mark.slow]


class Rig:
    """A guest, and a proxy before the port that leads to its agent."""

    def __init__(self, hypervisor: Hypervisor, proxy: Proxy, link: GuestLink) -> None:
        self.hypervisor, self.proxy, self.link = hypervisor, proxy, link
        self.saving: Deferred[None] | None = None

    async def save_and_resume(self) -> None:
        """As HostMain does it, or the next one."""
        self.link.pause()
        await self.hypervisor.save_state("vm")
        await self.hypervisor.start("vm")
        address = (await self.hypervisor.info("vm")).agent_address
        assert address is not None
        assert address != self.proxy.target  # a free port, chosen anew
        self.proxy.target = address
        self.proxy.cut_all()
        self.link.renew()
        self.link.resume()
        await self.link.set_clock()

    def at(self, position: int) -> Callable[[int, int], None]:
        """Progress: from `position` bytes on, save the VM; once."""
        self.saving = None

        def progress(done: int, _total: int) -> None:
            if done > position and self.saving is None:
                self.saving = eventloop.start(self.save_and_resume())

        return progress


@asynccontextmanager
async def rig(folder: Path) -> AsyncIterator[Rig]:
    image = await deferToThread(real_image)
    secret_file = folder / "secret"
    secret_file.write_text(SECRET)
    secret_file.chmod(0o600)
    spec = VmSpec(
        name="vm",
        image=image,
        folder=folder / "vm" / "vm",
        memory_mb=MEMORY_MB,
        agent_port=AGENT_PORT,
        secret_file=secret_file,
        console_log=folder / "console.log",
    )
    hypervisor = await open_hypervisor("QEMU", reactor, folder / "vm")
    await hypervisor.create(spec)
    proxy: Proxy | None = None
    link: GuestLink | None = None
    try:
        await hypervisor.start("vm")
        address = (await hypervisor.info("vm")).agent_address
        assert address is not None
        proxy = Proxy(reactor, address)
        link = GuestLink(reactor, name="vm", address=proxy.address, secret=SECRET.encode(), broker=lambda: None)
        link.start()
        await link.wait_up(BOOT_LIMIT_S)
        yield Rig(hypervisor, proxy, link)
    finally:
        if link is not None:
            await link.stop()
        if proxy is not None:
            await proxy.close()
        await hypervisor.delete("vm")
        await hypervisor.close()


def make(path: Path, mebibytes: int) -> str:
    """Bytes of which no two MiB are the same; their SHA-256. Blocks."""
    digest, noise = hashlib.sha256(), os.urandom(MIB - 8)
    with path.open("wb") as out:
        for number in range(mebibytes):
            for piece in (number.to_bytes(8, "big"), noise):
                out.write(piece)
                digest.update(piece)
        out.write(b"and a bit")
    digest.update(b"and a bit")
    return digest.hexdigest()


async def there_and_back(mebibytes: int) -> None:
    # Not pytest's folder, which stays: this may be six gigabytes.
    folder = Path(await deferToThread(tempfile.mkdtemp, prefix="big-files-"))
    try:
        async with rig(folder) as r:
            source, back = folder / "source", folder / "back"
            sha256 = await deferToThread(make, source, mebibytes)
            files = HttpTransfer(r.link)

            r.proxy.to_guest.cut_after = [r.proxy.to_guest.since_cut + mebibytes * MIB // 3]
            sent = await files.put(source, "there", progress=r.at(mebibytes * MIB * 2 // 3))
            assert r.saving is not None
            await r.saving
            assert sent.sha256 == sha256
            assert sent.tries == 3  # one for the cut, one for the saved machine
            assert r.proxy.to_guest.seen < 1.5 * mebibytes * MIB

            r.proxy.to_host.cut_after = [r.proxy.to_host.since_cut + mebibytes * MIB // 3]
            fetched = await files.get("there", back, progress=r.at(mebibytes * MIB * 2 // 3))
            assert r.saving is not None
            await r.saving
            assert fetched.sha256 == sha256
            assert fetched.tries == 3
            with back.open("rb") as content:
                assert (await deferToThread(hashlib.file_digest, content, "sha256")).hexdigest() == sha256
            names = [entry["name"] for entry in await r.link.list_folder()]
            assert "there" in names
            assert not [name for name in names if name.endswith(".part")]
            log.info("%d MiB: %.0f s there, %.0f s back", mebibytes, sent.seconds, fetched.seconds)
    finally:
        await deferToThread(shutil.rmtree, folder)


@pytest_twisted.ensureDeferred
async def test_a_file_goes_on_after_a_cut_and_after_the_machine_was_saved() -> None:
    await there_and_back(100)


@pytest.mark.optin
@pytest.mark.timeout(3600)
@pytest_twisted.ensureDeferred
async def test_two_gigabytes_do_so_too() -> None:
    """Its outcome stands in docs/results/transfer.md."""
    await there_and_back(2048)
