"""QEMU's argument list for a VM. Pure: a definition in, arguments out.

Why each is there: docs/internals/drivers/qemu.md.

The devices of a VM decide whether a saved state or snapshot fits it, so what is built here depends on the definition
alone, never on the computer's mood.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vmcontrol.hypervisors.common.spec import neighbour
from vmcontrol.hypervisors.qemu.files import Definition, VmFiles
from vmcontrol.protocol.vm import PortForward

QMP_FD, CONSOLE_FD = 3, 4
"""The inherited ends of our socket pair and of our pipe. No file, no port: nobody else can reach the monitor."""
IMAGE, OVERLAY, DISK, AGENT_NETWORK, GRANTED_NETWORK = "image", "overlay", "disk", "agent", "granted"
"""QEMU's names of block node and network backends."""
HOST_ONLY_NETWORK = "net=192.168.56.0/24,host=192.168.56.1,dhcpstart=192.168.56.101"
"""VirtualBox's usual addresses of a host-only network."""
MIGRATION_BLOCKED_BY = frozenset({"vdi"})
"""Formats in whose presence QEMU refuses to write a machine's state ("does not support live migration")."""
LATEST_MACHINE = "q35"
"""An alias; a VM keeps the versioned name that it stood for when the VM was first started."""

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""seccomp: a guest that breaks out of QEMU still cannot start programs or gain rights."""


@dataclass(frozen=True, slots=True)
class Accelerator:
    """name: QEMU's (kvm, hvf, whpx, tcg). cpu: the model that goes with it."""

    name: str
    cpu: str

    @property
    def hardware(self) -> bool:
        return self.name != "tcg"

    @property
    def argv(self) -> list[str]:
        # 1 GiB of translated code is QEMU's default for tcg, and counts as the task's memory
        return ["-accel", "tcg,tb-size=256" if self.name == "tcg" else self.name, "-cpu", self.cpu]


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything of a VM that QEMU's arguments depend on."""

    definition: Definition
    overlay: Path
    image: Path
    disks: tuple[Path, ...] = ()
    secret_file: Path | None = None
    sandbox: bool = True

    @classmethod
    def of(cls, definition: Definition, files: VmFiles) -> Machine:
        """With the files where they are now."""
        secret = definition.secret_file
        return cls(
            definition,
            files.overlay,
            files.path(definition.image),
            tuple(files.path(disk.path) for disk in definition.disks),
            None if secret is None else files.path(secret),
        )


def arguments(qemu: str, machine: Machine, accelerator: Accelerator, *, incoming: bool) -> list[str]:
    """The arguments that start this VM, stopped before its first instruction. incoming: it waits for a saved state."""
    vm = machine.definition
    argv = [
        qemu,
        *("-name", escaped(vm.name)),
        *("-nodefaults", "-no-user-config"),
        *("-machine", f"{vm.machine or LATEST_MACHINE},graphics=off,vmport=off,smm=off,sata=off,usb=off"),
        *accelerator.argv,
        *("-smp", str(vm.cpus)),
        *("-m", f"{vm.memory_mb}M"),
        *("-display", "none", "-vga", "none"),
        *("-rtc", "base=utc,clock=host"),
        *("-boot", "menu=off,strict=on"),
        *("-S",),
        *("-chardev", f"socket,id=qmp,fd={QMP_FD}", "-mon", "chardev=qmp,mode=control"),
        *("-add-fd", f"fd={CONSOLE_FD},set=1"),
        *("-chardev", "file,id=console,path=/dev/fdset/1,append=on", "-serial", "chardev:console"),
        *("-object", "rng-builtin,id=random", "-device", "virtio-rng-pci,rng=random"),
        *("-blockdev", json.dumps(image_node(machine))),
        *("-blockdev", json.dumps({"driver": "file", "node-name": OVERLAY, "filename": str(machine.overlay)})),
        *("-blockdev", json.dumps(disk_node(IMAGE))),
        *("-device", f"virtio-blk-pci,drive={DISK},bootindex=0,werror=stop"),
        *_networks(vm),
        *_further_disks(machine),
        *_smbios(machine),
    ]
    if machine.sandbox:
        argv += ["-sandbox", SANDBOX]
    if incoming:
        argv += ["-incoming", "defer"]
    return argv


def image_node(machine: Machine) -> dict[str, object]:
    """The project's image as a block node, read-only; also for blockdev-add."""
    return {
        "driver": machine.definition.image_format,  # named, never guessed: a guest may write any header into a raw disk
        "node-name": IMAGE,
        "read-only": True,
        "file": {"driver": "file", "filename": str(machine.image), "read-only": True},
    }


def _further_disks(machine: Machine) -> list[str]:
    """Read-only disks, after all other devices, so that the system's disk is the first for firmware and guest.

    SeaBIOS boots from the first alone; bootindex only makes it know the others, as VirtualBox's firmware does.
    """
    argv: list[str] = []
    for number, (path, layout) in enumerate(zip(machine.disks, machine.definition.disk_layouts, strict=True)):
        part = {"offset": layout.offset, "size": layout.size} if layout.size else {}
        node = {
            "driver": layout.format,
            "node-name": f"further{number}",
            "read-only": True,
            "file": {"driver": "file", "filename": str(path), "read-only": True},
            **part,
        }
        argv += [
            "-blockdev",
            json.dumps(node),
            "-device",
            f"virtio-blk-pci,drive=further{number},bootindex={1 + number}",
        ]
    return argv


def disk_node(backing: str | None) -> dict[str, object]:
    """The guest's disk as a block node; also for blockdev-reopen, with another backing node or none."""
    return {
        "driver": "qcow2",
        "node-name": DISK,
        "discard": "unmap",  # what a deleted snapshot held goes back to the file system
        "file": OVERLAY,
        "backing": backing,
    }


def _networks(vm: Definition) -> list[str]:
    """NIC 1 leads to the agent and nowhere else. NIC 2, if granted, is the network; its link can be pulled.

    host_only, the original's layout: NIC 1 is NAT, there in any case, and NIC 2 leads to the agent. A real host-only
    network (a tap) needs root; what stands in for it has its usual addresses and lets nothing out.
    """
    rules = "".join(f",hostfwd={_rule(forward)}" for forward in forwards_of(vm))
    if vm.host_only:
        agent = _card(AGENT_NETWORK, f"{HOST_ONLY_NETWORK},ipv6=off,restrict=on{rules}", vm.mac)
        closed = "" if vm.network else ",restrict=on"
        nat = _card(GRANTED_NETWORK, f"net=10.0.2.0/24,ipv6=off{closed}", second_mac(vm.mac))
        return [*nat, *agent]
    argv = _card(AGENT_NETWORK, f"net=10.0.2.0/24,ipv6=off,restrict=on{rules}", vm.mac)
    if vm.network:
        argv += _card(GRANTED_NETWORK, "net=10.0.3.0/24,ipv6=off", second_mac(vm.mac))
    return argv


def _card(network: str, settings: str, mac: str) -> list[str]:
    return [
        *("-netdev", f"user,id={network},{settings}"),
        *("-device", f"virtio-net-pci,netdev={network},mac={mac.lower()},romfile="),
    ]


def forwards_of(vm: Definition) -> list[PortForward]:
    """All forwards to NIC 1: the agent's first."""
    agent = [PortForward(vm.agent_port)] if vm.agent_port else []
    return [*agent, *vm.port_forwards]


def open_forward(forward: PortForward) -> str:
    """The monitor's line that begins it; it answers nothing, or why not."""
    return f"hostfwd_add {AGENT_NETWORK} {_rule(forward)}"


def close_forward(forward: PortForward) -> str:
    """The monitor's line that ends it: who is connected stays so."""
    return f"hostfwd_remove {AGENT_NETWORK} {_rule(forward).partition('-')[0]}"


def _rule(forward: PortForward) -> str:
    address = "" if forward.remote else "127.0.0.1"  # empty: all of the host's
    return f"tcp:{address}:{forward.host_port}-:{forward.guest_port}"


def _smbios(machine: Machine) -> list[str]:
    # The id goes as text, the secret as the path of a 0600 file: an argument list is open to every user.
    text = f"type=11,value=interface={machine.definition.mac}"
    if machine.secret_file is not None:
        text += f",path={escaped(machine.secret_file)}"
    return ["-smbios", text]


def second_mac(mac: str) -> str:
    """MAC of the other NIC."""
    return neighbour(mac, 3)


def escaped(text: str | Path) -> str:
    """A value in one of QEMU's comma separated options."""
    return str(text).replace(",", ",,")
