"""The further disks in defineVM's settings, and in the spec that is made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmcontrol.api.arguments import BadArgument, vm_settings
from vmcontrol.guests.newvm import BadSpec, new_vm
from vmcontrol.protocol.vm import VmSettings


def test_disks_are_read_as_they_are_sent() -> None:
    settings = VmSettings(disks=("../../projects/p/a.vdi", "/b.vdi"))
    assert vm_settings(settings.to_struct(), "settings") == settings
    assert vm_settings({"disks": None}, "settings").disks == ()


@pytest.mark.parametrize("wrong", ["a.vdi", {"a": 1}, [1], [""], ["a\0b"], ["x" * 5000], ["a"] * 9])
def test_what_are_no_disks_is_refused(wrong: object) -> None:
    with pytest.raises(BadArgument, match="disks"):
        vm_settings({"disks": wrong}, "settings")


def test_disks_are_files_as_seen_from_the_slot(tmp_path: Path) -> None:
    slot = tmp_path / "slot"
    slot.mkdir()
    (slot / "image").write_bytes(b"i")
    (tmp_path / "container").write_bytes(b"c")
    settings = VmSettings(disks=("../container", str(tmp_path / "container")))
    spec = new_vm(slot, "vm", "image", settings, slot / "secret", ())
    assert [Path(disk).samefile(tmp_path / "container") for disk in spec.disks] == [True, True]
    for wrong in ("nothing", "."):
        with pytest.raises(BadSpec, match=r"disks: .* is no file"):
            new_vm(slot, "vm", "image", VmSettings(disks=(wrong,)), slot / "secret", ())
