"""The guest's serial port in VirtualBox's file, copied to the console log: each byte once, whoever copies."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmcontrol.hypervisors import qemu_files, vbox_console
from vmcontrol.hypervisors.vbox_console import Console
from vmcontrol.hypervisors.vbox_files import Definition, Record, VmFiles


def record(folder: Path) -> Record:
    files = VmFiles(folder / "one")
    files.logs.mkdir(parents=True)
    definition = Definition(
        name="one",
        uuid="00000000-0000-0000-0000-000000000001",
        image="i",
        image_size=0,
        image_time_ns=0,
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
    kept = record(tmp_path)
    console = started(kept)
    say(kept, b"x" * 100)
    console.copy()
    bound = qemu_files.bound_console
    monkeypatch.setattr(vbox_console, "bound_console", lambda path: bound(path, limit=50, kept=10))
    console.bound()
    assert said(kept).endswith(b"\n" + b"x" * 10)
    say(kept, b"end")
    again = Console(kept)
    again.follow()
    again.copy()
    assert said(kept).endswith(b"\n" + b"x" * 10 + b"end")


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
    for step in (console.follow, console.finish, console.begin, console.copy, console.bound, console.close):
        step()
    assert console.size() == 0
    assert not list(tmp_path.iterdir())
