"""Which of the VMs that VirtualBox remembers are ours to be forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmcontrol.hypervisors.virtualbox import registry

REGISTRY = """<?xml version="1.0"?>
<VirtualBox xmlns="http://www.virtualbox.org/" version="1.12-linux"><Global><MachineRegistry>
  <MachineEntry uuid="{E4E8F3BD-e8bb-4964-ae8a-7eb96f38b524}" src="/slots/1, &#xe9; &amp; x/vm/one/one.vbox"/>
  <MachineEntry uuid="{002d300c-b9bf-4591-a9ec-d3e19c378ea3}" src="Machines/b/b.vbox"/>
</MachineRegistry><MediaRegistry><HardDisks>
  <HardDisk uuid="{1}" location="{slots}/1/vm/one/base-1.vmdk">
    <HardDisk uuid="{2}" location="{slots}/1/vm/one/disk-1.vdi">
    <HardDisk uuid="{3}" location="{slots}/1/vm/one/Snapshots/{3}.vdi"/></HardDisk></HardDisk>
  <HardDisk uuid="{4}" location="{slots}/2/vm/vmwrapper_p_r_2_vm/disk-4.vdi"/>
  <HardDisk uuid="{5}" location="{slots}/2/vm/mine/disk-5.vdi"/>
  <HardDisk uuid="{6}" location="/home/me/disk.vdi"/>
</HardDisks></MediaRegistry></Global></VirtualBox>
"""


def test_where_the_settings_are(tmp_path: Path) -> None:
    (tmp_path / "VirtualBox.xml").write_text(REGISTRY)
    assert registry.settings_files(tmp_path) == {
        "e4e8f3bd-e8bb-4964-ae8a-7eb96f38b524": Path("/slots/1, é & x/vm/one/one.vbox"),
        "002d300c-b9bf-4591-a9ec-d3e19c378ea3": tmp_path / "Machines/b/b.vbox",
    }


@pytest.mark.parametrize(
    "text", [None, "", REGISTRY[:200], '<!DOCTYPE x [<!ENTITY e SYSTEM "/etc/passwd">]><x>&e;</x>']
)
def test_a_registry_that_cannot_be_read_names_nothing(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "VirtualBox.xml").write_text(text)
    assert registry.settings_files(tmp_path) == {}


def test_ours_are_those_of_this_slot_and_of_slots_that_are_gone(tmp_path: Path) -> None:
    folder = tmp_path / "slots" / "1" / "vm"
    other = tmp_path / "slots" / "2" / "vm" / "vmwrapper_p_r_2_vm"
    assert registry.is_ours(folder / "any" / "any.vbox", folder)
    assert registry.is_ours(other / "vmwrapper_p_r_2_vm.vbox", folder)
    other.mkdir(parents=True)
    assert not registry.is_ours(other / "vmwrapper_p_r_2_vm.vbox", folder), "that slot is still there"
    assert not registry.is_ours(tmp_path / "VirtualBox VMs" / "x" / "x.vbox", folder)
    assert not registry.is_ours(tmp_path / "vm" / "mine" / "mine.vbox", folder), "not a name of ours"
    assert not registry.is_ours(tmp_path / "VMs" / "vmwrapper_a" / "vmwrapper_a.vbox", folder)


def test_disks_of_ours_that_are_gone_children_first(tmp_path: Path) -> None:
    slots = tmp_path / "slots"
    (tmp_path / "VirtualBox.xml").write_text(REGISTRY.replace("{slots}", str(slots)))
    ours = [slots / "1/vm/one" / name for name in ("Snapshots/{3}.vdi", "disk-1.vdi", "base-1.vmdk")]
    other = slots / "2/vm/vmwrapper_p_r_2_vm"
    assert registry.vanished_media(tmp_path, slots / "1/vm") == [other / "disk-4.vdi", *ours]
    other.mkdir(parents=True)
    assert registry.vanished_media(tmp_path, slots / "1/vm") == ours, "that VM may still be one"
    assert registry.vanished_media(tmp_path, slots / "3/vm") == []
