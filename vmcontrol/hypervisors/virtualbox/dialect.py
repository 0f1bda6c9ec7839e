"""What differs between VirtualBox 6.1, 7.0, 7.1 and 7.2: option names, and options that are not there. Pure.

The only place that asks for the version. Run by us: 7.2. The others are from the manuals of 6.1 (chapter 8) and 7.0 and
7.1 (VBoxManage reference): 7.0 put hyphens into option names and split --audio, 7.0 closed the host's loopback to NAT
guests, 7.1 renamed --bios-... to --firmware-... and removed what only it had called hpet and pae.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmcontrol.hypervisors.common.spec import neighbour
from vmcontrol.hypervisors.virtualbox.output import Version
from vmcontrol.protocol import vmlimits
from vmcontrol.protocol.vm import VmSettings

OLDEST = Version(6, 1, 0)


@dataclass(frozen=True, slots=True)
class Hardware:
    """The virtual computer: what is asked for, and what this computer gives it."""

    settings: VmSettings
    mac: str
    """Of the NIC that is the guest's id."""
    rules: Sequence[str]
    """Port forwards, as VirtualBox writes them (HostForward.rule)."""
    serial_log: Path
    description: str = ""
    host_only_adapter: str | None = None
    """The original's layout: NIC 1 NAT, NIC 2 on this adapter, with the MAC."""
    remote_desktop_port: int = 0


def agent_nic(*, host_only: bool, network: bool) -> int:
    """Number of the NIC that carries the port forwards, the agent's among them: NAT without a way out, but where the
    original's layout wants NIC 1 to be the granted network. The guest has 10.0.2.15 there, or 10.0.4.15 on NIC 3."""
    return 3 if host_only and network else 1


class Dialect:
    """How one version of VBoxManage wants to be spoken to."""

    def __init__(self, version: Version) -> None:
        self.version = version

    @property
    def supported(self) -> bool:
        return self.version >= OLDEST

    @property
    def max_cpus(self) -> int:
        """How many processors a VM can have, as far as known."""
        return vmlimits.VIRTUALBOX_CPUS if self.version.major >= 7 else vmlimits.VIRTUALBOX_CPUS_BEFORE_7

    def option(self, name: str, number: int | None = None) -> str:
        """An option of modifyvm by its name in 7.0, in this version's spelling. number: of the NIC or port."""
        if self.version.major < 7:
            name = name.replace("-", "")
        elif self.version >= Version(7, 1) and name.startswith("bios-"):
            name = f"firmware-{name.removeprefix('bios-')}"
        return f"--{name}{'' if number is None else number}"

    def create(self, name: str, uuid: str, os_type: str, folder: Path) -> list[str]:
        """createvm; its folder is made below `folder`."""
        argv = ["createvm", "--name", name, "--uuid", uuid, "--ostype", os_type, "--basefolder", str(folder)]
        return [*argv, "--register"]

    def hardware(self, uuid: str, hardware: Hardware) -> list[str]:
        """modifyvm with everything at once."""
        option, settings = self.option, hardware.settings
        argv = [
            *("modifyvm", uuid, "--description", hardware.description),
            *(
                "--memory",
                str(settings.memory_mb),
                "--cpus",
                str(settings.cpus),
                "--vram",
                "16",
                "--ioapic",
                "on",
            ),
            *("--acpi", "on", option("rtc-use-utc"), "on", option("default-frontend"), "headless"),
            *("--boot1", "disk", "--boot2", "none", "--boot3", "none", "--boot4", "none"),
            *(option("bios-boot-menu"), "disabled", option("bios-logo-display-time"), "0"),
            *(option("bios-logo-fade-in"), "off", option("bios-logo-fade-out"), "off"),
            *self._no_audio(),
            *("--clipboard-mode", "disabled", option("drag-and-drop"), "disabled", *self._no_usb()),
            *("--uart1", "0x3f8", "4", option("uart-mode", 1), "file", str(hardware.serial_log)),
            *self._networks(hardware),
        ]
        if hardware.remote_desktop_port:
            argv += ["--vrde", "on", option("vrde-address"), "127.0.0.1"]
            argv += [option("vrde-port"), str(hardware.remote_desktop_port)]
        else:
            argv += ["--vrde", "off"]
        return argv

    def _no_audio(self) -> list[str]:
        if self.version.major < 7:
            return ["--audio", "none"]
        return ["--audio-driver", "none", "--audio-enabled", "off"]

    def _no_usb(self) -> list[str]:
        if self.version.major < 7:
            return ["--usb", "off", "--usbehci", "off", "--usbxhci", "off"]
        return ["--usb-ohci", "off", "--usb-ehci", "off", "--usb-xhci", "off"]

    def _networks(self, hardware: Hardware) -> list[str]:
        """The forwards are never on the NIC of a granted network, whose cable can be pulled."""
        host_only, network = hardware.host_only_adapter is not None, hardware.settings.network
        second = neighbour(hardware.mac, 3)
        first = second if host_only else hardware.mac
        argv = self._nat(1, first, hardware, net="10.0.2.0/24", open_=host_only and network)
        if host_only:
            argv += [*self._card(2, "hostonly", hardware.mac, hardware), self.option("host-only-adapter", 2)]
            argv.append(str(hardware.host_only_adapter))
            if network:
                argv += self._nat(3, neighbour(hardware.mac, 4), hardware, net="10.0.4.0/24", open_=False)
        elif network:
            argv += self._nat(2, second, hardware, net="10.0.3.0/24", open_=True)
        for rule in hardware.rules:
            argv += [self.option("nat-pf", agent_nic(host_only=host_only, network=network)), rule]
        return argv

    def _nat(self, number: int, mac: str, hardware: Hardware, *, net: str, open_: bool) -> list[str]:
        argv = [*self._card(number, "nat", mac, hardware), self.option("nat-net", number), net]
        if not open_:
            # What the guest sends out leaves from the loopback, and from there nothing outside can be reached.
            argv += [self.option("nat-bind-ip", number), "127.0.0.1"]
        if self.version.major >= 7:
            argv += [f"--nat-localhostreachable{number}", "off"]
        return argv

    def _card(self, number: int, kind: str, mac: str, hardware: Hardware) -> list[str]:
        card = "82540EM" if hardware.settings.os_type.startswith("Windows") else "virtio"
        return [
            *(f"--nic{number}", kind, self.option("nic-type", number), card),
            *(self.option("mac-address", number), mac.replace(":", ""), self.option("cable-connected", number), "on"),
        ]

    def change(
        self,
        uuid: str,
        *,
        nic: int = 1,
        forwards: Sequence[str] = (),
        drop: Sequence[str] = (),
        cables: Sequence[tuple[int, bool]] = (),
    ) -> list[str]:
        """modifyvm of a VM that is off or Saved: port forwards of a NIC replaced, cables plugged or pulled."""
        argv = ["modifyvm", uuid]
        for name in drop:
            argv += [self.option("nat-pf", nic), "delete", name]
        for rule in forwards:
            argv += [self.option("nat-pf", nic), rule]
        for number, connected in cables:
            argv += [self.option("cable-connected", number), "on" if connected else "off"]
        return argv
