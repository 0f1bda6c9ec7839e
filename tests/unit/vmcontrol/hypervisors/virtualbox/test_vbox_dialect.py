"""How each version is spoken to. 7.2 is run in the integration tests; 6.1, 7.0 and 7.1 are from their manuals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vmcontrol.hypervisors.virtualbox.dialect import Dialect, Hardware, agent_nic
from vmcontrol.hypervisors.virtualbox.files import HostForward
from vmcontrol.hypervisors.virtualbox.output import Version
from vmcontrol.protocol.vm import VmSettings

HARDWARE = Hardware(
    settings=VmSettings(memory_mb=512, cpus=2, network=True),
    mac="08:00:27:00:00:02",
    rules=[HostForward("agent", 4616, 0, 24616).rule, HostForward("port1", 80, 0, 8080, remote=True).rule],
    serial_log=Path("/slot/vm/one/serial.txt"),
)
ALONE = replace(HARDWARE, settings=VmSettings(memory_mb=512, cpus=2))
V6, V70, V71, V72 = Version(6, 1, 38), Version(7, 0, 20), Version(7, 1, 4), Version(7, 2, 22)


def words(version: Version, hardware: Hardware = HARDWARE) -> list[str]:
    return Dialect(version).hardware("the-uuid", hardware)


def value(all_words: list[str], option: str) -> str:
    return all_words[all_words.index(option) + 1]


@pytest.mark.parametrize("version", [V6, V70, V71, V72])
def test_what_is_the_same_for_all(version: Version) -> None:
    said = words(version)
    assert said[:2] == ["modifyvm", "the-uuid"]
    assert (value(said, "--memory"), value(said, "--cpus")) == ("512", "2")
    assert (value(said, "--nic1"), value(said, "--nic2")) == ("nat", "nat")
    assert value(said, "--uart1") == "0x3f8"
    assert value(said, "--vrde") == "off"
    assert not any(word.startswith("--lpt") for word in said)
    assert said.count("agent,tcp,127.0.0.1,24616,,4616") == 1
    assert said.count("port1,tcp,,8080,,80") == 1


def test_6_1_has_no_hyphens_and_no_switch_for_the_hosts_loopback() -> None:
    said = words(V6)
    assert value(said, "--nictype1") == "virtio"
    assert value(said, "--macaddress1") == "080027000002"
    assert value(said, "--natbindip1") == "127.0.0.1"
    assert value(said, "--uartmode1") == "file"
    assert value(said, "--audio") == "none"
    assert value(said, "--biosbootmenu") == "disabled"
    assert not any("localhostreachable" in word for word in said)
    assert not any(word.startswith(("--nic-type", "--audio-", "--bios-", "--firmware-")) for word in said)


@pytest.mark.parametrize("version", [V70, V71, V72])
def test_7_has_hyphens_and_closes_the_hosts_loopback(version: Version) -> None:
    said = words(version)
    assert value(said, "--nic-type1") == "virtio"
    assert value(said, "--nat-bind-ip1") == "127.0.0.1"
    assert value(said, "--nat-localhostreachable1") == "off"
    assert value(said, "--nat-localhostreachable2") == "off"
    assert value(said, "--audio-driver") == "none"
    assert "--audio" not in said


def test_the_firmwares_options_have_another_name_since_7_1() -> None:
    assert "--bios-boot-menu" in words(V70)
    assert "--firmware-boot-menu" in words(V71)
    assert "--firmware-boot-menu" in words(V72)


@pytest.mark.parametrize("version", [V6, V72])
def test_only_the_granted_network_leads_out(version: Version) -> None:
    bind = "--natbindip" if version is V6 else "--nat-bind-ip"
    said = words(version)
    assert f"{bind}1" in said
    assert f"{bind}2" not in said
    assert "--nic2" not in words(version, ALONE)


def test_the_originals_layout() -> None:
    said = words(V72, replace(HARDWARE, host_only_adapter="vboxnet0"))
    assert (value(said, "--nic1"), value(said, "--nic2")) == ("nat", "hostonly")
    assert value(said, "--host-only-adapter2") == "vboxnet0"
    assert value(said, "--mac-address2") == "080027000002", "the id is the MAC of NIC 2"
    assert value(said, "--mac-address1") == "080027010002"


@pytest.mark.parametrize("version", [V6, V72])
@pytest.mark.parametrize("adapter", [None, "vboxnet0"])
@pytest.mark.parametrize("network", [False, True])
def test_the_forwards_are_on_a_card_of_their_own_that_leads_nowhere(
    version: Version, adapter: str | None, network: bool
) -> None:
    """A granted network can be pulled; the way to the agent stays."""
    said = words(version, replace(HARDWARE if network else ALONE, host_only_adapter=adapter))
    forward, bind = ("--natpf", "--natbindip") if version is V6 else ("--nat-pf", "--nat-bind-ip")
    (number,) = {int(word.removeprefix(forward)) for word in said if word.startswith(forward)}
    assert number == (3 if adapter and network else 1) == agent_nic(host_only=bool(adapter), network=network)
    assert value(said, f"{bind}{number}") == "127.0.0.1"
    granted = (1 if adapter else 2) if network else 0
    assert granted != number
    assert not granted or f"{bind}{granted}" not in said


def test_other_guests_get_a_card_that_they_know() -> None:
    assert value(words(V72, replace(HARDWARE, settings=VmSettings(os_type="Windows10_64"))), "--nic-type1") == "82540EM"


def test_a_remote_desktop_is_on_the_loopback() -> None:
    said = words(V72, replace(HARDWARE, remote_desktop_port=5999))
    assert (value(said, "--vrde"), value(said, "--vrde-address")) == ("on", "127.0.0.1")
    assert value(said, "--vrde-port") == "5999"


@pytest.mark.parametrize(("version", "supported"), [(Version(6, 0, 24), False), (V6, True), (Version(8, 0, 0), True)])
def test_what_is_too_old(version: Version, supported: bool) -> None:
    assert Dialect(version).supported is supported


def test_changes_of_a_vm_that_is_off() -> None:
    said = Dialect(V72).change("u", nic=1, drop=["agent"], forwards=["agent,tcp,127.0.0.1,1,,2"], cables=[(2, False)])
    assert said == [
        *("modifyvm", "u", "--nat-pf1", "delete", "agent"),
        *("--nat-pf1", "agent,tcp,127.0.0.1,1,,2", "--cable-connected2", "off"),
    ]
