"""VirtualBox's settings file in a folder that was moved."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmcontrol.hypervisors.virtualbox import registry

OLD = "/var/boinc/slot 1, &#xE9;/vm/one"
TEXT = f"""<?xml version="1.0"?>
<VirtualBox xmlns="http://www.virtualbox.org/" version="1.19-linux">
  <Machine uuid="{{69859fd8-b255-4ba4-99d8-0396d5797109}}" name="one" snapshotFolder="Snapshots">
    <Description>Made by vmwrapper, a BOINC application, in {OLD}; it goes when the task ends.</Description>
    <HardDisk uuid="{{846fee0b-3b84-4b15-ac7a-b3dccff15ee0}}" location="base-69859fd8.vmdk" format="VMDK"/>
    <Snapshot><UART>
      <Port slot="0" enabled="true" IOBase="0x3f8" IRQ="4" path="{OLD}/Logs/serial.txt" hostMode="RawFile"/>
    </UART></Snapshot>
    <UART>
      <Port slot="0" enabled="true" IOBase="0x3f8" IRQ="4" path="{OLD}/Logs/serial.txt" hostMode="RawFile"/>
    </UART>
  </Machine>
</VirtualBox>
"""


def test_every_mention_of_the_old_folder_is_one_of_the_new(tmp_path: Path) -> None:
    settings = tmp_path / "one.vbox"
    settings.write_text(TEXT)
    settings.chmod(0o600)
    registry.move_here(settings, Path('/new & "other" <place>/vm/one'))
    text = settings.read_text()
    assert "/var/boinc" not in text
    assert text == TEXT.replace(OLD, "/new &amp; &quot;other&quot; &lt;place&gt;/vm/one")
    assert settings.stat().st_mode & 0o777 == 0o600
    registry.move_here(settings, Path('/new & "other" <place>/vm/one'))
    assert settings.read_text() == text


@pytest.mark.parametrize("text", ["", "<", TEXT.replace("serial.txt", "other.txt"), TEXT.replace(OLD, "")])
def test_what_is_not_understood_stays(text: str) -> None:
    assert registry.moved(text, "/new") == text


@pytest.mark.parametrize("kind", ["missing", "folder", "link", "no text"])
def test_what_is_no_settings_file_stays(tmp_path: Path, kind: str) -> None:
    settings = tmp_path / "one.vbox"
    if kind == "folder":
        settings.mkdir()
    elif kind == "link":
        settings.symlink_to("/dev/zero")
    elif kind == "no text":
        settings.write_bytes(b"\xff" + TEXT.encode())
    registry.move_here(settings, tmp_path)
    assert kind != "no text" or settings.read_bytes() == b"\xff" + TEXT.encode()
