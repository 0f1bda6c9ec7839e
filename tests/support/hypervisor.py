"""A hypervisor in memory, for tests of HostMain: its "VMs" are real agents (VMMain) as processes on this computer.

Pause is SIGSTOP, so paused and saved agents keep their memory as guests do; power off is SIGKILL. Everything that is
asked is noted in `calls`, one line each, in a file of the slot that the test reads.

As a program: HostMain with this hypervisor: `python -m tests.support.hypervisor HostConfig.cfg`.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import ProcessProtocol

from tests.support.agenthost import GUEST_ID
from tests.support.brokers import free_port
from vmcontrol.common import eventloop, launch
from vmcontrol.hostmain import main as hostmain
from vmcontrol.hypervisors.interface import (
    Capabilities,
    HostProblem,
    Hypervisor,
    Probe,
    StateListener,
    VmExists,
    VmNotFound,
    VmSpec,
    WrongState,
)
from vmcontrol.protocol.vm import LIVE_STATES, VmInfo, VmState
from vmcontrol.transfer.chirp import CHIRP_PORT

CALLS = "hypervisor_calls.txt"
OTHER_ID = os.environ.get("FAKE_SILENT_ID", "02:00:00:00:00:07")
"""Of VMs without a real agent."""


@dataclass
class _Vm:
    spec: VmSpec
    state: VmState = VmState.POWERED_OFF
    address: tuple[str, int] | None = None
    process: Any = None
    ended: Deferred[None] | None = None
    chirp_port: int = 0
    snapshots: list[str] = field(default_factory=list)


class _Agent(ProcessProtocol):
    def __init__(self, hypervisor: FakeHypervisor, vm: _Vm) -> None:
        self._hypervisor = hypervisor
        self._vm = vm

    def processEnded(self, reason: object) -> None:
        self._vm.process = None
        if self._vm.ended is not None:
            self._vm.ended.callback(None)
        elif self._vm.state in LIVE_STATES:
            self._hypervisor.change(self._vm, VmState.ABORTED)


class FakeHypervisor:
    """By its image's name: `fault...` cannot be used, `mute...` has no agent, `mute-slow...` takes its time to save,
    `direct...` has no port forwards."""

    name = "Fake"
    capabilities = Capabilities(cpu_cap=True, vm_is_descendant=True)

    def __init__(self, reactor: Any, folder: Path) -> None:
        self._reactor = reactor
        self._slot = folder.parent
        self._vms: dict[str, _Vm] = {}
        if there := os.environ.get("FAKE_EXISTING"):
            self._vms[there] = _Vm(VmSpec(there, image=Path("mute.img"), folder=folder / there))
        self._listeners: list[StateListener] = []

    def missing(self) -> str:
        return ""

    async def probe(self) -> Probe:
        return Probe(True, "1", "made of processes")

    async def max_cpus(self) -> int:
        return 8

    async def create(self, spec: VmSpec) -> None:
        self._note(f"create {spec.name} {spec.memory_mb} {spec.cpus} {spec.network} {list(spec.port_forwards)}")
        if spec.image.name.startswith("fault"):
            raise HostProblem("no room for the disk; free 1 GB", key="disk-full", delay_s=600)
        if spec.name in self._vms:
            raise VmExists(f"{spec.name} is there")
        shutil.rmtree(spec.folder, ignore_errors=True)  # a killed HostMain's
        spec.folder.mkdir(parents=True)
        self._vms[spec.name] = _Vm(spec)

    async def start(self, name: str) -> None:
        vm = self._vm(name)
        if vm.state in LIVE_STATES:
            raise WrongState(f"{name} is {vm.state}")
        self._note(f"start {name} from {vm.state}")
        if vm.process is None and not vm.spec.image.name.startswith("mute"):
            self._spawn(vm)
        elif vm.process is not None:
            vm.process.signalProcess(signal.SIGCONT)
        self.change(vm, VmState.RUNNING)

    def _spawn(self, vm: _Vm) -> None:
        home = vm.spec.folder / "home"
        home.mkdir(exist_ok=True)
        vm.address = ("127.0.0.1", free_port())
        config = vm.spec.folder / "VMConfig.cfg"
        config.write_text(
            f"[VM]\nnetwork_interface = lo\nbeacon_interval = 1\ndir_to_serve = {home}\nlisten_on = 127.0.0.1\n"
            f"listen_port = {vm.address[1]}\nstomp_port = {free_port()}\nsecret_file = {vm.spec.secret_file}\n"
            + self._chirp(vm, home)
        )
        command, more = launch.command([sys.executable, "-m", "guest.agent", str(config)])
        log = os.open(self._slot / "agent.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        environment = {**os.environ, **more, "PYTHONPATH": str(Path(launch.__file__).parents[2])}
        vm.process = self._reactor.spawnProcess(
            _Agent(self, vm), command[0], command, environment, str(home), childFDs={0: 0, 1: log, 2: log}
        )
        os.close(log)

    def _chirp(self, vm: _Vm, home: Path) -> str:
        """Where the VM's Chirp port is forwarded, and what the agent is told of it."""
        if CHIRP_PORT not in (forward.guest_port for forward in vm.spec.port_forwards):
            return "chirp_server = none\n"
        vm.chirp_port = CHIRP_PORT if vm.spec.image.name.startswith("direct") else free_port()
        if os.geteuid() == 0:  # its server never runs as root
            shutil.chown(home, "nobody")
            vm.spec.folder.parent.chmod(0o711)  # HostMain has made it for its owner alone, and this guest lives here
        return f"chirp_port = {vm.chirp_port}\nchirp_hosts = 127.0.0.1\n"

    async def pause(self, name: str) -> None:
        vm = self._live(name)
        if vm.process is not None:
            vm.process.signalProcess("STOP")
        self.change(vm, VmState.PAUSED)

    async def unpause(self, name: str) -> None:
        vm = self._live(name)
        if vm.process is not None:
            vm.process.signalProcess(signal.SIGCONT)
        self.change(vm, VmState.RUNNING)

    async def save_state(self, name: str) -> None:
        vm = self._live(name)
        self._note(f"save {name}")
        if vm.spec.image.name.startswith("mute-slow"):
            self.change(vm, VmState.SAVING)
            await eventloop.sleep(self._reactor, 1.0)
            self._note(f"saved {name}")
        if vm.process is not None:
            vm.process.signalProcess("STOP")
        self.change(vm, VmState.SAVED)

    async def power_off(self, name: str, *, acpi_grace_s: float = 0.0) -> None:
        vm = self._vm(name)
        self._note(f"power off {name}")
        if vm.process is not None:
            vm.ended = Deferred()
            vm.process.signalProcess("KILL")
            await vm.ended
            vm.ended = None
        if vm.state is not VmState.POWERED_OFF:
            self.change(vm, VmState.POWERED_OFF)

    async def state(self, name: str) -> VmState:
        return self._vm(name).state

    async def info(self, name: str) -> VmInfo:
        vm = self._vm(name)
        live = vm.state in LIVE_STATES
        return VmInfo(
            name=name,
            state=vm.state,
            mac=OTHER_ID if vm.spec.image.name.startswith("mute") else GUEST_ID,
            image=vm.spec.image,
            current_snapshot=vm.snapshots[-1] if vm.snapshots else None,
            pid=vm.process.pid if vm.process is not None else None,
            agent_address=vm.address if live else None,
            forwards={
                f.guest_port: vm.chirp_port if f.guest_port == CHIRP_PORT else f.host_port or 4711
                for f in vm.spec.port_forwards
                if vm.chirp_port != CHIRP_PORT
            },
        )

    async def list_vms(self) -> list[str]:
        return list(self._vms)

    async def list_running(self) -> list[str]:
        return [name for name, vm in self._vms.items() if vm.state in LIVE_STATES]

    async def save_snapshot(self, name: str, snapshot: str, description: str = "") -> None:
        self._vm(name).snapshots.append(snapshot)

    async def restore_snapshot(self, name: str, snapshot: str | None = None) -> None:
        vm = self._vm(name)
        if vm.state in LIVE_STATES:
            raise WrongState(f"{name} is {vm.state}")
        self._note(f"restore {name} {snapshot}")

    async def delete_snapshot(self, name: str, snapshot: str) -> None:
        vm = self._vm(name)
        vm.snapshots = [s for s in vm.snapshots if s != snapshot]

    async def list_snapshots(self, name: str) -> list[str]:
        return list(self._vm(name).snapshots)

    async def performance(self, name: str) -> dict[str, float]:
        self._vm(name)
        return {"cpu_time_s": 1.5, "memory_bytes": 3e9, "disk_bytes": 0.0}

    async def set_network(self, name: str, connected: bool) -> None:
        self._vm(name)
        self._note(f"network {name} {connected}")

    async def set_cpu_cap(self, name: str, percent: int) -> None:
        self._vm(name)
        self._note(f"cap {name} {percent}")

    async def take(self, name: str) -> None:
        self._note(f"take {name} {self._vm(name).state}")

    async def delete(self, name: str) -> None:
        if name in self._vms:
            await self.power_off(name)
            del self._vms[name]

    async def release(self, name: str) -> None:
        self._vm(name)
        self._note(f"release {name}")

    def on_state_change(self, listener: StateListener) -> None:
        self._listeners.append(listener)

    async def close(self) -> None:
        for vm in self._vms.values():
            if vm.process is not None:
                vm.state = VmState.POWERED_OFF
                vm.process.signalProcess("KILL")
        self._note("closed")

    def change(self, vm: _Vm, state: VmState) -> None:
        vm.state = state
        for listener in self._listeners:
            listener(vm.spec.name, state)

    def _vm(self, name: str) -> _Vm:
        if name not in self._vms:
            raise VmNotFound(name)
        return self._vms[name]

    def _live(self, name: str) -> _Vm:
        vm = self._vm(name)
        if vm.state not in LIVE_STATES:
            raise WrongState(f"{name} is {vm.state}")
        return vm

    def _note(self, text: str) -> None:
        with (self._slot / CALLS).open("a") as file:
            file.write(text + "\n")


async def open_fake(kind: str, reactor: Any, folder: Path) -> Hypervisor:
    """In place of choose.open_hypervisor."""
    return FakeHypervisor(reactor, folder)


def main(environment: Mapping[str, str] = os.environ) -> int:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    return hostmain.main(sys.argv[1:], environment, open_hypervisor=open_fake)


if __name__ == "__main__":
    sys.exit(main())
