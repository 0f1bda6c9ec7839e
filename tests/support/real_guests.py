"""HostMain with real virtual machines: the guest image in QEMU, driven by XML-RPC as the wrapper does."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guest.image import build, tools
from guest.image.cache import guest_image
from tests.support.hostmains import RunningHost

CACHE = Path(__file__).parents[2] / ".cache" / "guest-image"
CONFIG = "[Broker]\ntype = embedded\n[Host]\nvm_gc_grace = 30\n[Hypervisor]\nhypervisor = QEMU\n"
BOOT_LIMIT_S = 120.0
"""Of an emulated guest on a laden computer."""


def real_image(options: build.Options | None = None) -> Path:
    """The guest image; skips the test, with the reason, where it cannot be made."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is missing (Debian package qemu-system-x86)")
    try:
        tools.check_tools()
    except tools.BuildError as error:
        pytest.skip(str(error))
    return guest_image(CACHE, options)


class RealHost(RunningHost):
    """HostMain, its client, and VMs from the guest image."""

    _commands = 0

    def define(self, name: str, image: Path, **settings: object) -> None:
        """Make a VM and start it; it need not be up when this returns."""
        assert self.api.defineVM(name, str(image), {"memory_mb": 256, **settings}) is True
        assert self.api.start(name) is True

    def wait_up(self, name: str) -> None:
        assert self.api.waitGuest(name, BOOT_LIMIT_S) is True, self.log()

    def run(self, name: str, command: str, *arguments: str, limit_s: float = 120.0) -> dict[str, Any]:
        """Run a program in the guest to its end; its result, with `output`, what it wrote to standard output."""
        self._commands += 1
        id = f"test_{self._commands}"
        self.api.runCommand(name, {"id": id, "command": command, "arguments": list(arguments)})
        result = self.finished(id, name, limit_s)["result"]
        self.api.getFile(name, result["stdout_path"], f"{id}.out")
        result["output"] = (self.slot / f"{id}.out").read_text()
        self.api.acknowledgeResult(name, id)
        return dict(result)

    def python(self, name: str, script: str, *arguments: object, limit_s: float = 120.0) -> Any:
        """Run a Python program in the guest; what it printed, as JSON. Arguments come as JSON too."""
        result = self.run(name, "python3", "-c", script, *map(json.dumps, arguments), limit_s=limit_s)
        assert result["exit_status"] == 0, result
        return json.loads(result["output"])


@contextlib.contextmanager
def real_hostmain(slot: Path, config: str = CONFIG) -> Iterator[RealHost]:
    slot.mkdir(parents=True, exist_ok=True)
    host = RealHost(slot, config, program="vmcontrol.hostmain")
    try:
        host.ready()
        yield host
    finally:
        with contextlib.suppress(Exception):
            for name in host.api.listAvailableVMs():
                host.api.deleteVM(name)
        host.close()
