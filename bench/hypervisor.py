"""How long a driver takes for each step of a VM's life: `python -m bench.hypervisor [--image IMAGE --ready TEXT]`.

Without --image the guest is the boot sector of the tests, so that the figures are the driver's and QEMU's own. With
the guest image, `--ready` is a text on its console that tells that it is up. Medians of --rounds rounds, in seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Awaitable
from pathlib import Path

from twisted.python.failure import Failure

from tests.support import tiny_guest
from vmcontrol.common.eventloop import sleep, start, the_reactor, with_limit
from vmcontrol.hypervisors.choose import open_hypervisor
from vmcontrol.hypervisors.interface import Hypervisor, VmSpec


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.image = options.image or tiny_guest.make_image(folder / "guest.vdi", "vdi")
        self.ready = options.ready.encode() if options.image else b"C00000001"
        self.times: dict[str, list[float]] = {}
        self.sizes: dict[str, list[float]] = {}

    async def run(self) -> None:
        hypervisor = await open_hypervisor(self.options.hypervisor, the_reactor(), self.folder / "vm")
        begin = the_reactor().seconds()
        probe = await hypervisor.probe()
        print(f"{hypervisor.name} {probe.version}: {probe.detail} (probe {the_reactor().seconds() - begin:.2f} s)")
        for number in range(self.options.rounds):
            await self.round(hypervisor, f"bench{number}")
        await hypervisor.close()
        for step, values in self.times.items():
            print(f"{step:<44} {statistics.median(values):8.3f} s   (worst {max(values):.3f})")
        for what, values in self.sizes.items():
            print(f"{what:<44} {statistics.median(values) / 1e6:8.1f} MB")

    async def round(self, hypervisor: Hypervisor, name: str) -> None:
        log = self.folder / f"{name}.log"
        spec = VmSpec(
            name,
            self.image,
            self.folder / "vm" / name,
            memory_mb=self.options.memory,
            console_log=log,
            agent_port=4616,
        )
        seconds = the_reactor().seconds
        try:
            await self.time("create", hypervisor.create(spec))
            begin = seconds()
            await self.time("start, until it runs", hypervisor.start(name))
            await self.printed(log, self.ready)
            self.note("start, until the guest is ready", seconds() - begin)
            await self.time("pause", hypervisor.pause(name))
            await self.time("unpause", hypervisor.unpause(name))
            before = (await hypervisor.performance(name))["disk_bytes"]
            await self.time("snapshot (the guest stands for that time)", hypervisor.save_snapshot(name, "one"))
            after = await hypervisor.performance(name)
            self.size("snapshot", after["disk_bytes"] - before)
            self.size("memory of the VM process", after["memory_bytes"])
            await self.time("second snapshot", hypervisor.save_snapshot(name, "two"))
            await self.time("delete a snapshot", hypervisor.delete_snapshot(name, "one"))
            before = (await hypervisor.performance(name))["disk_bytes"]
            await self.time("save the state, until all is durable", hypervisor.save_state(name))
            self.size("saved state", (await hypervisor.performance(name))["disk_bytes"] - before)
            await self.time("start from the saved state", hypervisor.start(name))
            await self.time("power off", hypervisor.power_off(name))
            await self.time("go back to the snapshot", hypervisor.restore_snapshot(name, "two"))
            await self.time("start from the snapshot", hypervisor.start(name))
        finally:
            await self.time("delete, running", hypervisor.delete(name))

    async def time(self, step: str, work: Awaitable[None]) -> None:
        begin = the_reactor().seconds()
        await work
        self.note(step, the_reactor().seconds() - begin)

    def note(self, step: str, value: float) -> None:
        self.times.setdefault(step, []).append(value)

    def size(self, what: str, value: float) -> None:
        self.sizes.setdefault(what, []).append(value)

    @staticmethod
    async def printed(log: Path, text: bytes) -> None:
        async def look() -> None:
            while not log.exists() or text not in log.read_bytes():
                await sleep(the_reactor(), 0.01)

        await with_limit(the_reactor(), 120, f"the text {text!r} on the console", look())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.hypervisor", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--hypervisor", default="QEMU")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--ready", default="agent: listening", help="text on the console of --image")
    parser.add_argument("--memory", type=int, default=256, help="MiB")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    failed: list[Failure] = []

    def failure(reason: Failure) -> None:
        failed.append(reason)
        reason.printTraceback(sys.stderr)

    with tempfile.TemporaryDirectory(prefix="vmwrapper-bench-") as folder:
        done = start(Bench(options, Path(folder)).run())
        done.addErrback(failure)
        done.addBoth(lambda _: the_reactor().stop())
        the_reactor().run()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
