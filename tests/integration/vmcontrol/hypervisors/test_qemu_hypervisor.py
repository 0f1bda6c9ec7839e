"""The QEMU driver against real QEMU: the contract of all drivers, and what is QEMU's own."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError

from tests.support import tiny_guest
from tests.support.hypervisor_contract import HypervisorContract, World, has_ended
from vmcontrol.common.birth import Birth
from vmcontrol.common.eventloop import sleep, start, the_reactor
from vmcontrol.hypervisors.common import console as console_log
from vmcontrol.hypervisors.common.boundedlog import CUT
from vmcontrol.hypervisors.interface import HostProblem, Hypervisor, HypervisorError, StateUnusable
from vmcontrol.hypervisors.qemu import accelerator
from vmcontrol.hypervisors.qemu import console as qemu_console
from vmcontrol.hypervisors.qemu.accelerator import EMULATION
from vmcontrol.hypervisors.qemu.command import Accelerator
from vmcontrol.hypervisors.qemu.driver import QemuHypervisor
from vmcontrol.hypervisors.qemu.qmp import QmpClient
from vmcontrol.hypervisors.qemu.vm import QemuVm
from vmcontrol.protocol.vm import PortForward, VmState

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]


class QemuWorld(World):
    def open(self) -> Hypervisor:
        return QemuHypervisor(self.reactor, self.vms, accelerator=EMULATION)

    @property
    def vm(self) -> QemuVm:
        assert isinstance(self.hypervisor, QemuHypervisor)
        return self.hypervisor.vms["one"]


@pytest_twisted.async_yield_fixture
async def world(tmp_path: Path) -> AsyncIterator[QemuWorld]:
    folder = tmp_path / "slot 1, é"  # a comma is special in QEMU's options
    folder.mkdir()
    world = QemuWorld(the_reactor(), folder)
    yield world
    await world.close()


class TestQemu(HypervisorContract):
    """The contract."""


class TestOwnProcess:
    @pytest_twisted.ensureDeferred
    async def test_term_does_not_end_it(self, world: QemuWorld) -> None:
        hypervisor = await world.running()
        pid = (await hypervisor.info("one")).pid
        assert pid is not None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
        await world.counting(more=4)
        assert os.getsid(pid) == pid, "a terminal's Ctrl-C does not reach it"

    @pytest_twisted.ensureDeferred
    async def test_it_dies_with_the_process_that_started_it(self, world: QemuWorld) -> None:
        script = """
            import sys
            from pathlib import Path
            from vmcontrol.common.eventloop import start, the_reactor
            from vmcontrol.hypervisors.interface import VmSpec
            from vmcontrol.hypervisors.qemu.driver import QemuHypervisor
            from vmcontrol.hypervisors.qemu.accelerator import EMULATION

            async def main():
                vms, image = Path(sys.argv[1]), Path(sys.argv[2])
                hypervisor = QemuHypervisor(the_reactor(), vms, accelerator=EMULATION)
                spec = VmSpec("one", image, vms / "one", memory_mb=32, console_log=vms.parent / "one.log")
                await hypervisor.create(spec)
                await hypervisor.start("one")
                print((await hypervisor.info("one")).pid, flush=True)

            start(main()).addErrback(lambda failure: (failure.printTraceback(sys.stderr), the_reactor().stop()))
            the_reactor().run()
        """
        command = [sys.executable, "-c", textwrap.dedent(script), str(world.vms), str(world.image)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as host:
            assert host.stdout is not None
            qemu = psutil.Process(int(host.stdout.readline()))
            await world.counting()
            host.kill()
        gone, alive = psutil.wait_procs([qemu], timeout=2)
        assert gone
        assert not alive
        assert await world.hypervisor.list_vms() == ["one"]
        assert await world.hypervisor.state("one") is VmState.ABORTED

    @pytest_twisted.ensureDeferred
    async def test_a_stale_one_is_ended_and_another_process_with_its_pid_is_not(self, world: QemuWorld) -> None:
        hypervisor = await world.running()
        await hypervisor.power_off("one")
        for same in (False, True):
            with subprocess.Popen(["sleep", "60"]) as other:
                started = psutil.Process(other.pid).create_time() - (0 if same else 5)
                world.vm.files.running.write_text(json.dumps({"pid": other.pid, "started": started}))
                assert await world.open().state("one") is VmState.ABORTED
                assert (other.poll() is not None) is same
                other.kill()

    @pytest_twisted.ensureDeferred
    async def test_the_secret_is_in_no_argument_list(self, world: QemuWorld) -> None:
        secret = world.folder / "vmwrapper_secret"
        secret.write_text("5ec2e7")
        hypervisor = await world.running(secret_file=secret)
        pid = (await hypervisor.info("one")).pid
        words = psutil.Process(pid).cmdline()
        assert not any("5ec2e7" in word for word in words)
        assert "5ec2e7" not in " ".join(psutil.Process(pid).environ().values())

    @pytest_twisted.ensureDeferred
    async def test_a_disk_with_the_guests_memory_in_it_is_for_its_owner_alone(self, world: QemuWorld) -> None:
        hypervisor = await world.running()
        await hypervisor.save_snapshot("one", "s")
        overlay = world.vm.files.overlay
        assert overlay.stat().st_mode & 0o777 == 0o600
        await hypervisor.delete_snapshot("one", "s")
        first = overlay.stat().st_ino
        psutil.Process((await hypervisor.info("one")).pid).kill()
        await world.told("one", VmState.ABORTED, 10)
        await hypervisor.start("one")
        assert overlay.stat().st_ino != first, "it was made anew"
        assert overlay.stat().st_mode & 0o777 == 0o600

    @pytest_twisted.ensureDeferred
    async def test_nobody_else_can_read_or_write_what_is_made_whatever_the_umask(self, world: QemuWorld) -> None:
        before = os.umask(0)
        try:
            hypervisor = await world.running()
            await hypervisor.save_snapshot("one", "s")
            made = {path: path.stat().st_mode & 0o077 for path in (world.vms, *world.vms.rglob("*"))}
            await hypervisor.save_state("one")
            made |= {path: path.stat().st_mode & 0o077 for path in world.vms.rglob("*")}
        finally:
            os.umask(before)
        assert {path.name: oct(mode) for path, mode in made.items() if mode} == {}
        assert {"saved.state", "disk.qcow2", "vm.json", "running.json"} <= {path.name for path in made}
        assert (world.folder / "one.log").stat().st_mode & 0o137 == 0

    @pytest_twisted.ensureDeferred
    async def test_a_guest_that_shuts_down_is_powered_off_and_not_aborted(self, world: QemuWorld) -> None:
        image = tiny_guest.make_image(world.folder / "off", "raw", tiny_guest.POWER_OFF_SECTOR)
        await world.hypervisor.create(world.spec(image=image))
        await world.hypervisor.start("one")
        await world.told("one", VmState.POWERED_OFF, world.limit_s)
        assert await world.hypervisor.state("one") is VmState.POWERED_OFF
        assert (await world.hypervisor.info("one")).trouble == ""

    @pytest_twisted.ensureDeferred
    async def test_power_off_does_not_wait_for_an_operation(self, world: QemuWorld) -> None:
        hypervisor = await world.running()
        pid = (await hypervisor.info("one")).pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)  # it answers nothing any more
        waiting = start(hypervisor.pause("one"))
        waiting.addErrback(lambda failure: None)  # it fails, one way or another
        before = world.reactor.seconds()
        await hypervisor.delete("one")
        assert world.reactor.seconds() - before < 2
        await waiting


class TestConsole:
    @pytest_twisted.ensureDeferred
    async def test_a_guest_that_prints_without_end_fills_no_disk_and_costs_nothing(
        self, world: QemuWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With smaller bounds and a log that is cut twice a second. Nobody asks for anything meanwhile."""
        monkeypatch.setattr(console_log, "LIMIT", 200_000)
        monkeypatch.setattr(console_log, "KEPT", 50_000)
        monkeypatch.setattr(qemu_console, "RATE", 256 * 1024)
        image = tiny_guest.make_image(world.folder / "flood", "raw", tiny_guest.FLOOD_SECTOR)
        console = world.folder / "one.log"
        await world.hypervisor.create(world.spec(image=image))
        await world.hypervisor.start("one")
        await world.until("a log that was cut", lambda: console.exists() and console.read_bytes().startswith(CUT))
        before, began = os.times(), world.reactor.seconds()
        worst, turn = 0.0, began
        while turn < began + 4:
            await sleep(world.reactor, 0.01)
            worst, turn = max(worst, world.reactor.seconds() - turn), world.reactor.seconds()
            assert console.stat().st_size <= 200_000
        after = os.times()
        assert after.user + after.system - before.user - before.system < 0.25 * 4, "of one processor, ours"
        assert worst < 0.5
        await world.hypervisor.pause("one")
        await world.hypervisor.unpause("one")
        await world.hypervisor.save_state("one")
        last = console.stat().st_mtime_ns
        await world.hypervisor.start("one")
        await world.until("more of it", lambda: console.stat().st_mtime_ns != last)
        await world.hypervisor.power_off("one")
        assert console.read_bytes().endswith(b"xxx")
        assert console.stat().st_mode & 0o137 == 0

    @pytest.mark.parametrize("kind", ["pipe", "link"])
    @pytest_twisted.ensureDeferred
    async def test_what_is_no_file_in_its_place_does_not_keep_a_guest_from_running(
        self, world: QemuWorld, kind: str
    ) -> None:
        console, elsewhere = world.folder / "one.log", world.folder / "somebody's file"
        if kind == "pipe":
            os.mkfifo(console)
        else:
            console.symlink_to(elsewhere)
        await world.hypervisor.create(world.spec())
        await world.hypervisor.start("one")
        await sleep(world.reactor, 0.5)
        assert await world.hypervisor.state("one") is VmState.RUNNING
        await world.hypervisor.save_state("one")
        assert not elsewhere.exists()


class TestUsedOnce:
    """DESIGN: a saved state is RAM only and fits one state of the disk."""

    @pytest_twisted.ensureDeferred
    async def test_after_a_resume_there_is_nothing_to_resume_from(self, world: QemuWorld) -> None:
        hypervisor = await world.running()
        await hypervisor.save_state("one")
        files = world.vm.files
        assert files.saved.exists()
        assert not files.running.exists()
        await hypervisor.start("one")
        assert not files.saved.exists()
        psutil.Process((await hypervisor.info("one")).pid).kill()
        await world.told("one", VmState.ABORTED, 2.0)
        world.hypervisor = world.open()
        assert await world.hypervisor.state("one") is VmState.ABORTED

    @pytest.mark.parametrize(
        ("crash", "state"),
        [
            ("while the state is written", VmState.ABORTED),
            ("after the rename, QEMU still there", VmState.SAVED),
            ("resuming, before the state counts as used", VmState.SAVED),
            ("resuming, after the state counts as used", VmState.ABORTED),
        ],
    )
    @pytest_twisted.ensureDeferred
    async def test_a_crash_between_any_two_steps(self, world: QemuWorld, crash: str, state: VmState) -> None:
        hypervisor = await world.running()
        await hypervisor.save_state("one")
        files = world.vm.files
        files.write_running(2**22 - 3, Birth(time_s=1.0))  # a process that is gone
        if crash == "while the state is written":
            files.saved.rename(files.partial)
        elif crash == "resuming, after the state counts as used":
            files.saved.rename(files.used)
        last = world.lines()[-1]
        world.hypervisor = hypervisor = world.open()
        assert await hypervisor.state("one") is state
        assert not files.partial.exists()
        assert not files.used.exists()
        known = len(world.lines())
        await hypervisor.start("one")
        await world.counting(more=1)
        if state is VmState.SAVED:
            await world.goes_on_after(last)
        else:
            assert world.lines()[known].disk == 0, "without a snapshot it boots from a new overlay"

    @pytest.mark.parametrize(("end", "state"), [("killed", VmState.ABORTED), ("powered off", VmState.POWERED_OFF)])
    @pytest_twisted.ensureDeferred
    async def test_a_crash_while_going_back_leaves_no_state_to_be_resumed_on_a_later_disk(
        self, world: QemuWorld, monkeypatch: pytest.MonkeyPatch, end: str, state: VmState
    ) -> None:
        hypervisor = await world.running()
        await hypervisor.save_snapshot("one", "good")
        await world.counting()
        await hypervisor.save_state("one")

        class Crash(BaseException):
            pass

        def crash() -> None:
            raise Crash

        monkeypatch.setattr(world.vm.files, "discard_saved", crash)
        with pytest.raises(Crash):
            await hypervisor.restore_snapshot("one", "good")
        monkeypatch.undo()
        world.hypervisor = hypervisor = world.open()
        assert await hypervisor.state("one") is VmState.SAVED
        await hypervisor.start("one")
        await world.counting()
        if end == "killed":
            process = psutil.Process((await hypervisor.info("one")).pid)
            process.kill()
            await world.until("the end of QEMU", lambda: has_ended(process.pid))
        else:
            await hypervisor.power_off("one")
        world.hypervisor = world.open()
        assert await world.hypervisor.state("one") is state

    @pytest_twisted.ensureDeferred
    async def test_a_state_that_was_cut_off_is_said_to_be_unusable_and_older_ones_help(self, world: QemuWorld) -> None:
        hypervisor = await world.running()
        await hypervisor.save_snapshot("one", "good")
        await hypervisor.save_state("one")
        saved = world.vm.files.saved
        os.truncate(saved, saved.stat().st_size // 2)
        with pytest.raises(StateUnusable):
            await hypervisor.start("one")
        assert await hypervisor.state("one") is VmState.SAVED
        await hypervisor.restore_snapshot("one", "good")
        await hypervisor.start("one")
        await world.counting()

    @pytest_twisted.ensureDeferred
    async def test_a_full_disk_fails_the_save_and_the_guest_goes_on(self, world: QemuWorld) -> None:
        hypervisor = await world.running()
        world.vm.files.partial.symlink_to("/dev/full")
        with pytest.raises(HostProblem) as caught:
            await hypervisor.save_state("one")
        assert caught.value.key == "disk-full"
        assert await hypervisor.state("one") is VmState.RUNNING
        await world.counting()
        await hypervisor.save_state("one")
        assert await hypervisor.state("one") is VmState.SAVED

    @pytest_twisted.ensureDeferred
    async def test_a_save_that_is_cancelled_leaves_no_state_behind_a_running_guest(
        self, world: QemuWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hypervisor = await world.running()
        files, begun, go_on = world.vm.files, threading.Event(), threading.Event()
        complete = files.complete_saved

        def slowly() -> None:
            begun.set()
            go_on.wait(10)
            complete()

        monkeypatch.setattr(files, "complete_saved", slowly)
        saving = start(hypervisor.save_state("one"))
        await world.until("the syncing", begun.is_set)
        saving.cancel()
        go_on.set()
        with pytest.raises(CancelledError):
            await saving
        assert await hypervisor.state("one") is VmState.RUNNING
        assert not files.saved.exists()
        await world.counting()


class TestNetwork:
    @pytest_twisted.ensureDeferred
    async def test_nobody_connects_to_a_guest_that_stands(self, world: QemuWorld) -> None:
        """It could not drop those who have no business there; enough of them leave QEMU without descriptors."""
        hypervisor = await world.running(port_forwards=[PortForward(80)])
        before = await hypervisor.info("one")
        assert before.agent_address is not None
        await hypervisor.pause("one")
        for port in (before.agent_address[1], before.forwards[80]):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), 5).close()
        with socket.create_server(("127.0.0.1", before.agent_address[1])):  # somebody else is faster
            await hypervisor.unpause("one")
            after = await hypervisor.info("one")
        assert after.agent_address is not None
        assert after.agent_address != before.agent_address
        assert after.forwards == before.forwards
        for port in (after.agent_address[1], after.forwards[80]):
            socket.create_connection(("127.0.0.1", port), 5).close()
        await hypervisor.pause("one")
        await hypervisor.save_state("one")
        assert await hypervisor.state("one") is VmState.SAVED

    @pytest_twisted.ensureDeferred
    async def test_forwards_are_on_the_loopback_at_ports_that_were_free(self, world: QemuWorld) -> None:
        hypervisor = await world.running(port_forwards=[PortForward(80)])
        info = await hypervisor.info("one")
        assert info.agent_address is not None
        assert info.agent_address[0] == "127.0.0.1"
        for port in (info.agent_address[1], info.forwards[80]):
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        listening = {c.laddr for c in psutil.Process(info.pid).net_connections("inet") if c.status == "LISTEN"}
        assert {address.ip for address in listening} == {"127.0.0.1"}
        assert len(listening) == 2

    @pytest_twisted.ensureDeferred
    async def test_a_port_that_is_taken_is_a_fault_that_passes(self, world: QemuWorld) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            taken = other.getsockname()[1]
            await world.hypervisor.create(world.spec(port_forwards=[PortForward(80, taken)]))
            with pytest.raises(HostProblem) as caught:
                await world.hypervisor.start("one")
        assert caught.value.key == "port-taken"
        assert caught.value.delay_s
        assert await world.hypervisor.state("one") is VmState.POWERED_OFF
        await world.hypervisor.start("one")
        assert (await world.hypervisor.info("one")).forwards == {80: taken}

    @pytest_twisted.ensureDeferred
    async def test_a_granted_network_is_pulled_and_stays_so_through_a_resume(
        self, world: QemuWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hypervisor = await world.running(network=True)

        sent: list[tuple[str, object]] = []
        execute = QmpClient.execute

        def listen(client: QmpClient, command: str, **arguments: Any) -> Any:
            sent.append((command, arguments.get("up")))
            return execute(client, command, **arguments)

        monkeypatch.setattr(QmpClient, "execute", listen)  # QEMU shows the state of a link to the guest only
        await hypervisor.set_network("one", False)
        assert sent[-1] == ("set_link", False)
        await hypervisor.save_state("one")
        sent.clear()
        await hypervisor.start("one")
        assert sent.index(("set_link", False)) < sent.index(("cont", None)), "pulled before the guest goes on"
        await hypervisor.set_network("one", True)
        assert sent[-1] == ("set_link", True)
        info = await hypervisor.info("one")
        assert info.agent_address is not None
        await world.counting()


def _no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestAFullDisk:
    """Nothing of ours can be written: a problem with a key, whatever was asked, and later it is as it was before."""

    @pytest.mark.parametrize(
        ("before", "call"),
        [
            ("off", "start"),
            ("saved", "start"),
            ("back at a snapshot", "start"),
            ("running", "save_state"),
            ("running", "save_snapshot"),
            ("off", "save_snapshot"),
            ("running", "delete_snapshot"),
            ("off", "restore_snapshot"),
            ("saved", "restore_snapshot"),
            ("running", "power_off"),
            ("saved", "power_off"),
            ("running", "set_network"),
            ("off", "take"),
        ],
    )
    @pytest_twisted.ensureDeferred
    async def test_every_call_says_so(
        self, world: QemuWorld, monkeypatch: pytest.MonkeyPatch, before: str, call: str
    ) -> None:
        hypervisor = await world.running(network=True)
        await hypervisor.save_snapshot("one", "good")
        if before == "saved":
            await hypervisor.save_state("one")
        elif before != "running":
            await hypervisor.power_off("one")
        if before == "back at a snapshot":
            await hypervisor.restore_snapshot("one", "good")
        more: tuple[Any, ...] = {"save_snapshot": ("new",), "set_network": (False,)}.get(call, ())
        if call in ("delete_snapshot", "restore_snapshot"):
            more = ("good",)
        monkeypatch.setattr(os, "fsync", _no_room)
        with pytest.raises(HostProblem) as caught:
            await getattr(hypervisor, call)("one", *more)
        monkeypatch.undo()
        assert caught.value.key == "disk-full"
        assert caught.value.delay_s
        assert await hypervisor.list_snapshots("one") == ([] if call == "delete_snapshot" else ["good"])
        state = await hypervisor.state("one")
        if call in ("start", "save_state", "save_snapshot"):
            expected = {"off": VmState.POWERED_OFF, "running": VmState.RUNNING}.get(before, VmState.SAVED)
            assert state is expected, "it is what it was"
        if state is not VmState.RUNNING:
            await hypervisor.start("one")
        await world.counting()
        await hypervisor.save_snapshot("one", "new")
        assert "new" in await hypervisor.list_snapshots("one")

    @pytest_twisted.ensureDeferred
    async def test_a_vm_cannot_be_made(self, world: QemuWorld, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "fsync", _no_room)
        with pytest.raises(HostProblem) as caught:
            await world.hypervisor.create(world.spec())
        monkeypatch.undo()
        assert caught.value.key == "disk-full"
        await world.running()


class TestFaults:
    @pytest_twisted.ensureDeferred
    async def test_memory_that_cannot_be_had(self, world: QemuWorld) -> None:
        await world.hypervisor.create(world.spec(memory_mb=1024 * 1024))
        with pytest.raises(HostProblem) as caught:
            await world.hypervisor.start("one")
        assert caught.value.key == "no-memory"
        assert caught.value.delay_s
        assert await world.hypervisor.state("one") is VmState.POWERED_OFF

    @pytest.mark.parametrize("kind", ["qcow2", "vdi"])
    @pytest_twisted.ensureDeferred
    async def test_an_image_that_was_cut_off(self, world: QemuWorld, kind: str) -> None:
        noise, image = world.folder / "noise", world.folder / "image"
        noise.write_bytes(os.urandom(4 * 1024 * 1024))
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", kind, noise, image], check=True, timeout=60)
        os.truncate(image, 1_500_000)
        with pytest.raises(HostProblem, match=r"damaged|cut off") as caught:
            await world.hypervisor.create(world.spec(image=image))
        assert caught.value.key == "image-damaged"

    @pytest_twisted.ensureDeferred
    async def test_no_qemu(self, world: QemuWorld) -> None:
        hypervisor = QemuHypervisor(world.reactor, world.vms, qemu="no-such-qemu", accelerator=EMULATION)
        probe = await hypervisor.probe()
        assert not probe.usable
        assert "apt install" in probe.detail

    @pytest_twisted.ensureDeferred
    async def test_network_modes_that_are_none(self, world: QemuWorld) -> None:
        with pytest.raises(HypervisorError, match="no network mode"):
            await world.hypervisor.create(world.spec(network_mode="bridged"))

    @pytest_twisted.ensureDeferred
    async def test_what_cannot_be_read_is_no_vm_hides_no_other_and_can_be_deleted(self, world: QemuWorld) -> None:
        await world.hypervisor.create(world.spec())
        await world.hypervisor.create(world.spec("two"))
        definition = world.vm.files.definition_file
        definition.write_text(definition.read_text().replace('"memory_mb": 32', '"memory_mb": "lots"'))
        world.hypervisor = hypervisor = world.open()
        assert await hypervisor.list_vms() == ["two"]
        with pytest.raises(HypervisorError, match="memory_mb"):
            await hypervisor.create(world.spec())
        await hypervisor.delete("one")
        await world.running()

    @pytest_twisted.ensureDeferred
    async def test_vms_may_be_listed_while_one_is_deleted(self, world: QemuWorld) -> None:
        for _ in range(10):
            await world.hypervisor.create(world.spec())
            deleting = start(world.hypervisor.delete("one"))
            listing = [start(world.hypervisor.list_vms())]
            while not deleting.called:
                await sleep(world.reactor, 0)
                listing.append(start(world.hypervisor.list_vms()))
            await deleting
            for one in listing:
                assert await one in ([], ["one"])
        assert await world.hypervisor.list_vms() == []

    @pytest_twisted.ensureDeferred
    async def test_a_deletion_that_fails_in_the_middle_leaves_no_vm(
        self, world: QemuWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await world.hypervisor.create(world.spec())
        files = world.vm.files

        def half() -> None:
            files.folder.rename(files.folder.with_name(".deleting-one"))
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(files, "remove", half)
        with pytest.raises(HypervisorError):
            await world.hypervisor.delete("one")
        assert await world.hypervisor.list_vms() == []
        await world.hypervisor.create(world.spec())

    @pytest_twisted.ensureDeferred
    async def test_a_create_that_was_cut_off_is_no_vm(self, world: QemuWorld) -> None:
        (world.vms / "one").mkdir(parents=True)
        (world.vms / "one" / "disk.qcow2").write_bytes(b"half")
        assert await world.hypervisor.list_vms() == []
        await world.running()


class TestAccelerator:
    @pytest_twisted.ensureDeferred
    async def test_emulation_says_its_word(self) -> None:
        assert (await accelerator.attempt(the_reactor(), "qemu-system-x86_64", EMULATION, 15.0)).works

    @pytest_twisted.ensureDeferred
    async def test_it_is_tried_once_however_many_ask(self, world: QemuWorld, monkeypatch: pytest.MonkeyPatch) -> None:
        attempt, tried = accelerator.attempt, []

        async def counted(*arguments: Any, **more: Any) -> Any:
            tried.append(arguments)
            return await attempt(*arguments, **more)

        monkeypatch.setattr(accelerator, "attempt", counted)
        asked = [start(world.hypervisor.probe()) for _ in range(3)]
        probes = [await one for one in asked] + [await world.hypervisor.probe()]
        assert all(probe == probes[0] and probe.usable for probe in probes)
        assert len(tried) == 1

    @pytest_twisted.ensureDeferred
    async def test_one_that_refuses_and_one_that_hangs_are_found_out(self, tmp_path: Path) -> None:
        trial = await accelerator.attempt(the_reactor(), "qemu-system-x86_64", Accelerator("nonsense", "max"))
        assert not trial.works
        assert "nonsense" in trial.detail
        silent = tmp_path / "silent"
        silent.write_text("#!/bin/sh\nexec sleep 60\n")
        silent.chmod(0o755)
        before = the_reactor().seconds()
        trial = await accelerator.attempt(the_reactor(), str(silent), EMULATION, 0.3)
        assert not trial.works
        assert "does not run" in trial.detail
        assert the_reactor().seconds() - before < 2

    @pytest_twisted.ensureDeferred
    async def test_the_outcome_is_kept_and_a_failure_not_for_ever(self, tmp_path: Path) -> None:
        if not os.access("/dev/kvm", os.R_OK | os.W_OK):
            pytest.skip("no /dev/kvm to try here")
        cache, reactor = tmp_path / "accelerator.json", the_reactor()
        first, _ = await accelerator.choose(reactor, "qemu-system-x86_64", cache)
        second, how = await accelerator.choose(reactor, "qemu-system-x86_64", cache)
        assert first == second
        assert "as tried before" in how
        kept = json.loads(cache.read_text())
        cache.write_text(json.dumps(kept | {"works": False, "time": kept["time"] - 7200}))
        _, how = await accelerator.choose(reactor, "qemu-system-x86_64", cache)
        assert "as tried before" not in how


class TestAVmThatWasThereBefore:
    """Somebody made it in the driver's folder; a job uses it."""

    @pytest_twisted.ensureDeferred
    async def test_one_that_was_saved_is_left_saved_without_our_snapshots(self, world: QemuWorld) -> None:
        hypervisor = await world.running()
        await hypervisor.save_state("one")
        await hypervisor.take("one")
        await hypervisor.start("one")
        await world.counting(more=2)
        await hypervisor.save_snapshot("one", "vmwrapper_1")
        await hypervisor.save_snapshot("one", "somebody's own")
        await hypervisor.power_off("one")
        await hypervisor.start("one")
        await hypervisor.take("one")  # by the next HostMain of the slot: the first note counts
        await hypervisor.release("one")
        assert await hypervisor.state("one") is VmState.SAVED
        assert await hypervisor.list_snapshots("one") == ["somebody's own"]
        await hypervisor.start("one")
        await hypervisor.release("one")
        assert await hypervisor.state("one") is VmState.RUNNING, "what was not taken is not touched"

    @pytest_twisted.ensureDeferred
    async def test_one_that_was_off_is_left_off_and_keeps_its_disk_also_after_a_crash(self, world: QemuWorld) -> None:
        hypervisor = await world.running()
        await world.counting(more=4)
        await hypervisor.power_off("one")
        disk = world.lines()[-1].disk
        await hypervisor.take("one")
        await hypervisor.start("one")
        pid = (await hypervisor.info("one")).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await world.told("one", VmState.ABORTED, 10)
        await hypervisor.start("one")
        await world.counting(more=2)
        booted = [line for line in world.lines() if line.memory == 0]
        assert booted[-1].disk >= disk > 0, "one that we made would have a new disk now"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(QemuVm, "release_grace_s", 0.2)  # this guest knows no power button
            await hypervisor.release("one")
        assert await hypervisor.state("one") is VmState.POWERED_OFF


class TestSmallDisk:
    """A file system that really is full, which has other words for it than /dev/full."""

    @pytest_twisted.async_yield_fixture
    async def small(self, tmp_path: Path) -> AsyncIterator[QemuWorld]:
        folder = tmp_path / "small"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "small", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here (root only): {done.stderr.decode().strip()}")
        world = QemuWorld(the_reactor(), folder)
        yield world
        await world.close()
        subprocess.run(["umount", "-l", str(folder)], check=True)

    @pytest_twisted.ensureDeferred
    async def test_a_snapshot_and_a_save_that_do_not_fit_are_a_full_disk_and_cost_nothing(
        self, small: QemuWorld
    ) -> None:
        hypervisor = await small.running()
        await hypervisor.save_snapshot("one", "good")
        await hypervisor.pause("one")  # the guest writes, too, and would be held up first
        filler = small.vms / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(65536))
        with pytest.raises(HostProblem) as caught:
            await hypervisor.save_snapshot("one", "new")
        assert caught.value.key == "disk-full"
        with pytest.raises(HostProblem) as caught:
            await hypervisor.save_state("one")
        assert caught.value.key == "disk-full"
        assert await hypervisor.list_snapshots("one") == ["good"]
        await hypervisor.unpause("one")
        await small.until("the guest's write", lambda: small.vm._lifecycle.held)
        assert await hypervisor.state("one") is VmState.STUCK
        info = await hypervisor.info("one")
        assert info.resumable
        assert "free some space" in info.trouble
        await hypervisor.pause("one")
        with pytest.raises(HostProblem, match="disk of this computer is full"):
            await hypervisor.save_state("one")
        assert await hypervisor.state("one") is VmState.STUCK
        for room in range(0, 8 << 20, 1 << 18):  # a state that fails at any place leaves what can be saved later
            os.truncate(filler, max(0, filler.stat().st_size - (1 << 18)) if room else filler.stat().st_size)
            try:
                await hypervisor.save_state("one")
                break
            except HostProblem as problem:
                assert problem.key == "disk-full"  # noqa: PT017 (it may work, too)
            assert await hypervisor.state("one") in (VmState.STUCK, VmState.PAUSED), room
        assert room, "the first one does not fit"
        filler.unlink()
        await hypervisor.start("one")
        await small.counting()
        await hypervisor.save_snapshot("one", "new")
        await hypervisor.save_state("one")
        assert await hypervisor.state("one") is VmState.SAVED
