"""The guest's serial port in VirtualBox's file, copied to the console log: each byte once, whoever copies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmcontrol.hypervisors.common import boundedlog
from vmcontrol.hypervisors.common import console as console_log
from vmcontrol.hypervisors.virtualbox import console as vbox_console
from vmcontrol.hypervisors.virtualbox.console import Console
from vmcontrol.hypervisors.virtualbox.files import Definition, Record, VmFiles


def record(folder: Path) -> Record:
    files = VmFiles(folder / "one")
    files.logs.mkdir(parents=True)
    definition = Definition(
        name="one",
        uuid="00000000-0000-0000-0000-000000000001",
        image="i",
        mac="",
        agent_port=0,
        forwards=(),
        network=False,
        network_nic=0,
        console_log=str(folder / "console.log"),
        memory_mb=32,
    )
    return Record(files, definition)


def said(kept: Record) -> bytes:
    return Path(kept.definition.console_log).read_bytes()


def say(kept: Record, text: bytes) -> None:
    with kept.files.serial.open("ab") as file:
        file.write(text)


def started(kept: Record) -> Console:
    """As the driver does it, with VirtualBox's part."""
    console = Console(kept)
    console.finish()
    kept.change(console_start=console.size())
    console.begin()
    kept.files.serial.touch()
    return console


def test_what_grows_is_copied_and_a_new_start_goes_on(tmp_path: Path) -> None:
    kept = record(tmp_path)
    console = started(kept)
    say(kept, b"one ")
    console.copy()
    say(kept, b"two ")
    console.copy()
    console.copy()
    assert said(kept) == b"one two "
    say(kept, b"three ")
    console = started(kept)
    say(kept, b"four")
    console.close()
    assert said(kept) == b"one two three four"


def test_another_hostmain_goes_on_where_the_first_was_killed(tmp_path: Path) -> None:
    kept = record(tmp_path)
    first = started(kept)
    say(kept, b"one ")
    first.copy()
    say(kept, b"two ")
    second = Console(Record(kept.files, kept.definition))
    second.follow()
    second.copy()
    assert said(kept) == b"one two "


def test_a_console_log_that_was_cut_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_log, "LIMIT", 150)
    monkeypatch.setattr(console_log, "KEPT", 10)
    kept = record(tmp_path)
    console = started(kept)
    say(kept, b"x" * 100)
    console.copy()
    say(kept, b"y" * 100)
    console.copy()
    assert said(kept) == boundedlog.CUT + b"y" * 10
    say(kept, b"end")
    again = Console(kept)
    again.follow()
    again.copy()
    assert said(kept) == boundedlog.CUT + b"y" * 10 + b"end"


def test_of_what_is_printed_too_fast_the_end_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vbox_console, "AT_ONCE", 100)
    monkeypatch.setattr(vbox_console, "AT_ONCE_KEPT", 10)
    kept = record(tmp_path)
    console = started(kept)
    say(kept, b"x" * 1000 + b"the end...")
    console.copy()
    assert said(kept) == b"\n[... 1000 bytes were printed too fast to be kept ...]\nthe end..."
    say(kept, b" more")
    again = Console(Record(kept.files, kept.definition))
    again.follow()
    again.copy()
    assert said(kept).endswith(b"the end... more"), "each byte once, also by another HostMain"


def test_a_flood_stays_within_its_bounds_and_costs_few_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = record(tmp_path)
    console = started(kept)
    stored: list[Definition] = []
    monkeypatch.setattr(kept.files, "store", stored.append)
    most = 0
    with kept.files.serial.open("wb", buffering=0) as serial:  # as VirtualBox: at its own offset
        for _ in range(64):
            serial.write(b"0123456789abcde\n" * 65536)
            console.copy()
            blocks = kept.files.serial.stat().st_blocks * 512
            most = max(most, blocks + console.size())
    assert most <= 5 * 1024 * 1024
    assert len(stored) <= 2
    assert said(kept).endswith(b"0123456789abcde\n")


@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_what_is_no_file_in_the_logs_place_costs_the_console_alone(tmp_path: Path, kind: str) -> None:
    kept = record(tmp_path)
    console = started(kept)
    path = Path(kept.definition.console_log)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "somewhere else")
    say(kept, b"one")
    console.copy()
    console.close()
    assert not (tmp_path / "somewhere else").exists()


def test_what_was_copied_is_given_back_to_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = record(tmp_path)
    console = started(kept)
    monkeypatch.setattr(vbox_console, "SERIAL_KEPT", 1024)
    with kept.files.serial.open("wb") as serial:  # as VirtualBox: at its own offset, whatever became of the file
        serial.write(b"x" * 9000)
        serial.flush()
        console.copy()
        assert kept.files.serial.stat().st_size == 0
        serial.write(b"y")
        serial.flush()
        console.copy()
    assert said(kept) == b"x" * 9000 + b"y"


def test_a_vm_that_is_not_ours_has_no_console(tmp_path: Path) -> None:
    console = Console(None)
    for step in (console.follow, console.finish, console.begin, console.copy, console.close):
        step()
    assert console.size() == 0
    assert not list(tmp_path.iterdir())
