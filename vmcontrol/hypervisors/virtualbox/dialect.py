"""What differs between VirtualBox 6.1, 7.0, 7.1 and 7.2: option names, and options that are not there. Pure.

The only place that asks for the version. Run by us: 7.2. The others are from the manuals of 6.1 (chapter 8) and 7.0 and
7.1 (VBoxManage reference): 7.0 put hyphens into option names and split --audio, 7.0 closed the host's loopback to NAT
guests, 7.1 renamed --bios-... to --firmware-... and removed what only it had called hpet and pae.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmcontrol.hypervisors.virtualbox.output import Version
from vmcontrol.protocol import vmlimits

OLDEST = Version(6, 1, 0)
NEWEST_KNOWN = Version(7, 2, 0)

_NAMES_6 = {
    "nic-type": "--nictype",
    "mac": "--macaddress",
    "cable": "--cableconnected",
    "forward": "--natpf",
    "nat-bind": "--natbindip",
    "nat-net": "--natnet",
    "adapter": "--hostonlyadapter",
    "uart-mode": "--uartmode",
    "cpu-cap": "--cpuexecutioncap",
    "clock": "--rtcuseutc",
    "drag": "--draganddrop",
    "frontend": "--defaultfrontend",
    "vrde-address": "--vrdeaddress",
    "vrde-port": "--vrdeport",
    "boot-menu": "--biosbootmenu",
    "logo-in": "--bioslogofadein",
    "logo-out": "--bioslogofadeout",
    "logo-time": "--bioslogodisplaytime",
}
_NAMES_7 = {
    "nic-type": "--nic-type",
    "mac": "--mac-address",
    "cable": "--cable-connected",
    "forward": "--nat-pf",
    "nat-bind": "--nat-bind-ip",
    "nat-net": "--nat-net",
    "adapter": "--host-only-adapter",
    "uart-mode": "--uart-mode",
    "cpu-cap": "--cpu-execution-cap",
    "clock": "--rtc-use-utc",
    "drag": "--drag-and-drop",
    "frontend": "--default-frontend",
    "vrde-address": "--vrde-address",
    "vrde-port": "--vrde-port",
    "boot-menu": "--bios-boot-menu",
    "logo-in": "--bios-logo-fade-in",
    "logo-out": "--bios-logo-fade-out",
    "logo-time": "--bios-logo-display-time",
}
_NAMES_7_1 = _NAMES_7 | {
    "boot-menu": "--firmware-boot-menu",
    "logo-in": "--firmware-logo-fade-in",
    "logo-out": "--firmware-logo-fade-out",
    "logo-time": "--firmware-logo-display-time",
}


@dataclass(frozen=True, slots=True)
class Rule:
    """A port forward of a NAT interface. remote: on all of the host's addresses, else on its loopback."""

    name: str
    host_port: int
    guest_port: int
    remote: bool = False

    @property
    def text(self) -> str:
        return f"{self.name},tcp,{'' if self.remote else '127.0.0.1'},{self.host_port},,{self.guest_port}"


@dataclass(frozen=True, slots=True)
class Hardware:
    """The virtual computer, in our terms."""

    memory_mb: int
    cpus: int
    linux: bool
    """The guest is a Linux: paravirtualized network card."""
    description: str
    mac: str
    rules: Sequence[Rule]
    serial_log: Path
    network: bool
    host_only_adapter: str | None = None
    """The original's layout: NIC 1 NAT, NIC 2 on this adapter, with the MAC."""
    second_mac: str = ""
    third_mac: str = ""
    remote_desktop_port: int = 0


def agent_nic(*, host_only: bool, network: bool) -> int:
    """Number of the NIC that carries the port forwards, the agent's among them: NAT without a way out, but where the
    layout of 2009 wants NIC 1 to be the granted network. The guest has 10.0.2.15 there, or 10.0.4.15 on NIC 3."""
    return 3 if host_only and network else 1


class Dialect:
    """How one version of VBoxManage wants to be spoken to."""

    def __init__(self, version: Version) -> None:
        self.version = version
        self._names = _NAMES_6 if version.major < 7 else _NAMES_7 if version < Version(7, 1) else _NAMES_7_1

    @property
    def supported(self) -> bool:
        return self.version >= OLDEST

    @property
    def max_cpus(self) -> int:
        """How many processors a VM can have, as far as known."""
        return vmlimits.VIRTUALBOX_CPUS if self.version.major >= 7 else vmlimits.VIRTUALBOX_CPUS_BEFORE_7

    def option(self, name: str, number: int | None = None) -> str:
        """An option of modifyvm in this version's spelling; of a numbered one (a NIC), that of `number`."""
        return f"{self._names[name]}{'' if number is None else number}"

    def create(self, name: str, uuid: str, os_type: str, folder: Path) -> list[str]:
        """createvm; its folder is made below `folder`."""
        words = ["createvm", "--name", name, "--uuid", uuid, "--ostype", os_type, "--basefolder", str(folder)]
        return [*words, "--register"]

    def hardware(self, uuid: str, hardware: Hardware) -> list[str]:
        """modifyvm with everything at once."""
        option = self.option
        words = [
            *("modifyvm", uuid, "--description", hardware.description),
            *("--memory", str(hardware.memory_mb), "--cpus", str(hardware.cpus), "--vram", "16", "--ioapic", "on"),
            *("--acpi", "on", option("clock"), "on", option("frontend"), "headless"),
            *("--boot1", "disk", "--boot2", "none", "--boot3", "none", "--boot4", "none"),
            *(option("boot-menu"), "disabled", option("logo-time"), "0"),
            *(option("logo-in"), "off", option("logo-out"), "off"),
            *self._no_audio(),
            *("--clipboard-mode", "disabled", option("drag"), "disabled", *self._no_usb()),
            *("--uart1", "0x3f8", "4", option("uart-mode", 1), "file", str(hardware.serial_log)),
            *self._networks(hardware),
        ]
        if hardware.remote_desktop_port:
            words += ["--vrde", "on", option("vrde-address"), "127.0.0.1"]
            words += [option("vrde-port"), str(hardware.remote_desktop_port)]
        else:
            words += ["--vrde", "off"]
        return words

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
        host_only, network = hardware.host_only_adapter is not None, hardware.network
        first = hardware.second_mac if host_only else hardware.mac
        words = self._nat(1, first, hardware, net="10.0.2.0/24", open_=host_only and network)
        if host_only:
            words += [*self._card(2, "hostonly", hardware.mac, hardware), self.option("adapter", 2)]
            words.append(str(hardware.host_only_adapter))
            if network:
                words += self._nat(3, hardware.third_mac, hardware, net="10.0.4.0/24", open_=False)
        elif network:
            words += self._nat(2, hardware.second_mac, hardware, net="10.0.3.0/24", open_=True)
        for rule in hardware.rules:
            words += [self.option("forward", agent_nic(host_only=host_only, network=network)), rule.text]
        return words

    def _nat(self, number: int, mac: str, hardware: Hardware, *, net: str, open_: bool) -> list[str]:
        words = [*self._card(number, "nat", mac, hardware), self.option("nat-net", number), net]
        if not open_:
            # What the guest sends out leaves from the loopback, and from there nothing outside can be reached.
            words += [self.option("nat-bind", number), "127.0.0.1"]
        if self.version.major >= 7:
            words += [f"--nat-localhostreachable{number}", "off"]
        return words

    def _card(self, number: int, kind: str, mac: str, hardware: Hardware) -> list[str]:
        card = "virtio" if hardware.linux else "82540EM"
        return [
            *(f"--nic{number}", kind, self.option("nic-type", number), card),
            *(self.option("mac", number), mac.replace(":", ""), self.option("cable", number), "on"),
        ]

    def change(
        self,
        uuid: str,
        *,
        nic: int = 1,
        forwards: Sequence[Rule] = (),
        drop: Sequence[str] = (),
        cables: Sequence[tuple[int, bool]] = (),
    ) -> list[str]:
        """modifyvm of a VM that is off or Saved: port forwards of a NIC replaced, cables plugged or pulled."""
        words = ["modifyvm", uuid]
        for name in drop:
            words += [self.option("forward", nic), "delete", name]
        for rule in forwards:
            words += [self.option("forward", nic), rule.text]
        for number, connected in cables:
            words += [self.option("cable", number), "on" if connected else "off"]
        return words
