"""The argument list of QEMU, and the table of its complaints."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from vmcontrol.hypervisors.interface import HostProblem, HypervisorError
from vmcontrol.hypervisors.qemu import problems
from vmcontrol.hypervisors.qemu.command import Accelerator, Machine, arguments, second_mac
from vmcontrol.hypervisors.qemu.files import Definition, DiskLayout
from vmcontrol.protocol.vm import PortForward

TCG = Accelerator("tcg", "max")


def machine(
    *,
    image: Path = Path("/projects/a/guest.vdi"),
    secret_file: Path = Path("/slot/secret"),
    disks: tuple[Path, ...] = (),
    **changes: Any,
) -> Machine:
    fields: dict[str, Any] = {
        "name": "vm",
        "memory_mb": 256,
        "cpus": 2,
        "mac": "52:54:00:10:20:30",
        "image": "guest.vdi",
        "image_format": "vdi",
        "agent_port": 4616,
        "secret_file": "secret",
        "console_log": "console.log",
        "network": False,
    }
    return Machine(Definition(**(fields | changes)), Path("/slot/vm/vm/disk.qcow2"), image, disks, secret_file)


def words(option: str, m: Machine, accelerator: Accelerator = TCG, *, incoming: bool = False) -> list[str]:
    """The values of an option that may come more than once."""
    line = arguments("qemu", m, accelerator, incoming=incoming)
    return [value for name, value in itertools.pairwise(line) if name == option]


def test_without_a_network_there_is_one_card_that_leads_nowhere() -> None:
    (network,) = words("-netdev", machine())
    assert "restrict=on" in network
    assert network.endswith("hostfwd=tcp:127.0.0.1:0-:4616")
    cards = [device for device in words("-device", machine()) if "net" in device]
    assert cards == ["virtio-net-pci,netdev=agent,mac=52:54:00:10:20:30,romfile="]


def test_a_granted_network_is_a_second_card_and_the_first_stays_closed() -> None:
    agent, granted = words("-netdev", machine(network=True))
    assert "restrict=on" in agent
    assert "restrict" not in granted
    assert "hostfwd" not in granted
    assert second_mac("52:54:00:10:20:30") == "52:54:00:11:20:30"


@pytest.mark.parametrize("granted", [True, False])
def test_in_the_layout_of_2009_the_first_card_is_nat_and_the_second_is_who_the_guest_is(granted: bool) -> None:
    old = machine(network=granted, host_only=True)
    first, second = (device for device in words("-device", old) if "net" in device)
    assert "mac=52:54:00:11:20:30" in first
    assert "mac=52:54:00:10:20:30" in second
    nat, host_only = words("-netdev", old)
    assert ("restrict=on" in nat) is not granted
    assert "hostfwd" not in nat
    assert "restrict=on" in host_only
    assert "hostfwd=tcp:127.0.0.1:0-:4616" in host_only


def test_forwards_are_on_the_loopback_unless_they_are_for_others() -> None:
    (network,) = words("-netdev", machine(port_forwards=[PortForward(80, 8080), PortForward(22, 0, remote=True)]))
    assert ",hostfwd=tcp:127.0.0.1:8080-:80,hostfwd=tcp::0-:22" in network


def test_the_image_is_opened_for_reading_in_a_format_that_is_not_guessed() -> None:
    image, overlay, disk = (json.loads(value) for value in words("-blockdev", machine()))
    assert image["driver"] == "vdi"
    assert image["read-only"] is True
    assert image["file"]["read-only"] is True
    assert disk["driver"] == "qcow2"
    assert (disk["file"], disk["backing"]) == (overlay["node-name"], image["node-name"])


def test_commas_in_paths_survive() -> None:
    odd = machine(secret_file=Path("/a,b/secret"), image=Path('/a,b/"x".vdi'))
    assert words("-smbios", odd) == ["type=11,value=interface=52:54:00:10:20:30,path=/a,,b/secret"]
    assert json.loads(words("-blockdev", odd)[0])["file"]["filename"] == '/a,b/"x".vdi'


def test_it_always_begins_stopped_and_waits_for_a_state_only_if_there_is_one() -> None:
    for incoming in (False, True):
        line = arguments("qemu", machine(), TCG, incoming=incoming)
        assert "-S" in line
        assert ("-incoming" in line) is incoming


def test_the_devices_do_not_depend_on_the_accelerator() -> None:
    kvm = Accelerator("kvm", "host")
    assert words("-device", machine(), kvm) == words("-device", machine(), TCG)
    assert words("-accel", machine(), kvm) == ["kvm"]
    assert words("-cpu", machine(), kvm) == ["host"]


@pytest.mark.parametrize(
    ("text", "key"),
    [  # all from QEMU 7.2 on Linux, but the last two
        ("cannot set up guest memory 'pc.ram': Cannot allocate memory", "no-memory"),
        ("Error while writing VM state: No space left on device", "disk-full"),
        ("Could not set up host forwarding rule 'tcp:127.0.0.1:45111-:80'", "port-taken"),
        ('Failed to get "write" lock\nIs another process using the image [disk.qcow2]?', "disk-locked"),
        ('-blockdev {"driver": "vdi", "node-name": "image"}: Could not open \'/x\': No such file', "image-damaged"),
        ("unsupported machine type\nUse -machine help to list supported machines", "qemu-version"),
        ("Could not access KVM kernel module: Permission denied", "no-permission"),
        ("ioctl(KVM_CREATE_VM) failed: 16 Device or resource busy", "accelerator-taken"),
    ],
)
def test_known_errors_are_host_problems_with_qemus_words(text: str, key: str) -> None:
    problem = problems.explain("starting vm", text)
    assert isinstance(problem, HostProblem)
    assert problem.key == key
    assert text.splitlines()[0] in problem.reason


@pytest.mark.parametrize("text", ["Input/output error", "Error -5 while writing VM", "QEMU gave no reason"])
def test_an_input_output_error_where_there_is_no_room_is_a_full_disk(text: str) -> None:
    full = problems.explain("one, snapshot-save", text, has_room=False)
    assert isinstance(full, HostProblem)
    assert full.key == "disk-full"
    assert text in full.reason
    assert type(problems.explain("one, snapshot-save", text)) is HypervisorError
    assert type(problems.explain("one", "the moon is full", has_room=False)) is HypervisorError


@pytest.mark.parametrize(
    "text",
    [
        "Error -28 while writing VM",
        "qemu-img: Could not create snapshot: -EDQUOT",
        "There is not enough space on the disk",
        "writing: File too large",
    ],
)
def test_a_full_disk_has_many_words(text: str) -> None:
    full = problems.explain("one", text)
    assert isinstance(full, HostProblem)
    assert full.key == "disk-full"


def test_unknown_complaints_stay_what_they_are() -> None:
    error = problems.explain("starting vm", "the moon is full")
    assert type(error) is HypervisorError
    assert "the moon is full" in str(error)
    assert "it said nothing" in str(problems.explain("starting vm", ""))


def test_every_fault_has_a_key_of_its_own() -> None:
    keys = [row.key for row in problems.PROBLEMS]
    assert len(keys) == len(set(keys))


def test_further_disks_are_read_only_and_come_after_all_other_devices() -> None:
    layouts = (DiskLayout("raw", 1 << 20, 3 << 20), DiskLayout("qcow2"))
    with_disks = machine(disks=(Path("/projects/a/one,.vdi"), Path("/projects/a/two")), disk_layouts=layouts)
    one, two = [json.loads(node) for node in words("-blockdev", with_disks)[-2:]]
    assert (one["driver"], one["offset"], one["size"]) == ("raw", 1 << 20, 3 << 20)
    assert "size" not in two
    for node, path in ((one, "/projects/a/one,.vdi"), (two, "/projects/a/two")):
        assert node["read-only"] is True
        assert node["file"] == {"driver": "file", "filename": path, "read-only": True}
    devices = words("-device", with_disks)
    assert devices[:-2] == words("-device", machine())
    assert [device.split(",")[1] for device in devices[-2:]] == ["drive=further0", "drive=further1"]
