"""The VirtualBox driver against real VirtualBox: the contract of all drivers, and what is VirtualBox's own."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_twisted

from tests.support import tiny_guest
from tests.support.hypervisor_contract import HypervisorContract, digest
from tests.support.virtualbox_world import VirtualBoxWorld, a_world
from vmcontrol.common.eventloop import sleep
from vmcontrol.hypervisors.interface import HostProblem, StateUnusable, WrongState
from vmcontrol.hypervisors.virtualbox import create, monitor
from vmcontrol.hypervisors.virtualbox.driver import VirtualBoxHypervisor
from vmcontrol.hypervisors.virtualbox.output import mac, pairs
from vmcontrol.protocol.vm import PortForward, VmState

pytestmark = pytest.mark.virtualbox


@pytest_twisted.async_yield_fixture
async def world(tmp_path: Path) -> AsyncIterator[VirtualBoxWorld]:
    async for world in a_world(tmp_path):
        yield world


class TestVirtualBox(HypervisorContract):
    """The contract."""


class TestProcess:
    @pytest_twisted.ensureDeferred
    async def test_the_pid_is_that_of_the_process_that_runs_the_guest(self, world: VirtualBoxWorld) -> None:
        hypervisor = await world.running()
        pid = (await hypervisor.info("one")).pid
        assert pid is not None
        process = psutil.Process(pid)
        assert process.name().startswith("VBoxHeadless")
        assert world.vm.uuid in process.cmdline()
        assert os.getpgid(pid) != os.getpgid(0), "a terminal's Ctrl-C does not reach it"
        assert hypervisor.capabilities.vm_is_descendant is False
        # That it is no descendant of ours shows only where no orphans are adopted; other tests make this process do so.
        parent = process.parent()
        assert parent is not None
        assert parent.name() == "VBoxSVC"
        assert os.getsid(parent.pid) != os.getsid(0)

    @pytest_twisted.ensureDeferred
    async def test_it_outlives_us_and_the_next_one_takes_it_over(self, world: VirtualBoxWorld) -> None:
        hypervisor = await world.running()
        before = await hypervisor.info("one")
        await hypervisor.close()
        world.hypervisor = hypervisor = world.open()
        hypervisor.on_state_change(world._changed)
        after = await hypervisor.info("one")
        assert after == before
        await world.counting(more=2)
        counted = [line.memory for line in world.lines() if line.memory]
        assert counted == list(range(1, len(counted) + 1)), "nothing that the console said meanwhile is lost"
        psutil.Process(after.pid).kill()
        await world.told("one", VmState.ABORTED, 2.0)

    @pytest_twisted.ensureDeferred
    async def test_what_others_do_to_it_is_told_at_once_and_without_asking_all_the_time(
        self, world: VirtualBoxWorld
    ) -> None:
        hypervisor = await world.running()
        calls = world.driver.vbox.calls
        for _ in range(20):
            assert await hypervisor.state("one") is VmState.RUNNING
            await sleep(world.reactor, 0.05)
        assert world.driver.vbox.calls <= calls + 1
        for word, state in (("pause", VmState.PAUSED), ("resume", VmState.RUNNING)):
            await world.by_another_program("controlvm", "one", word)
            await world.told("one", state, 2.0)
            assert await hypervisor.state("one") is state
        await world.by_another_program("controlvm", "one", "savestate")
        await world.told("one", VmState.SAVED, 2.0)

    @pytest_twisted.ensureDeferred
    async def test_its_log_is_bounded_while_it_runs_and_tells_what_happens_all_the_same(
        self, world: VirtualBoxWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hypervisor = await world.running()
        monkeypatch.setattr(monitor, "LOG_LIMIT", 72 * 1024)
        await world.by_another_program("controlvm", "one", "pause")
        await world.told("one", VmState.PAUSED, 2.0)
        assert world.vm.files is not None
        log = world.vm.files.log
        assert log.stat().st_blocks * 512 <= 80 * 1024
        await world.by_another_program("controlvm", "one", "resume")
        await world.told("one", VmState.RUNNING, 2.0)
        await hypervisor.close()
        world.hypervisor = hypervisor = world.open()
        hypervisor.on_state_change(world._changed)
        pid = (await hypervisor.info("one")).pid
        assert pid is not None, "the process is still told in it"
        psutil.Process(pid).kill()
        await world.told("one", VmState.ABORTED, 2.0)

    @pytest_twisted.ensureDeferred
    async def test_a_state_that_was_cut_off_is_said_to_be_unusable_and_older_ones_help(
        self, world: VirtualBoxWorld
    ) -> None:
        hypervisor = await world.running()
        await hypervisor.save_snapshot("one", "good")
        await hypervisor.save_state("one")
        files = world.vm.files
        assert files is not None
        saved = max(files.snapshots.glob("*.sav"))
        os.truncate(saved, saved.stat().st_size // 2)
        with pytest.raises(StateUnusable):
            await hypervisor.start("one")
        assert await hypervisor.state("one") is VmState.SAVED
        await hypervisor.restore_snapshot("one", "good")
        await hypervisor.start("one")
        await world.counting()


def _no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestAFullDisk:
    """Nothing of ours can be written: VirtualBox's own words for that are known (problems)."""

    @pytest.mark.parametrize(
        ("before", "call"),
        [("off", "start"), ("running", "save_state"), ("running", "save_snapshot"), ("running", "power_off")],
    )
    @pytest_twisted.ensureDeferred
    async def test_every_call_says_so(
        self, world: VirtualBoxWorld, monkeypatch: pytest.MonkeyPatch, before: str, call: str
    ) -> None:
        hypervisor = await world.running()
        if before == "off":
            await hypervisor.power_off("one")
        monkeypatch.setattr(os, "fsync", _no_room)
        with pytest.raises(HostProblem) as caught:
            await getattr(hypervisor, call)("one", *(("new",) if call == "save_snapshot" else ()))
        monkeypatch.undo()
        assert caught.value.key == "disk-full"
        assert caught.value.delay_s
        assert await hypervisor.list_snapshots("one") == []
        if await hypervisor.state("one") is not VmState.RUNNING:
            await hypervisor.start("one")
        await world.counting()


class TestHardware:
    @pytest_twisted.ensureDeferred
    async def test_it_is_made_and_started_with_few_calls(self, world: VirtualBoxWorld) -> None:
        await world.hypervisor.create(world.spec())
        await world.hypervisor.start("one")
        assert world.driver.vbox.calls <= 12

    @pytest_twisted.ensureDeferred
    async def test_what_is_set(self, world: VirtualBoxWorld) -> None:
        secret = world.folder / "vmwrapper_secret"
        secret.write_text("5ec2e7" * 8)
        spec = world.spec(memory_mb=48, cpus=2, network=True, secret_file=secret, port_forwards=[PortForward(80)])
        await world.hypervisor.create(spec)
        said = pairs(world.manage("showvminfo", "one", "--machinereadable").stdout)
        assert (said["memory"], said["cpus"]) == ("48", "2")
        assert (said["nic1"], said["nic2"], said["nic3"]) == ("nat", "nat", "none")
        assert said["localhostReachable"] == "0"
        assert (said["audio"], said["usb"], said["vrde"], said["clipboard"]) == ("none", "off", "off", "disabled")
        rules = sorted(value.split(",")[:3] + value.split(",")[5:] for key, value in said.items() if "Forw" in key)
        assert rules == [["agent", "tcp", "127.0.0.1", "4616"], ["port1", "tcp", "127.0.0.1", "80"]]
        told = world.manage("getextradata", "one", "enumerate").stdout
        assert world.vm.definition is not None
        assert f"token={world.vm.definition.token}" in told
        assert "5ec2e7" not in told

    @pytest_twisted.ensureDeferred
    async def test_a_granted_network_is_pulled_and_stays_so_through_a_resume(self, world: VirtualBoxWorld) -> None:
        hypervisor = await world.running(network=True)

        def cables() -> tuple[str, str]:
            said = pairs(world.manage("showvminfo", "one", "--machinereadable").stdout)
            return said["cableconnected1"], said["cableconnected2"]

        assert cables() == ("on", "on")
        await hypervisor.set_network("one", False)
        assert cables() == ("on", "off")
        await hypervisor.save_state("one")
        await hypervisor.start("one")
        assert cables() == ("on", "off")
        await hypervisor.power_off("one")
        await hypervisor.set_network("one", True)
        await hypervisor.start("one")
        assert cables() == ("on", "on")

    @pytest_twisted.ensureDeferred
    async def test_in_the_layout_of_2009_the_way_to_the_agent_is_never_pulled(
        self, world: VirtualBoxWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The lab has no host-only network, so its card is connected to nothing before the start."""

        async def adapter(_: object) -> str:
            return "vboxnet0"

        monkeypatch.setattr(create, "host_only_adapter", adapter)
        hypervisor = world.hypervisor
        await hypervisor.create(world.spec(network=True, network_mode="hostonly"))
        said = pairs(world.manage("showvminfo", "one", "--machinereadable").stdout)
        assert [said[f"nic{number}"] for number in (1, 2, 3, 4)] == ["nat", "hostonly", "nat", "none"]
        assert mac(said["macaddress2"]) == (await hypervisor.info("one")).mac
        await world.by_another_program("modifyvm", "one", "--nic2", "null")

        def cables() -> str:
            said = pairs(world.manage("showvminfo", "one", "--machinereadable").stdout)
            return " ".join(said[f"cableconnected{number}"] for number in (1, 2, 3))

        await hypervisor.start("one")
        for connected in (False, True, False):
            await hypervisor.set_network("one", connected)
            assert cables() == ("on on on" if connected else "off on on")
        first = (await hypervisor.info("one")).agent_address
        assert first is not None
        await hypervisor.save_state("one")
        with socket.create_server(first):
            await hypervisor.start("one")
        second = (await hypervisor.info("one")).agent_address
        assert second not in (None, first)
        socket.create_connection(second, timeout=5).close()
        assert cables() == "off on on"
        said = pairs(world.manage("showvminfo", "one", "--machinereadable").stdout)
        assert [value for key, value in said.items() if "Forward" in key] == [f"agent,tcp,127.0.0.1,{second[1]},,4616"]

    @pytest_twisted.ensureDeferred
    async def test_ports_that_somebody_took_meanwhile_are_replaced(self, world: VirtualBoxWorld) -> None:
        hypervisor = await world.running(port_forwards=[PortForward(80)])
        first = await hypervisor.info("one")
        assert first.agent_address is not None
        for address in (first.agent_address, ("127.0.0.1", first.forwards[80])):
            socket.create_connection(address, timeout=5).close()
        await hypervisor.save_state("one")
        with socket.create_server(first.agent_address):
            await hypervisor.start("one")
            second = await hypervisor.info("one")
        assert second.agent_address is not None
        assert second.agent_address != first.agent_address
        assert second.forwards == first.forwards
        socket.create_connection(second.agent_address, timeout=5).close()
        listening = {c.laddr for c in psutil.Process(second.pid).net_connections("inet") if c.status == "LISTEN"}
        assert {address.ip for address in listening} == {"127.0.0.1"}
        assert len(listening) == 2

    @pytest_twisted.ensureDeferred
    async def test_a_certain_port_that_is_taken_is_a_fault_that_passes(self, world: VirtualBoxWorld) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            taken = other.getsockname()[1]
            await world.hypervisor.create(world.spec(port_forwards=[PortForward(80, taken)]))
            with pytest.raises(HostProblem) as caught:
                await world.hypervisor.start("one")
        assert caught.value.key == "port-taken"
        assert caught.value.delay_s
        await world.hypervisor.start("one")
        assert (await world.hypervisor.info("one")).forwards == {80: taken}

    @pytest_twisted.ensureDeferred
    async def test_the_processor_can_be_capped(self, world: VirtualBoxWorld) -> None:
        hypervisor = await world.running()
        assert await world.driver.max_cpus() == 64
        for percent in (40, 100):
            await hypervisor.set_cpu_cap("one", percent)
            assert f"cpuexecutioncap={percent}" in world.manage("showvminfo", "one", "--machinereadable").stdout
        await hypervisor.power_off("one")
        await hypervisor.set_cpu_cap("one", 50)
        assert "cpuexecutioncap=50" in world.manage("showvminfo", "one", "--machinereadable").stdout

    @pytest_twisted.ensureDeferred
    async def test_host_only_needs_an_adapter(self, world: VirtualBoxWorld) -> None:
        """The lab can have none, as its kernel has no such driver; what is set with one: test_vbox_dialect."""
        with pytest.raises(HostProblem) as caught:
            await world.hypervisor.create(world.spec(network_mode="hostonly"))
        assert caught.value.key == "host-only-missing"
        assert "hostonlyif create" in caught.value.reason
        world.nothing_left()


class TestImage:
    @pytest_twisted.ensureDeferred
    async def test_two_copies_of_an_image_are_used_at_once_also_when_virtualbox_knows_it(
        self, world: VirtualBoxWorld
    ) -> None:
        """Registered by their own UUIDs they would shut each other out."""
        machines = str(world.folder.parent / "machines")
        world.manage("createvm", "--name", "other", "--ostype", "Linux26_64", "--basefolder", machines, "--register")
        world.manage("storagectl", "other", "--name", "c", "--add", "sata")
        attach = ("storageattach", "other", "--storagectl", "c", "--port", "0", "--device", "0", "--type", "hdd")
        world.manage(*attach, "--medium", str(world.image))
        copy = world.folder / "copy.vdi"
        shutil.copyfile(world.image, copy)
        await world.running("one")
        await world.running("two", image=copy)
        await world.hypervisor.delete("one")
        await world.counting("two")
        await world.hypervisor.delete("two")
        assert str(world.image) in world.manage("list", "hdds").stdout
        world.manage("unregistervm", "other")
        world.manage("closemedium", "disk", str(world.image), check=False)
        world.nothing_left()

    @pytest_twisted.ensureDeferred
    async def test_further_disks_of_two_vms_and_of_their_owner_do_not_meet(self, world: VirtualBoxWorld) -> None:
        """The disk's own UUID is in the owner's list of media all the while; snapshots make no file for it."""
        disk, _ = world.further_disks()
        disk.chmod(0o644)
        world.manage("createvm", "--name", "other", "--register", "--basefolder", str(world.folder / "other"))
        world.manage("storagectl", "other", "--name", "c", "--add", "sata")
        attach = ("storageattach", "other", "--storagectl", "c", "--port", "0", "--device", "0", "--type", "hdd")
        world.manage(*attach, "--medium", str(disk))
        before = digest(disk)
        for name in ("one", "two"):
            await world.running(name, disks=(str(disk), str(disk)))
        await world.hypervisor.save_snapshot("one", "good")
        assert len(list((world.vms / "one" / "Snapshots").glob("*.vdi"))) == 1
        await world.hypervisor.delete("one")
        await world.counting("two")
        await world.hypervisor.save_state("two")
        await world.hypervisor.start("two")
        await world.counting("two")
        await world.hypervisor.delete("two")
        hdds = [line for line in world.manage("list", "hdds").stdout.splitlines() if line.startswith("Location:")]
        assert [line.partition(":")[2].strip() for line in hdds] == [str(disk)]
        assert digest(disk) == before
        world.manage("unregistervm", "other")
        world.manage("closemedium", "disk", str(disk), check=False)
        world.nothing_left()

    @pytest_twisted.ensureDeferred
    async def test_an_image_in_many_pieces(self, world: VirtualBoxWorld) -> None:
        """Blocks of a dynamic VDI in any order, with holes: the guest reads its own sectors from them."""
        raw = world.folder / "raw"
        boot = tiny_guest.make_image(raw, "raw").read_bytes()
        image = scattered_vdi(world.folder / "scattered.vdi", boot, blocks=200)
        before = digest(image)
        await world.running(image=image)
        await world.counting(more=4)
        assert digest(image) == before
        assert world.vm.files is not None
        (base,) = world.vm.files.folder.glob("base-*.vmdk")
        assert base.read_text().count("FLAT") > 90

    @pytest.mark.parametrize("case", ["gone", "changed"])
    @pytest_twisted.ensureDeferred
    async def test_an_image_that_is_not_what_it_was(self, world: VirtualBoxWorld, case: str) -> None:
        await world.hypervisor.create(world.spec())
        if case == "gone":
            world.image.unlink()
        else:
            with world.image.open("ab") as file:
                file.write(bytes(512))
        with pytest.raises(HostProblem) as caught:
            await world.hypervisor.start("one")
        assert caught.value.key == ("image-missing" if case == "gone" else "image-damaged")
        assert caught.value.delay_s is None
        assert await world.hypervisor.state("one") is VmState.POWERED_OFF


class TestExisting:
    """VMs that were there before: used by name or id, left as they were found, never deleted or changed."""

    @staticmethod
    def make(world: VirtualBoxWorld, name: str = "My CernVM") -> str:
        folder = world.folder.parent / "machines"
        world.manage("createvm", "--name", name, "--ostype", "Linux26_64", "--basefolder", str(folder), "--register")
        world.manage("modifyvm", name, "--memory", "32", "--uart1", "0x3f8", "4")
        world.manage("modifyvm", name, "--uartmode1", "file", str(world.folder / "existing.log"))
        world.manage("storagectl", name, "--name", "c", "--add", "sata")
        attach = ("storageattach", name, "--storagectl", "c", "--port", "0", "--device", "0", "--type", "hdd")
        disk = tiny_guest.make_image(world.folder.parent / "existing.vdi", "vdi")
        world.manage(*attach, "--medium", str(disk))
        return name

    @staticmethod
    def settings(world: VirtualBoxWorld, name: str) -> dict[str, str]:
        said = pairs(world.manage("showvminfo", name, "--machinereadable").stdout)
        return {key: value for key, value in said.items() if not key.startswith("VMState")}

    @staticmethod
    def clean(world: VirtualBoxWorld, name: str) -> None:
        world.manage("discardstate", name, check=False)
        world.manage("unregistervm", name, "--delete")

    @pytest.mark.parametrize("found", [VmState.POWERED_OFF, VmState.SAVED, VmState.RUNNING])
    @pytest_twisted.ensureDeferred
    async def test_it_is_left_as_it_was_found(self, world: VirtualBoxWorld, found: VmState) -> None:
        name, hypervisor = self.make(world), world.hypervisor
        if found is not VmState.POWERED_OFF:
            await world.by_another_program("startvm", name, "--type", "headless")
            await world.by_another_program("snapshot", name, "take", "mine")
        if found is VmState.SAVED:
            await world.by_another_program("controlvm", name, "savestate")
        before = self.settings(world, name)
        assert await hypervisor.list_vms() == [name]
        await hypervisor.take(name)
        if found is not VmState.RUNNING:
            await hypervisor.start(name)
        info = await hypervisor.info(name)
        assert info.state is VmState.RUNNING
        assert info.pid is not None
        assert info.mac == mac(before["macaddress1"])
        assert info.agent_address is None
        await hypervisor.save_snapshot(name, "vmwrapper_1")
        await hypervisor.release(name)
        left = VmState.POWERED_OFF if found is VmState.POWERED_OFF else VmState.SAVED
        assert await hypervisor.state(name) is left
        after = self.settings(world, name)
        of_a_live_one = ("disk-", "c-", "Snapshot", "Current", "VRDE", "vrde", "Guest", "Video", "Session")
        for key in before.keys() & after.keys():
            assert after[key] == before[key] or key.startswith(of_a_live_one), key
        names = [value for key, value in after.items() if key.startswith("SnapshotName")]
        assert names == ([] if found is VmState.POWERED_OFF else ["mine"])
        with pytest.raises(WrongState):
            await hypervisor.delete(name)
        self.clean(world, name)

    @pytest_twisted.ensureDeferred
    async def test_one_task_of_a_computer_at_a_time(self, world: VirtualBoxWorld) -> None:
        name = self.make(world)
        slot = world.folder.parent / "slot 2"
        slot.mkdir()
        other = VirtualBoxHypervisor(world.reactor, slot / "vm", program=str(world.lab.vboxmanage))
        await world.hypervisor.take(name)
        for _ in range(2):  # while it runs, and while that task is stopped: its state is in the VM
            with pytest.raises(HostProblem) as caught:
                await other.take(name)
            assert caught.value.key == "vm-in-use"
            await world.hypervisor.close()
        shutil.rmtree(world.vms)  # the client has removed the slot
        await other.take(name)
        await other.release(name)
        world.hypervisor = world.open()
        await world.hypervisor.take(name)
        await world.hypervisor.release(name)
        await other.close()
        self.clean(world, name)

    @pytest_twisted.ensureDeferred
    async def test_by_its_id(self, world: VirtualBoxWorld) -> None:
        name = self.make(world)
        uuid = self.settings(world, name)["UUID"]
        assert (await world.hypervisor.info(uuid)).name == name
        self.clean(world, name)


def scattered_vdi(path: Path, boot: bytes, *, blocks: int) -> Path:
    """A dynamic VDI of MiB blocks, the first with `boot`, each second one never written, the others in disorder."""
    mib = 1024 * 1024
    written = range(0, blocks, 2)
    place = {block: (n * 37 + 11) % len(written) for n, block in enumerate(written)}
    header = bytearray(mib)
    struct.pack_into("<IIII", header, 0x40, 0xBEDA107F, 0x10001, 0x190, 1)
    struct.pack_into("<II", header, 0x154, 0x200, mib)
    struct.pack_into("<QIIII", header, 0x170, blocks * mib, mib, 0, blocks, len(written))
    struct.pack_into(f"<{blocks}I", header, 0x200, *(place.get(block, 0xFFFFFFFF) for block in range(blocks)))
    with path.open("wb") as file:
        file.write(header)
        file.truncate(mib * (1 + len(written)))
        file.seek(mib * (1 + place[0]))
        file.write(boot[:mib])
    return path
