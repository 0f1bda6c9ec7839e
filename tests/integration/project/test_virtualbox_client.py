"""A job on VirtualBox under the real BOINC client: suspend, resume, quit, crash, abort.

The guest is the tiny one that only counts and prints (in the lab guests are interpreted), so there is no agent and the
job never gets beyond its boot; that is where VM, saved state and crash of the VM can be told apart by what it prints.

    pytest -s -m optin tests/integration/project/test_virtualbox_client.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.integration.vmwrapper.boinc.test_boinc_runtime import have_library
from tests.support import boinc_client, limits, tiny_guest
from tests.support.boinc_client import BoincClient, Job, JobFile
from tests.support.client_vm import Messages, processes_in, times_of, wait_gone, wrapper_of
from tests.support.slots import HOST_MAIN_TASK
from tests.support.virtualbox_world import environment_of, the_lab
from tests.virtualbox.lab import Lab
from vmwrapper.boinc import channels

ROOT = Path(__file__).parents[3]
CONFIG = b"[Broker]\ntype = embedded\nport = 0\n[Host]\nxmlrpc_port = 0\n[Hypervisor]\nhypervisor = VirtualBox\n"
START_LIMIT_S = 90.0

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.virtualbox,
    pytest.mark.boinc,
    pytest.mark.optin,
    pytest.mark.skipif(not boinc_client.AVAILABLE, reason=boinc_client.WHY_NOT),
]


@dataclass
class World:
    """The client with its one job, and the VirtualBox that runs it."""

    client: BoincClient
    lab: Lab
    environment: dict[str, str]

    @property
    def slot(self) -> Path:
        return self.client.folder / "slots" / "0"

    def lines(self) -> list[tiny_guest.Line]:
        return tiny_guest.lines(self.slot / "guest_console.log")

    def counts(self) -> int:
        """Waits until the guest prints once more than now; its counter in memory then."""
        before = len(self.lines())
        self.wait(lambda: len(self.lines()) > before + 1, "the guest prints", START_LIMIT_S)
        return self.lines()[-1].memory

    def stands(self) -> bool:
        before = len(self.lines())
        time.sleep(0.5)  # nine lines of a guest that runs at full speed
        return len(self.lines()) == before

    def wait(self, condition: Callable[[], object], what: str, limit_s: float = 30) -> None:
        self.client.wait_for(condition, f"{what}\n{self.story()}", limit_s)

    def story(self) -> str:
        paths = [self.slot / "stderr.txt", self.slot / "stderr_HostMain"]
        return "\n".join(path.read_text(errors="replace") for path in paths if path.exists())

    def manage(self, *words: str) -> str:
        command = [str(self.lab.vboxmanage), *words]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60).stdout

    def vm_process(self) -> psutil.Process | None:
        for process in psutil.process_iter():
            try:
                if (
                    process.name().startswith("VBoxHeadless")
                    and process.environ().get("VBOX_IPC_SOCKETID") == self.mark
                ):
                    return process
            except psutil.Error:
                continue
        return None

    @property
    def mark(self) -> str:
        return self.environment["VBOX_IPC_SOCKETID"]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    here = the_lab()
    kind = "library" if have_library() else "python"
    script = (
        f'#!/bin/sh\nexport PYTHONPATH="{ROOT}" VMWRAPPER_BOINC_RUNTIME={kind}\n'
        f'exec "{sys.executable}" -m vmwrapper "$@"\n'
    )
    xml = (
        f"<job_desc>{HOST_MAIN_TASK}<task><virtualmachine>one</virtualmachine><image>guest.vdi</image>"
        "<memory_size_mb>32</memory_size_mb><application>worker</application><app_pathVM>/bin</app_pathVM>"
        "<boot_timeout>3000</boot_timeout></task></job_desc>"
    )
    files = [
        JobFile("job.xml", xml.encode()),
        JobFile("HostConfig.cfg", CONFIG, copied=True),
        JobFile("guest.vdi", tiny_guest.make_image(tmp_path / "guest.vdi", "vdi")),
    ]
    with here.home(tmp_path / "home") as environment:
        names = ("VBOX_USER_HOME", "VBOX_IPC_SOCKETID", "HOME", "LOGNAME", "USER")
        variables = {name: environment[name] for name in names} | {"VMWRAPPER_VBOXMANAGE": str(here.vboxmanage)}
        with (
            environment_of(variables),
            BoincClient(tmp_path / "client", [Job("one", script.encode(), files=files)]) as client,
        ):
            yield World(client, here, environment)


def test_control_and_recovery_on_virtualbox(world: World) -> None:
    client = world.client
    client.wait_for(lambda: client.result("one").is_running, "started")
    assert client.slot("one") == world.slot
    world.wait(lambda: len(world.lines()) > 2, "the guest prints", START_LIMIT_S)
    assert world.lines()[0].memory == 0, "it has booted"
    vm = world.vm_process()
    assert vm is not None
    pid = vm.pid
    world.wait(lambda: f"<other_pid>{pid}</other_pid>" in reported(world.slot), "its pid is reported to the client")

    messages = Messages(world.slot)
    client.suspend("one")
    world.wait(world.stands, "paused")
    paused = times_of(world.slot, "Paused$")[-1] - messages.time_of("<suspend/>")
    client.resume("one")
    last = world.counts()
    resumed = times_of(world.slot, "Running$")[-1] - messages.time_of("<resume/>")
    messages.close()
    load = limits.factor()
    print(f"measured, seconds: suspend {paused:.2f}, resume {resumed:.2f}")
    assert max(paused, resumed) < 1.0 * load, "VBoxManage alone takes some tenths of a second"

    # quit: saved, nothing runs; the next start goes on in the same memory
    client.quit()
    assert not processes_in(world.slot)
    assert world.vm_process() is None
    assert 'VMState="saved"' in world.manage("showvminfo", vm_name(world), "--machinereadable")
    assert not (world.slot / "boinc_finish_called").exists()
    client.start()
    assert world.counts() > last

    # kill -9 of the wrapper: HostMain saves, the client starts the wrapper again
    last = world.lines()[-1].memory
    wrapper = wrapper_of(world.slot)
    wrapper.kill()
    wait_gone(wrapper, 10)
    world.wait(lambda: (wrapper_there(world.slot) or wrapper.pid) != wrapper.pid, "another wrapper", 60)
    world.wait(lambda: world.lines()[-1].memory > last + 3, "it goes on", START_LIMIT_S)
    assert boots(world) == 1, "all the time the same memory"

    # kill -9 of the VM: there is no snapshot, so it is made anew
    vm = world.vm_process()
    assert vm is not None
    vm.kill()
    world.wait(lambda: boots(world) == 2, "booted anew", START_LIMIT_S)
    assert all(line.consistent for line in world.lines())

    client.abort("one")
    world.wait(lambda: client.result("one").state == boinc_client.RESULT_ABORTED, "aborted")
    world.wait(lambda: not client.result("one").is_running, "ended", 60)
    assert not processes_in(world.slot)
    assert world.vm_process() is None
    assert world.manage("list", "vms") == ""
    assert "UUID" not in world.manage("list", "hdds")


def reported(slot: Path) -> str:
    """The wrapper's last report in shared memory."""
    return channels.Channels(bytearray((slot / "boinc_mmap_file").read_bytes())).text(channels.Channel.APP_STATUS)


def boots(world: World) -> int:
    return sum(1 for line in world.lines() if line.memory == 0)


def vm_name(world: World) -> str:
    return world.manage("list", "vms").split('"')[1]


def wrapper_there(slot: Path) -> int:
    try:
        return wrapper_of(slot).pid
    except AssertionError:
        return 0
