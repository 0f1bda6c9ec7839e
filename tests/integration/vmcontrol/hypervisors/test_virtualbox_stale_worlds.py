"""What crashes, power losses and other people leave behind for the VirtualBox driver, made in the real VirtualBox.

Each test makes one such world and shows that the driver gets on, and that no work is lost that could be kept.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_twisted

from tests.support.limits import after
from tests.support.virtualbox_world import VirtualBoxWorld, a_world
from vmcontrol.common.eventloop import sleep, start
from vmcontrol.hypervisors.interface import HostProblem, HypervisorError, VmNotFound
from vmcontrol.hypervisors.virtualbox import monitor, vboxmanage
from vmcontrol.hypervisors.virtualbox.files import VmFiles
from vmcontrol.protocol.vm import VmState

pytestmark = pytest.mark.virtualbox

SERVICE = "VBoxSVC"


@pytest_twisted.async_yield_fixture
async def world(tmp_path: Path) -> AsyncIterator[VirtualBoxWorld]:
    async for world in a_world(tmp_path):
        yield world


def service(world: VirtualBoxWorld) -> psutil.Process | None:
    """VirtualBox's service of this world."""
    mark = world.environment["VBOX_IPC_SOCKETID"]
    for process in psutil.process_iter():
        try:
            if process.name() == SERVICE and process.environ().get("VBOX_IPC_SOCKETID") == mark:
                return process
        except psutil.Error:
            continue
    return None


async def end_service(world: VirtualBoxWorld, number: int = signal.SIGKILL) -> None:
    found = service(world)
    assert found is not None
    found.send_signal(number)
    if number == signal.SIGKILL:
        while found.is_running() and found.status() != psutil.STATUS_ZOMBIE:
            await sleep(world.reactor, 0.01)


async def anew(world: VirtualBoxWorld) -> None:
    """The driver of the next HostMain."""
    await world.hypervisor.close()
    world.hypervisor = world.open()
    world.states.clear()
    world.hypervisor.on_state_change(world._changed)


def files(world: VirtualBoxWorld) -> VmFiles:
    return VmFiles(world.vms / "one")


async def saved_with_snapshot(world: VirtualBoxWorld) -> int:
    """A VM with a snapshot, saved a little later; the counter of its last line."""
    hypervisor = await world.running()
    await hypervisor.save_snapshot("one", "vmwrapper_1")
    await world.counting()
    await hypervisor.save_state("one")
    return world.lines()[-1].memory


class TestRegistry:
    @pytest.mark.parametrize("restarted", [False, True])
    @pytest_twisted.ensureDeferred
    async def test_registered_but_its_folder_is_gone(self, world: VirtualBoxWorld, restarted: bool) -> None:
        await saved_with_snapshot(world)
        await world.running("two")
        if restarted:
            await world.hypervisor.save_state("two")
            await end_service(world)
        shutil.rmtree(world.vms / "one")
        await anew(world)
        await world.hypervisor.delete("one")
        assert "one" not in await world.hypervisor.list_vms() or not restarted
        await world.running("one")
        if restarted:
            await world.hypervisor.start("two")
        assert await world.hypervisor.state("two") is VmState.RUNNING
        await world.counting("two")
        await world.hypervisor.delete("one")
        await world.hypervisor.delete("two")
        assert "inaccessible" not in world.manage("list", "vms").stdout

    @pytest.mark.parametrize("how", ["empty", "cut off", "missing"])
    @pytest_twisted.ensureDeferred
    async def test_settings_that_a_power_loss_damaged_come_from_the_previous_ones(
        self, world: VirtualBoxWorld, how: str
    ) -> None:
        last = await saved_with_snapshot(world)
        await end_service(world)
        settings = files(world).settings
        text = settings.read_bytes()
        shutil.copyfile(settings, files(world).previous_settings)
        if how == "missing":
            settings.unlink()
        else:
            settings.write_bytes(b"" if how == "empty" else text[: len(text) // 2])
        await anew(world)
        assert await world.hypervisor.list_vms() == ["one"]
        assert await world.hypervisor.state("one") is VmState.SAVED
        assert await world.hypervisor.list_snapshots("one") == ["vmwrapper_1"]
        known = len(world.lines())
        await world.hypervisor.start("one")
        await world.counting(more=1)
        assert world.lines()[known].memory == last + 1, "the work goes on where it was"

    @pytest.mark.parametrize("text", ["{", '{"version": 1, "name": "one", "uuid": 5}'])
    @pytest_twisted.ensureDeferred
    async def test_what_we_cannot_read_of_our_own_can_be_deleted_and_made_again(
        self, world: VirtualBoxWorld, text: str
    ) -> None:
        await world.running()
        await world.running("two")
        files(world).definition_file.write_text(text)
        await anew(world)
        with pytest.raises(HypervisorError, match=r"vmwrapper\.json"):
            await world.hypervisor.state("one")
        assert await world.hypervisor.state("two") is VmState.RUNNING
        await world.hypervisor.delete("one")
        assert "one" not in await world.hypervisor.list_vms()
        await world.running()

    @pytest_twisted.ensureDeferred
    async def test_settings_that_are_lost_for_good_are_no_vm_and_can_be_made_again(
        self, world: VirtualBoxWorld
    ) -> None:
        await saved_with_snapshot(world)
        await end_service(world)
        files(world).settings.write_bytes(b"")
        files(world).previous_settings.unlink()
        await anew(world)
        assert await world.hypervisor.list_vms() == []
        await world.running()

    @pytest_twisted.ensureDeferred
    async def test_virtualbox_has_forgotten_everything(self, world: VirtualBoxWorld) -> None:
        last = await saved_with_snapshot(world)
        await end_service(world)
        home = Path(world.environment["VBOX_USER_HOME"])
        for path in home.glob("VirtualBox.xml*"):
            path.unlink()
        world.manage("setextradata", "global", "VBoxInternal/HM/FallbackToIEM", "1")
        await anew(world)
        assert await world.hypervisor.state("one") is VmState.SAVED
        known = len(world.lines())
        await world.hypervisor.start("one")
        await world.counting(more=1)
        assert world.lines()[known].memory == last + 1

    @pytest_twisted.ensureDeferred
    async def test_media_of_a_vanished_slot_are_in_nobodys_way(self, world: VirtualBoxWorld) -> None:
        """The same path again, as slots are used again."""
        await world.running()
        await world.hypervisor.power_off("one")
        world.manage("unregistervm", "one")
        for pattern in ("base-*", "disk-*"):  # VirtualBox knows them again
            (medium,) = files(world).folder.glob(pattern)
            world.manage("showmediuminfo", "disk", str(medium))
        await anew(world)
        files(world).definition_file.unlink()
        assert await world.hypervisor.list_vms() == []
        await world.running()
        await world.hypervisor.delete("one")
        assert "UUID" not in world.manage("list", "hdds").stdout


class TestDataFolder:
    """BOINC's data folder in another place. With a service that knows the old one: the contract."""

    @pytest_twisted.ensureDeferred
    async def test_it_was_moved_while_no_service_ran(self, world: VirtualBoxWorld) -> None:
        image = world.in_a_data_folder()
        await world.running(image=image)
        await world.hypervisor.save_state("one")
        last = world.lines()[-1]
        await world.hypervisor.close()
        await end_service(world)
        world.elsewhere("moved")
        assert await world.hypervisor.list_vms() == ["one"]
        await world.hypervisor.start("one")
        await world.goes_on_after(last)

    @pytest_twisted.ensureDeferred
    async def test_original_and_copy_take_turns(self, world: VirtualBoxWorld) -> None:
        image = world.in_a_data_folder()
        await world.running(image=image)
        await world.hypervisor.save_state("one")
        last, original = world.lines()[-1], world.data
        world.elsewhere("copied")
        for _ in range(2):
            await world.hypervisor.start("one")
            await world.goes_on_after(last)
            await world.hypervisor.save_state("one")
            await world.hypervisor.close()
            world.use(original)
        assert await world.hypervisor.list_snapshots("one") == []

    @pytest_twisted.ensureDeferred
    async def test_a_copy_of_a_vm_that_runs_is_given_up_and_made_anew(self, world: VirtualBoxWorld) -> None:
        image = world.in_a_data_folder()
        await world.running(image=image)
        original, runs = world.data, world.hypervisor
        world.elsewhere("copied")
        assert await world.hypervisor.list_vms() == []
        with pytest.raises(VmNotFound):
            await world.hypervisor.info("one")
        await world.hypervisor.delete("one")
        await world.running(image=world.data / "projects" / "p" / image.name)
        assert await runs.state("one") is VmState.RUNNING
        await world.hypervisor.delete("one")
        world.use(original)
        assert await world.hypervisor.state("one") is VmState.RUNNING
        await world.counting()
        await runs.close()


class TestCutOff:
    @pytest.mark.parametrize("calls", [2, 3, 4, 5, 6, 7, 8])
    @pytest_twisted.ensureDeferred
    async def test_a_create_that_dies_after_any_call_leaves_nothing_that_matters(
        self, world: VirtualBoxWorld, calls: int
    ) -> None:
        script = """
            import os, sys
            from pathlib import Path
            from vmcontrol.common.eventloop import start, the_reactor
            from vmcontrol.hypervisors.interface import VmSpec
            from vmcontrol.hypervisors.virtualbox.driver import VirtualBoxHypervisor

            vms, image, program, most = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
            hypervisor = VirtualBoxHypervisor(the_reactor(), vms, program=program)
            trace = hypervisor.vbox._trace_call

            def counted(*words, **more):
                trace(*words, **more)
                if hypervisor.vbox.calls == most:
                    os.kill(os.getpid(), 9)

            hypervisor.vbox._trace_call = counted
            spec = VmSpec("one", image, vms / "one", memory_mb=32, console_log=vms.parent / "one.log", agent_port=4616)
            start(hypervisor.create(spec)).addBoth(lambda result: (print(result), the_reactor().stop()))
            the_reactor().run()
        """
        command = [sys.executable, "-c", "\n".join(line[12:] for line in script.splitlines())]
        arguments = [str(world.vms), str(world.image), str(world.lab.vboxmanage), str(calls)]
        ended = subprocess.run([*command, *arguments], env=world.environment, timeout=60, capture_output=True)
        assert ended.returncode == -signal.SIGKILL, ended
        assert await world.hypervisor.list_vms() in ([], ["one"])
        await anew(world)
        await world.hypervisor.create(world.spec())
        await world.hypervisor.start("one")
        await world.counting(more=1)
        await world.hypervisor.delete("one")
        world.nothing_left()

    @pytest.mark.parametrize("victim", ["VM process", "service"])
    @pytest_twisted.ensureDeferred
    async def test_a_snapshot_interrupted_half_way(self, world: VirtualBoxWorld, victim: str) -> None:
        hypervisor = await world.running(memory_mb=256)
        await hypervisor.save_snapshot("one", "vmwrapper_1")
        at_snapshot = world.lines()[-1].memory
        await world.counting(more=4)
        pid = (await hypervisor.info("one")).pid
        assert pid is not None
        taking = start(hypervisor.save_snapshot("one", "vmwrapper_2"))
        failed: list[object] = []
        taking.addErrback(failed.append)
        await sleep(world.reactor, 0.06)
        if victim == "service":
            await end_service(world)
        else:
            os.kill(pid, signal.SIGKILL)
        await taking
        await gone_after(world, pid, 15.0)
        await anew(world)
        state = await world.hypervisor.state("one")
        if state is VmState.RUNNING:
            await world.hypervisor.power_off("one")
        assert await world.hypervisor.state("one") in (VmState.ABORTED, VmState.POWERED_OFF, VmState.SAVED)
        assert "vmwrapper_1" in await world.hypervisor.list_snapshots("one")
        await world.hypervisor.restore_snapshot("one", "vmwrapper_1")
        known = len(world.lines())
        await world.hypervisor.start("one")
        await world.counting(more=1)
        assert world.lines()[known].memory <= at_snapshot + 3, "the work goes on from the older snapshot"
        await world.hypervisor.save_snapshot("one", "vmwrapper_2")
        await world.hypervisor.delete("one")
        assert not any(world.vms.iterdir())
        # VirtualBox's service may remember a medium of the snapshot until it ends. A VM in the same place is not hurt.
        (world.folder / "one.log").unlink()
        await world.running()
        await world.hypervisor.save_snapshot("one", "vmwrapper_1")
        await world.hypervisor.delete("one")
        await end_service(world)
        await world.hypervisor.create(world.spec())
        await world.hypervisor.delete("one")
        world.nothing_left()


async def gone_after(world: VirtualBoxWorld, pid: int, limit_s: float) -> None:
    """Until the process is gone; one that VirtualBox lets live is not waited for longer than this."""
    deadline = after(limit_s)
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        await sleep(world.reactor, 0.05)


class TestService:
    @pytest_twisted.ensureDeferred
    async def test_it_dies_while_a_vm_runs(self, world: VirtualBoxWorld) -> None:
        """VirtualBox ends its VMs then; the snapshot is what the work goes on from."""
        hypervisor = await world.running()
        await hypervisor.save_snapshot("one", "vmwrapper_1")
        at_snapshot = world.lines()[-1].memory
        await end_service(world)
        await world.told("one", VmState.ABORTED, 40.0)
        (world.folder / "one.log").unlink()  # the guest may have seen its disk go
        await hypervisor.restore_snapshot("one")
        known = 0
        await hypervisor.start("one")
        await world.counting(more=1)
        assert world.lines()[known].memory <= at_snapshot + 3

    @pytest_twisted.ensureDeferred
    async def test_it_hangs(self, world: VirtualBoxWorld, monkeypatch: pytest.MonkeyPatch) -> None:
        hypervisor = await world.running()
        ask = world.driver.vbox.ask
        monkeypatch.setattr(world.driver.vbox, "ask", lambda *words, **more: ask(*words, **(more | {"limit_s": 0.7})))
        found = service(world)
        assert found is not None
        found.suspend()
        try:
            began = time.monotonic()
            with pytest.raises(HostProblem) as caught:
                await hypervisor.pause("one")
            assert time.monotonic() - began < 3
            assert caught.value.key == "virtualbox-hung"
            assert caught.value.delay_s
            await world.counting(more=2)
        finally:
            found.resume()
        await hypervisor.pause("one")
        await hypervisor.unpause("one")
        await world.counting(more=2)

    @pytest_twisted.ensureDeferred
    async def test_another_client_holds_the_vm_for_a_moment(
        self, world: VirtualBoxWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await world.hypervisor.create(world.spec())
        holder = hold(world)
        try:
            monkeypatch.setattr(vboxmanage, "LOCKED_LIMIT_S", 0.3)
            with pytest.raises(HostProblem) as caught:
                await world.hypervisor.start("one")
            assert caught.value.key == "vm-locked"
            assert caught.value.delay_s
            monkeypatch.setattr(vboxmanage, "LOCKED_LIMIT_S", 10.0)
            starting = start(world.hypervisor.start("one"))
            await sleep(world.reactor, 0.3)
            holder.send_signal(signal.SIGCONT)
            await starting
            await world.counting()
        finally:
            holder.kill()
            holder.wait()

    @pytest_twisted.ensureDeferred
    async def test_another_client_deletes_the_vm(self, world: VirtualBoxWorld) -> None:
        await world.running()
        await world.hypervisor.power_off("one")
        world.manage("unregistervm", "one")
        shutil.rmtree(files(world).folder)
        with pytest.raises(HypervisorError):
            await world.hypervisor.start("one")
        await world.hypervisor.delete("one")
        await world.running()

    @pytest_twisted.ensureDeferred
    async def test_a_vm_process_that_does_not_end_is_killed(
        self, world: VirtualBoxWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(monitor, "END_LIMIT_S", 0.5)
        hypervisor = await world.running()
        ask = world.driver.vbox.ask
        monkeypatch.setattr(world.driver.vbox, "ask", lambda *words, **more: ask(*words, **(more | {"limit_s": 3.0})))
        pid = (await hypervisor.info("one")).pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await hypervisor.power_off("one")
        assert await hypervisor.state("one") in (VmState.POWERED_OFF, VmState.ABORTED)
        monkeypatch.undo()
        await hypervisor.start("one")
        await world.counting()


def hold(world: VirtualBoxWorld) -> subprocess.Popen[bytes]:
    """A VBoxManage that stands still while it has the VM locked."""
    for number in range(150):  # the right moment is 0.01 to 0.03 s after the start, later on a busy computer
        delay = 0.008 + 0.003 * (number * 7 % 40)
        command = [str(world.lab.vboxmanage), "modifyvm", "one", "--vram", "17"]
        holder = subprocess.Popen(command, env=world.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        holder.send_signal(signal.SIGSTOP)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it stands while it holds what the service itself needs
            said = world.manage("modifyvm", "one", "--vram", "16", check=False, limit_s=10)
            if "already locked" in said.stderr:
                return holder
        holder.send_signal(signal.SIGCONT)
        holder.wait(timeout=30)
    raise AssertionError("VBoxManage could not be stopped at the right moment")


SLOTS_SCRIPT = """
import sys
from pathlib import Path
from vmcontrol.common.eventloop import sleep, start, the_reactor
from vmcontrol.hypervisors.interface import VmSpec
from vmcontrol.protocol.vm import VmState
from vmcontrol.hypervisors.virtualbox.driver import VirtualBoxHypervisor

slot, image, program, rounds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

async def work():
    for number in range(rounds):
        hypervisor = VirtualBoxHypervisor(the_reactor(), slot / "vm", program=program)
        name, log = f"vm_{slot.name}_{number}", slot / f"{number}.log"
        await hypervisor.create(VmSpec(name, image, slot / "vm" / name, memory_mb=32, console_log=log, agent_port=4616))
        await hypervisor.start(name)
        while not (log.exists() and b"=" in log.read_bytes()):
            await sleep(the_reactor(), 0.02)
        assert await hypervisor.state(name) is VmState.RUNNING
        await hypervisor.delete(name)
        await hypervisor.close()
    print("good")

start(work()).addErrback(lambda failure: failure.printTraceback(sys.stdout)).addBoth(lambda _: the_reactor().stop())
the_reactor().run()
"""


async def slots_at_once(world: VirtualBoxWorld, rounds: int) -> None:
    working: list[subprocess.Popen[str]] = []
    for number in range(4):
        slot = world.folder / f"slot{number}"
        slot.mkdir()
        command = [sys.executable, "-c", SLOTS_SCRIPT, str(slot), str(world.image), str(world.lab.vboxmanage)]
        working.append(
            subprocess.Popen(
                [*command, str(rounds)],
                env=world.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    for process in working:
        output, _ = process.communicate(timeout=60 + 30 * rounds)
        assert output.strip().endswith("good"), f"{process.returncode}: {output}"
    world.nothing_left()
    assert not list(world.folder.glob("slot*/vm/*"))


class TestManySlots:
    @pytest_twisted.ensureDeferred
    async def test_four_slots_at_the_same_moment(self, world: VirtualBoxWorld) -> None:
        await slots_at_once(world, 2)

    @pytest.mark.optin
    @pytest.mark.timeout(900)
    @pytest_twisted.ensureDeferred
    async def test_four_slots_twenty_rounds(self, world: VirtualBoxWorld) -> None:
        await slots_at_once(world, 20)
