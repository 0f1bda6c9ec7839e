"""The network cards of 2009 in a real guest: the first is NAT, the second is its identity and leads to the agent."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from guest.image import build
from guest.image.cache import guest_image
from tests.support.hostmains import RunningHost

CACHE = Path(__file__).parents[4] / ".cache" / "guest-image"
CONFIG = "[Broker]\ntype = embedded\n[Hypervisor]\nhypervisor = QEMU\n"
BOOT_LIMIT_S = 250.0

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]


def test_the_layout_of_2009(tmp_path: Path) -> None:
    try:
        image = guest_image(CACHE)
    except build.FAILURES as error:
        pytest.skip(f"no guest image: {error}")
    host = RunningHost(tmp_path, CONFIG, program="vmcontrol.hostmain")
    try:
        host.ready()
        settings = {"memory_mb": 256, "network": True, "network_mode": "hostonly"}
        assert host.api.defineVM("vm", str(image), settings) is True
        assert host.api.start("vm") is True
        assert host.api.waitGuest("vm", BOOT_LIMIT_S) is True, host.log()
        (guest,) = host.api.getStatus()["guests"]
        assert guest["id"] == host.api.getVMInfo("vm")["id"] == host.api.getNamesToIdsMapping()["vm"]
        script = "cat /sys/class/net/eth0/address /sys/class/net/eth1/address"
        host.api.runCommand("vm", {"id": "c1", "command": "/bin/sh", "arguments": ["-c", script]})
        result = host.finished("c1")["result"]
        host.api.getFile("vm", result["stdout_path"], "cards")
        first, second = (tmp_path / "cards").read_text().upper().split()
        assert second == guest["id"]
        assert first != second
        host.api.deleteVM("vm")
    finally:
        host.close()
