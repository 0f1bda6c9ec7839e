"""The wrapper with VMs of VirtualBox: whose the processes are. The guest has no agent, so no task gets to run in it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support import tiny_guest
from tests.support.slots import HOST_MAIN_TASK, TestSlot
from tests.support.virtualbox_world import the_lab
from tests.virtualbox.lab import end_marked
from vmwrapper.process.orphans import SHARED

pytestmark = pytest.mark.virtualbox

WRAPPER = [sys.executable, "-m", "vmwrapper"]
CONFIG = "[Broker]\ntype = embedded\nport = 0\n[Host]\nxmlrpc_port = 0\n[Hypervisor]\nhypervisor = virtualbox\n"
TASK = (
    "<task><virtualmachine>vm</virtualmachine><image>guest.vdi</image><memory_size_mb>32</memory_size_mb>"
    "<application>true</application><app_pathVM>/bin</app_pathVM></task>"
)


HOST_TASK = "<task><application>true</application></task>"
BROKER = "<VMmanage_task><application>sleep</application><command_line>1000</command_line></VMmanage_task>"


@pytest.fixture(params=[(TASK,), (BROKER, HOST_TASK, TASK, HOST_TASK)], ids=["alone", "with programs on the host"])
def slot(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TestSlot]:
    (tmp_path / "slot").mkdir()
    slot = TestSlot(tmp_path / "slot")
    slot.write("HostConfig.cfg", CONFIG)
    slot.job(HOST_MAIN_TASK, *request.param)
    tiny_guest.make_image(slot.folder / "guest.vdi", "vdi")
    yield slot
    slot.clean()


def test_virtualboxs_service_and_its_vms_are_not_the_tasks(slot: TestSlot, tmp_path: Path) -> None:
    """The client kills the descendants of a task that has quit, and counts what they use as the task's."""
    here = the_lab()
    with here.home(tmp_path / "home") as environment:
        names = ("VBOX_USER_HOME", "VBOX_IPC_SOCKETID", "HOME", "LOGNAME", "USER")
        variables = {name: environment[name] for name in names} | {"VMWRAPPER_VBOXMANAGE": str(here.vboxmanage)}
        for resumed in (False, True):
            end_marked(environment["VBOX_IPC_SOCKETID"])  # the service has to be started for the job
            wrapper = slot.start("job.xml", program=WRAPPER, **variables)
            slot.wait_for("stderr.txt", "its saved state is resumed" if resumed else "is made from guest.vdi")
            slot.wait_for("stderr_HostMain", ": Running" if not resumed else ": Restoring")
            slot.wait_for("guest_console.log", "=")
            ours = psutil.Process(wrapper.pid).children(recursive=True)
            assert "python" in " ".join(one.name() for one in ours), "HostMain is"
            assert not [one for one in ours if one.name() in SHARED]
            wrapper.send_signal(signal.SIGTERM)
            assert wrapper.wait(60) == -signal.SIGTERM, slot.text("stderr.txt")
            assert " is saved" in slot.text("stderr.txt")
            assert "hypervisor: VirtualBox, as the configuration says" in slot.text("stderr.txt")
        slot.assert_nothing_runs()
