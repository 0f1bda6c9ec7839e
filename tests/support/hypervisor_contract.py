"""What every hypervisor driver has to pass: the same calls, the same states, the same errors.

A driver's test module makes a subclass of `HypervisorContract` and a fixture `world`; a third hypervisor has these
tests already. The guest is tiny_guest's, so all that is asked of it is seen on its console.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import pytest_twisted

from tests.support import tiny_guest
from vmcontrol.common.eventloop import Event, sleep, with_limit
from vmcontrol.hypervisors.interface import (
    HostProblem,
    Hypervisor,
    HypervisorError,
    SnapshotNotFound,
    SpecRefused,
    VmExists,
    VmNotFound,
    VmSpec,
    WrongState,
)
from vmcontrol.protocol.vm import VmState

T = TypeVar("T")
DISKS = (0xC0FFEE01, 0xC0FFEE02)


class World(ABC):
    """A driver with a folder and an image, and what a test needs to know of it."""

    limit_s = 60.0
    """Until the guest prints its first line; it takes 0.3 s."""

    def __init__(self, reactor: Any, folder: Path) -> None:
        self.reactor = reactor
        self.folder = folder
        self.vms = folder / "vm"
        self.image = tiny_guest.make_image(folder / "guest.image", "vdi")
        self.hypervisor = self.open()
        self.states: list[tuple[str, VmState]] = []
        self.news = Event()
        self.hypervisor.on_state_change(self._changed)

    @abstractmethod
    def open(self) -> Hypervisor:
        """The driver, as a new HostMain opens it."""

    def spec(self, name: str = "one", **changes: Any) -> VmSpec:
        fields: dict[str, Any] = {
            "image": self.image,
            "memory_mb": 32,
            "console_log": self.folder / f"{name}.log",
            "agent_port": 4616,
        }
        return VmSpec(name=name, folder=self.vms / name, **(fields | changes))

    async def running(self, name: str = "one", **changes: Any) -> Hypervisor:
        """A VM that runs and has printed."""
        await self.hypervisor.create(self.spec(name, **changes))
        await self.hypervisor.start(name)
        await self.counting(name)
        return self.hypervisor

    # BOINC's data folder, in another place

    def in_a_data_folder(self) -> Path:
        """From now on the slot is <data>/slots/0; the image is in <data>/projects/p. The image."""
        data, project = self.folder / "data", self.folder / "data" / "projects" / "p"
        (data / "slots" / "0").mkdir(parents=True)
        project.mkdir(parents=True)
        self.use(data)
        return self.image.rename(project / self.image.name)

    def secret_file(self) -> Path:
        path = self.folder / "vmwrapper_secret"
        path.write_text("5ec2e7")
        return path

    def elsewhere(self, how: str) -> None:
        """The data folder is moved or copied, and the slot is the one there; the driver has to be opened anew."""
        there = self.data.with_name("data on a larger disk")
        if how == "moved":
            self.data.rename(there)
        else:
            shutil.copytree(self.data, there, symlinks=True)
        self.use(there)

    def use(self, data: Path) -> None:
        """The slot is the one in this data folder."""
        self.data = data
        self.folder = data / "slots" / "0"
        self.vms = self.folder / "vm"
        self.hypervisor = self.open()
        self.hypervisor.on_state_change(self._changed)

    def uses(self, folder: Path) -> list[str]:
        """What the VM's process has open in a folder."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                found += [one.path for one in process.open_files() if Path(one.path).is_relative_to(folder)]
        return found

    def opened(self, path: Path) -> list[str]:
        """How processes have a file open, "r" or "w". Known by its inode: VirtualBox's have other mounts."""
        found, wanted = [], path.stat()
        for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
            with contextlib.suppress(OSError):
                if os.path.samestat(descriptor.stat(), wanted):
                    told = (descriptor.parents[1] / "fdinfo" / descriptor.name).read_text()
                    flags = next(line for line in told.splitlines() if line.startswith("flags:")).split()[1]
                    found.append("w" if int(flags, 8) & os.O_ACCMODE else "r")
        return found

    def lines(self, name: str = "one") -> list[tiny_guest.Line]:
        return tiny_guest.lines(self.folder / f"{name}.log")

    async def until(self, what: str, condition: Callable[[], T], limit_s: float | None = None) -> T:
        """The first true value of `condition`, which looks at the console's file: nobody can tell when it grows."""

        async def look() -> T:
            while not (value := condition()):
                await sleep(self.reactor, 0.01)
            return value

        return await with_limit(self.reactor, limit_s or self.limit_s, what, look())

    async def counting(self, name: str = "one", more: int = 2) -> tiny_guest.Line:
        """Wait for `more` new counting lines; the last of them. All must be consistent."""
        before = len(self.lines(name))

        def enough() -> list[tiny_guest.Line]:
            new = [line for line in self.lines(name)[before:] if line.memory]
            return new if len(new) >= more else []

        new = await self.until(f"{more} lines of {name}", enough)
        assert all(line.consistent for line in new), "memory and disk do not belong together"
        return new[-1]

    async def seen(self, name: str = "one") -> tiny_guest.Seen:
        """The next line of a guest that prints what is on its further disks."""
        console = self.folder / f"{name}.log"
        before = len(tiny_guest.seen(console))
        new = await self.until(f"a line of {name}", lambda: tiny_guest.seen(console)[before + 1 : before + 2])
        return new[0]

    def further_disks(self) -> tuple[Path, Path]:
        """Two read-only disks, one VDI and one raw, with the numbers of DISKS on them."""
        one = tiny_guest.make_further_disk(self.folder / "container 1, é.vdi", "vdi", DISKS[0])
        two = tiny_guest.make_further_disk(self.folder / "container 2.raw", "raw", DISKS[1])
        for disk in (one, two):
            disk.chmod(0o444)
        return one, two

    async def goes_on_after(self, last: tiny_guest.Line, name: str = "one") -> None:
        """Wait for the line after `last`, which was the last one printed: the memory must have gone on from there."""
        at = self.lines(name).index(last) + 1
        line = await self.until(f"a line of {name} after {last}", lambda: self.lines(name)[at : at + 1])
        assert line[0].memory == last.memory + 1
        assert line[0].consistent

    async def told(self, name: str, state: VmState, limit_s: float) -> None:
        """Wait until a listener was told."""

        async def listen() -> None:
            while not self.states or self.states[-1] != (name, state):
                self.news.clear()
                await self.news.wait()

        await with_limit(self.reactor, limit_s, f"{name}: {state}", listen())

    def _changed(self, name: str, state: VmState) -> None:
        self.states.append((name, state))
        self.news.set()

    async def close(self) -> None:
        for name in await self.hypervisor.list_vms():
            await self.hypervisor.delete(name)
        await self.hypervisor.close()


def has_ended(pid: int) -> bool:
    """Whether no such process runs; one whose parent (perhaps init) has not taken its status yet has ended too."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def digest(path: Path) -> tuple[str, int, int]:
    return hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns, path.stat().st_size


def replace_image(image: Path, how: str) -> None:
    """Another image in the place of this one, as a project's update or an unpacked image would do it."""
    status = image.stat()
    content = bytearray(image.read_bytes())
    at = content.index(b"\x55\xaa", 510) - 20
    content[at : at + 4] = b"NEW!"
    if how == "another size":
        content += bytes(1 << 20)
    fresh = image.with_suffix(".fresh")
    fresh.write_bytes(content)
    if how != "another size":
        os.utime(fresh, ns=(status.st_atime_ns, status.st_mtime_ns))
    fresh.replace(image)


class HypervisorContract:
    @pytest_twisted.ensureDeferred
    async def test_runs_pauses_and_goes_on(self, world: World) -> None:
        hypervisor = await world.running()
        assert await hypervisor.state("one") is VmState.RUNNING
        assert await hypervisor.list_running() == ["one"]
        await hypervisor.pause("one")
        assert await hypervisor.state("one") is VmState.PAUSED
        before = world.lines()[-1]
        await sleep(world.reactor, 0.3)  # five ticks of the guest's clock
        assert world.lines()[-1] == before
        await hypervisor.pause("one")
        await hypervisor.unpause("one")
        await hypervisor.unpause("one")
        assert await hypervisor.state("one") is VmState.RUNNING
        await world.goes_on_after(before)

    @pytest_twisted.ensureDeferred
    async def test_power_off_keeps_the_disk(self, world: World) -> None:
        hypervisor = await world.running()
        await hypervisor.power_off("one")
        await hypervisor.power_off("one")
        assert await hypervisor.state("one") is VmState.POWERED_OFF
        assert (await hypervisor.info("one")).pid is None
        last = world.lines()[-1]
        await hypervisor.start("one")
        await world.counting()
        boots = [line for line in world.lines() if line.memory == 0]
        assert len(boots) == 2, "the console log is appended to"
        assert boots[0].disk == 0
        assert boots[1].disk >= last.disk > 0

    @pytest_twisted.ensureDeferred
    async def test_a_guest_that_ignores_acpi_is_powered_off_after_the_grace(self, world: World) -> None:
        hypervisor = await world.running()
        start = world.reactor.seconds()
        await hypervisor.power_off("one", acpi_grace_s=0.4)
        assert await hypervisor.state("one") is VmState.POWERED_OFF
        assert world.reactor.seconds() - start >= 0.4

    @pytest_twisted.ensureDeferred
    async def test_a_saved_state_goes_on_where_it_was_also_for_a_new_driver(self, world: World) -> None:
        hypervisor = await world.running()
        pid = (await hypervisor.info("one")).pid
        await hypervisor.save_state("one")
        assert pid is not None
        assert has_ended(pid)
        assert await hypervisor.state("one") is VmState.SAVED
        last = world.lines()[-1]
        await hypervisor.close()
        world.hypervisor = hypervisor = world.open()
        assert await hypervisor.list_vms() == ["one"]
        assert await hypervisor.state("one") is VmState.SAVED
        await hypervisor.start("one")
        assert await hypervisor.state("one") is VmState.RUNNING
        await world.goes_on_after(last)

    @pytest_twisted.ensureDeferred
    async def test_a_paused_vm_can_be_saved(self, world: World) -> None:
        hypervisor = await world.running()
        await hypervisor.pause("one")
        last = world.lines()[-1]
        await hypervisor.save_state("one")
        await hypervisor.start("one")
        await world.goes_on_after(last)

    @pytest_twisted.ensureDeferred
    async def test_a_discarded_saved_state_is_gone(self, world: World) -> None:
        hypervisor = await world.running()
        await hypervisor.save_state("one")
        await hypervisor.power_off("one")
        assert await hypervisor.state("one") is VmState.POWERED_OFF
        known = len(world.lines())
        await hypervisor.start("one")
        await world.counting(more=1)
        assert [line.memory for line in world.lines()[known : known + 2]] == [0, 1], "it booted"

    @pytest_twisted.ensureDeferred
    async def test_a_snapshot_brings_back_memory_and_disk_together(self, world: World) -> None:
        hypervisor = await world.running()
        await hypervisor.pause("one")
        at_snapshot = world.lines()[-1]
        await hypervisor.unpause("one")
        await hypervisor.save_snapshot("one", "first", "after some lines")
        assert await hypervisor.state("one") is VmState.RUNNING
        later = await world.counting(more=8)
        with pytest.raises(WrongState):
            await hypervisor.restore_snapshot("one", "first")
        await hypervisor.power_off("one")
        for _ in range(2):  # a snapshot may be gone back to more than once
            await hypervisor.restore_snapshot("one")
            assert await hypervisor.state("one") is VmState.SAVED
            known = len(world.lines())
            await hypervisor.start("one")
            await world.counting(more=2)
            again = world.lines()[known]
            assert at_snapshot.memory < again.memory < later.memory
            assert again.disk == again.memory
            assert again.consistent
            await hypervisor.power_off("one")

    @pytest_twisted.ensureDeferred
    async def test_snapshots_are_listed_replaced_and_deleted(self, world: World) -> None:
        hypervisor = await world.running()
        assert await hypervisor.list_snapshots("one") == []
        assert (await hypervisor.info("one")).current_snapshot is None
        await hypervisor.save_snapshot("one", "vmwrapper_1")
        await hypervisor.pause("one")
        await hypervisor.save_snapshot("one", "vmwrapper_2")
        assert await hypervisor.state("one") is VmState.PAUSED, "it goes on as it was"
        await hypervisor.unpause("one")
        assert await hypervisor.list_snapshots("one") == ["vmwrapper_1", "vmwrapper_2"]
        assert (await hypervisor.info("one")).current_snapshot == "vmwrapper_2"
        await hypervisor.delete_snapshot("one", "vmwrapper_2")
        assert (await hypervisor.info("one")).current_snapshot == "vmwrapper_1"
        await hypervisor.save_snapshot("one", "vmwrapper_1")
        await hypervisor.delete_snapshot("one", "never taken")
        assert await hypervisor.list_snapshots("one") == ["vmwrapper_1"]
        await hypervisor.power_off("one")
        await hypervisor.delete_snapshot("one", "vmwrapper_1")
        assert await hypervisor.list_snapshots("one") == []
        with pytest.raises(SnapshotNotFound):
            await hypervisor.restore_snapshot("one")

    @pytest_twisted.ensureDeferred
    async def test_a_snapshot_of_a_vm_that_is_off_is_its_disk(self, world: World) -> None:
        hypervisor = await world.running()
        await hypervisor.power_off("one")
        disk = world.lines()[-1].disk
        await hypervisor.save_snapshot("one", "off")
        await hypervisor.start("one")
        await world.counting(more=5)
        await hypervisor.power_off("one")
        await hypervisor.restore_snapshot("one", "off")
        assert await hypervisor.state("one") is VmState.POWERED_OFF
        await hypervisor.start("one")
        await world.counting(more=1)
        boot = [line for line in world.lines() if line.memory == 0][-1]
        assert disk <= boot.disk <= disk + 1

    @pytest_twisted.ensureDeferred
    async def test_going_back_discards_a_saved_state(self, world: World) -> None:
        hypervisor = await world.running()
        await hypervisor.save_snapshot("one", "old")
        later = await world.counting(more=5)
        await hypervisor.save_state("one")
        await hypervisor.restore_snapshot("one", "old")
        known = len(world.lines())
        await hypervisor.start("one")
        await world.counting(more=1)
        assert world.lines()[known].memory < later.memory

    @pytest_twisted.ensureDeferred
    async def test_a_killed_vm_process_is_noticed_at_once(self, world: World) -> None:
        hypervisor = await world.running()
        pid = (await hypervisor.info("one")).pid
        assert pid is not None
        psutil.Process(pid).kill()
        await world.told("one", VmState.ABORTED, 2.0)
        info = await hypervisor.info("one")
        assert info.state is VmState.ABORTED
        assert info.pid is None
        assert info.agent_address is None
        assert info.trouble
        for wrong in (hypervisor.pause("one"), hypervisor.save_state("one"), hypervisor.unpause("one")):
            with pytest.raises(WrongState):
                await wrong
        known = len(world.lines())
        await hypervisor.start("one")
        await world.counting(more=1)
        assert [line.memory for line in world.lines()[known : known + 2]] == [0, 1], "it booted"

    @pytest_twisted.ensureDeferred
    async def test_listeners_hear_of_every_state(self, world: World) -> None:
        hypervisor = await world.running()
        await hypervisor.pause("one")
        await hypervisor.unpause("one")
        await hypervisor.save_state("one")
        await hypervisor.start("one")
        await hypervisor.power_off("one")
        wanted = [
            *(VmState.STARTING, VmState.RUNNING, VmState.PAUSED, VmState.RUNNING, VmState.SAVING, VmState.SAVED),
            *(VmState.RESTORING, VmState.RUNNING, VmState.STOPPING, VmState.POWERED_OFF),
        ]
        assert [state for name, state in world.states if name == "one"] == wanted

    @pytest.mark.parametrize("how", ["moved", "copied"])
    @pytest_twisted.ensureDeferred
    async def test_a_data_folder_that_was_moved_or_copied_goes_on(self, world: World, how: str) -> None:
        image = world.in_a_data_folder()
        disk = tiny_guest.make_further_disk(image.with_name("container.vdi"), "vdi", DISKS[0])
        hypervisor = await world.running(image=image, secret_file=world.secret_file(), disks=(str(disk),))
        await hypervisor.save_snapshot("one", "good")
        await world.counting()
        await hypervisor.save_state("one")
        last = world.lines()[-1]
        await hypervisor.close()
        original = world.data
        world.elsewhere(how)
        before = {path: path.read_bytes() for path in original.rglob("*") if path.is_file()}
        world.hypervisor = hypervisor = world.open()
        for path in (world.vms / "one").glob("*.json"):
            assert str(original).encode() not in path.read_bytes()
        assert await hypervisor.list_vms() == ["one"]
        assert await hypervisor.state("one") is VmState.SAVED
        info = await hypervisor.info("one")
        assert (info.unusable, info.current_snapshot) == ("", "good")
        assert info.image is not None
        assert info.image.is_relative_to(world.data)
        await hypervisor.start("one")
        await world.goes_on_after(last)
        assert not world.uses(original), "its own image, secret and console"
        await hypervisor.power_off("one")
        await hypervisor.restore_snapshot("one", "good")
        known = len(world.lines())
        await hypervisor.start("one")
        await world.counting()
        assert 0 < world.lines()[known].memory < last.memory
        assert {path: path.read_bytes() for path in original.rglob("*") if path.is_file()} == before

    @pytest.mark.parametrize("how", ["another size", "the same size and time"])
    @pytest.mark.parametrize("kept", ["saved state", "snapshot"])
    @pytest_twisted.ensureDeferred
    async def test_an_image_that_was_replaced_is_noticed_before_anything_is_resumed(
        self, world: World, how: str, kept: str
    ) -> None:
        hypervisor = await world.running()
        if kept == "snapshot":
            await hypervisor.save_snapshot("one", "good")
            await hypervisor.power_off("one")
            await hypervisor.restore_snapshot("one", "good")
        else:
            await hypervisor.save_state("one")
        assert (await hypervisor.info("one")).unusable == ""
        await hypervisor.close()
        replace_image(world.image, how)
        world.hypervisor = hypervisor = world.open()
        known = len(world.lines())
        assert "replaced" in (await hypervisor.info("one")).unusable
        with pytest.raises(HostProblem, match="was replaced") as caught:
            await hypervisor.start("one")
        assert (caught.value.key, caught.value.delay_s) == ("image-damaged", None)
        assert len(world.lines()) == known, "it did not run"
        await hypervisor.delete("one")
        await world.running()

    @pytest_twisted.ensureDeferred
    async def test_an_image_with_another_time_is_the_same_image(self, world: World) -> None:
        hypervisor = await world.running()
        await hypervisor.save_state("one")
        os.utime(world.image, (1, 1))
        assert (await hypervisor.info("one")).unusable == ""
        await hypervisor.start("one")
        await world.counting()

    @pytest_twisted.ensureDeferred
    async def test_an_image_that_is_gone_makes_the_vm_unusable(self, world: World) -> None:
        hypervisor = await world.running()
        await hypervisor.save_state("one")
        world.image.unlink()
        assert world.image.name in (await hypervisor.info("one")).unusable
        with pytest.raises(HostProblem) as caught:
            await hypervisor.start("one")
        assert (caught.value.key, caught.value.delay_s) == ("image-missing", None)

    @pytest.mark.parametrize("kind", ["raw", "qcow2", "vdi"])
    @pytest_twisted.ensureDeferred
    async def test_the_image_is_only_read(self, world: World, kind: str) -> None:
        image = tiny_guest.make_image(world.folder / "project's image, 1.data", kind)
        image.chmod(0o444)
        before = digest(image)
        hypervisor = await world.running(image=image)
        await hypervisor.save_snapshot("one", "s")
        await hypervisor.save_state("one")
        await hypervisor.delete("one")
        assert digest(image) == before

    @pytest_twisted.ensureDeferred
    async def test_further_disks_are_there_whatever_becomes_of_the_vm_and_are_only_read(self, world: World) -> None:
        disks = world.further_disks()
        before = [digest(disk) for disk in disks]
        image = tiny_guest.make_image(world.folder / "sees.vdi", "vdi", tiny_guest.SEES_DISKS_SECTOR)
        hypervisor = world.hypervisor
        for name in ("one", "two"):
            await hypervisor.create(world.spec(name, image=image, disks=tuple(map(str, disks))))
            await hypervisor.start(name)
        assert (await world.seen("one")).disks == DISKS
        assert (await world.seen("two")).disks == DISKS, "two VMs have them at the same time"
        opened = [world.opened(disk) for disk in disks]
        assert [set(modes) for modes in opened] == [{"r"}, {"r"}], "opened for writing, or not at all"
        await hypervisor.save_snapshot("one", "good")
        at_snapshot = await world.seen()
        assert at_snapshot.disks == DISKS
        await hypervisor.save_state("one")
        await hypervisor.close()
        world.hypervisor = hypervisor = world.open()
        await hypervisor.start("one")
        resumed = await world.seen()
        assert resumed.disks == DISKS
        assert resumed.memory > at_snapshot.memory
        await hypervisor.power_off("one")
        await hypervisor.delete("two")
        await hypervisor.restore_snapshot("one", "good")
        await hypervisor.start("one")
        again = await world.seen()
        assert again.disks == DISKS
        assert again.memory < resumed.memory
        await hypervisor.delete_snapshot("one", "good")
        assert (await world.seen()).disks == DISKS
        await hypervisor.delete("one")
        assert [digest(disk) for disk in disks] == before
        assert await hypervisor.list_vms() == []

    @pytest.mark.parametrize("how", ["gone", "replaced"])
    @pytest_twisted.ensureDeferred
    async def test_a_further_disk_that_is_gone_or_another_one_is_told(self, world: World, how: str) -> None:
        disks = world.further_disks()
        hypervisor = await world.running(disks=tuple(map(str, disks)))
        await hypervisor.save_state("one")
        await hypervisor.close()
        if how == "gone":
            disks[1].unlink()
        else:
            tiny_guest.make_further_disk(disks[1].with_suffix(".fresh"), "raw", 7).replace(disks[1])
        world.hypervisor = hypervisor = world.open()
        assert "further disk" in (await hypervisor.info("one")).unusable
        with pytest.raises(HostProblem, match=r"further disk .*container 2\.raw") as caught:
            await hypervisor.start("one")
        assert caught.value.key == ("image-missing" if how == "gone" else "image-damaged")
        await hypervisor.delete("one")
        assert disks[0].exists()

    @pytest_twisted.ensureDeferred
    async def test_further_disks_that_cannot_be_used_are_told_when_the_vm_is_made(self, world: World) -> None:
        bad = world.folder / "bad.vdi"
        bad.write_bytes(b"this is no disk\n" * 100)
        for wrong, said in ((bad, r"bad\.vdi"), (world.folder / "missing.vdi", r"missing\.vdi")):
            with pytest.raises(HostProblem, match=said):
                await world.hypervisor.create(world.spec(disks=(str(wrong),)))
        with pytest.raises(SpecRefused, match="9 further disks"):
            await world.hypervisor.create(world.spec(disks=(str(world.image),) * 9))
        assert await world.hypervisor.list_vms() == []

    @pytest_twisted.ensureDeferred
    async def test_no_other_user_can_look_into_a_vms_files(self, world: World) -> None:
        hypervisor = await world.running()
        await hypervisor.save_snapshot("one", "s")
        await hypervisor.save_state("one")
        for folder in (world.vms, world.vms / "one"):
            assert folder.stat().st_mode & 0o777 == 0o700

    @pytest_twisted.ensureDeferred
    async def test_two_vms_of_one_image_do_not_meet(self, world: World) -> None:
        hypervisor = await world.running("one")
        await world.counting("one", more=3)
        await world.running("two")
        assert sorted(await hypervisor.list_running()) == ["one", "two"]
        one, two = await hypervisor.info("one"), await hypervisor.info("two")
        assert one.mac != two.mac
        assert one.agent_address != two.agent_address
        assert next(line for line in world.lines("two") if line.memory == 0).disk == 0
        await hypervisor.delete("one")
        await world.counting("two")
        assert await hypervisor.list_vms() == ["two"]

    @pytest_twisted.ensureDeferred
    async def test_delete_leaves_nothing(self, world: World) -> None:
        hypervisor = await world.running()
        info = await hypervisor.info("one")
        assert info.pid is not None
        await hypervisor.save_snapshot("one", "s")
        await hypervisor.delete("one")
        await hypervisor.delete("one")
        assert has_ended(info.pid)
        assert list(world.vms.iterdir()) == []
        assert await hypervisor.list_vms() == []
        with pytest.raises(VmNotFound):
            await hypervisor.state("one")

    @pytest_twisted.ensureDeferred
    async def test_calls_in_a_wrong_state_say_so(self, world: World) -> None:
        hypervisor = world.hypervisor
        await hypervisor.create(world.spec())
        assert await hypervisor.state("one") is VmState.POWERED_OFF
        with pytest.raises(VmExists):
            await hypervisor.create(world.spec())
        for wrong in (hypervisor.pause("one"), hypervisor.unpause("one"), hypervisor.save_state("one")):
            with pytest.raises(WrongState, match="one"):
                await wrong
        await hypervisor.start("one")
        with pytest.raises(WrongState):
            await hypervisor.start("one")
        for unknown in (hypervisor.start("two"), hypervisor.info("two"), hypervisor.power_off("two")):
            with pytest.raises(VmNotFound, match="two"):
                await unknown

    @pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "-x", ".hidden", "a\n", "ü", "x" * 101, "a,b=c"])
    @pytest_twisted.ensureDeferred
    async def test_names_that_could_mean_something_else_are_refused(self, world: World, name: str) -> None:
        before = sorted(world.folder.rglob("*"))
        with pytest.raises(HypervisorError, match="name"):
            await world.hypervisor.create(world.spec(name))
        with pytest.raises(VmNotFound):
            await world.hypervisor.state(name)
        assert sorted(world.folder.rglob("*")) == before

    @pytest.mark.parametrize("case", ["missing", "empty", "text", "folder"])
    @pytest_twisted.ensureDeferred
    async def test_an_image_that_cannot_be_used_is_a_fault_for_good(self, world: World, case: str) -> None:
        image = world.folder / "bad.vdi"
        if case == "folder":
            image.mkdir()
        elif case != "missing":
            image.write_bytes(b"" if case == "empty" else b"this is no disk\n" * 100)
        with pytest.raises(HostProblem, match=r"bad\.vdi") as caught:
            await world.hypervisor.create(world.spec(image=image))
        assert caught.value.key == ("image-missing" if case == "missing" else "image-damaged")
        assert caught.value.delay_s is None
        assert await world.hypervisor.list_vms() == []

    @pytest_twisted.ensureDeferred
    async def test_performance_is_of_the_vm(self, world: World) -> None:
        hypervisor = await world.running()
        first = await hypervisor.performance("one")
        assert first["cpu_time_s"] > 0
        assert first["memory_bytes"] > 8 * 1024 * 1024
        assert first["disk_bytes"] > 0
        await world.counting(more=5)
        assert (await hypervisor.performance("one"))["cpu_time_s"] >= first["cpu_time_s"]
        await hypervisor.power_off("one")
        assert (await hypervisor.performance("one"))["cpu_time_s"] == 0

    @pytest_twisted.ensureDeferred
    async def test_a_network_that_was_not_granted_cannot_be_plugged_in(self, world: World) -> None:
        hypervisor = await world.running()
        await hypervisor.set_network("one", False)
        with pytest.raises(WrongState):
            await hypervisor.set_network("one", True)

    @pytest_twisted.ensureDeferred
    async def test_probe_says_what_there_is(self, world: World) -> None:
        probe = await world.hypervisor.probe()
        assert probe.usable
        assert probe.version[0].isdigit()
        assert probe.detail
