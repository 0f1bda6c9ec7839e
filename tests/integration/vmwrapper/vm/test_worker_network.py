"""A granted network that the client suspends and allows again, on a real guest: lost and regained, the program goes on.

BOINC 7.20 itself never says `network_suspended` to its applications (a fault of its client), so the client is played.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.guest.image.test_guest_isolation import Listener, own_addresses
from tests.support.client_vm import HOST_CONFIG, executions
from tests.support.limits import after
from tests.support.slots import HOST_MAIN_TASK, PlayedClient, TestSlot
from vmwrapper.boinc.channels import Channel

ROOT = Path(__file__).parents[4]
WRAPPER = [sys.executable, "-m", "vmwrapper"]
BOOT_LIMIT_S = 240

PROGRAM = b"""\
#!/usr/bin/env python3
'''usage: caller.py ADDRESS PORT: connects again and again.'''
import socket, sys, time
while True:
    try:
        socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1).close()
    except OSError as error:
        print(error, flush=True)
    time.sleep(0.2)
"""

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="package qemu-system-x86 is not installed"),
    pytest.mark.skipif(not own_addresses(), reason="this computer has no network that a guest could reach"),
]


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[TestSlot]:
    from guest.image.cache import guest_image

    slot = TestSlot(tmp_path)
    slot.write("HostConfig.cfg", HOST_CONFIG.decode())
    slot.write("caller.py", PROGRAM.decode(), executable=True)
    slot.write("guest.vdi", f"<soft_link>{guest_image(ROOT / '.cache' / 'guest-image')}</soft_link>\n")
    yield slot
    slot.clean()


@pytest.fixture
def outside() -> Iterator[Listener]:
    listener = Listener(own_addresses()[0])
    yield listener
    listener.close()


def test_the_guest_loses_and_regains_its_network_and_goes_on(slot: TestSlot, outside: Listener) -> None:
    client = PlayedClient(slot)
    slot.job(
        HOST_MAIN_TASK,
        "<task><virtualmachine>one</virtualmachine><image>guest.vdi</image><hypervisor>qemu</hypervisor>"
        "<memory_size_mb>128</memory_size_mb><application>caller.py</application><copy_app_to_VM>1</copy_app_to_VM>"
        f"<command_line>{outside.address} {outside.port}</command_line><enable_network>1</enable_network></task>",
    )
    with (slot.folder / "stderr.txt").open("wb") as stderr:
        process = slot.start(program=WRAPPER, stderr=stderr)

    def calls_come(limit_s: float) -> bool:
        before, end = len(outside.came), time.monotonic() + limit_s
        while len(outside.came) == before:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    assert calls_come(BOOT_LIMIT_S), slot.text("stderr.txt")
    client.say("<heartbeat/><network_suspended/>", Channel.HEARTBEAT)
    slot.wait_for("stderr.txt", "network pulled")
    end = after(20)
    while calls_come(3):  # one may have been under way
        assert time.monotonic() < end, "the guest still reaches the network"
    # Nothing else changes: it is still paused and resumed.
    client.say("<suspend/>")
    slot.wait_for("stderr_HostMain", "Paused")
    client.say("<resume/>")
    client.say("<heartbeat/>", Channel.HEARTBEAT)
    slot.wait_for("stderr.txt", "network plugged in")
    assert calls_come(30), slot.text("stderr.txt")
    assert process.poll() is None
    assert executions(slot.text("guest_console.log")) == [("0", 1)], "without a restart"
    assert "rollback" not in slot.text("stderr.txt")
    client.say("<abort/>")
    assert process.wait(30) == 194
