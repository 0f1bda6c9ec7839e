"""What the frozen executable puts right at its start, as far as it can be seen in a program that is not frozen."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmcontrol.common import frozen, launch
from vmwrapper.process import selfstart
from vmwrapper.process.supervised import supervised_command

BOOT = {
    "_PYI_ARCHIVE_FILE": "/projects/vmwrapper",
    "_PYI_LINUX_PROCESS_NAME": "vmwrapper",
    "_PYI_PARENT_PROCESS_LEVEL": "1",
}
GONE_PID = 0x7FFFFFF0
"""Higher than any pid can be."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process looks like the second one of a frozen executable; nothing of it is left after the test."""
    home = tmp_path / f"_MEI{os.getppid():08x}abc_12"
    home.mkdir(0o700)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "_MEIPASS", str(home), raising=False)
    for name, value in {**BOOT, "_PYI_APPLICATION_HOME_DIR": str(home)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(frozen, "_die_with", lambda first: None)
    monkeypatch.setattr(frozen, "_boot", {})
    monkeypatch.setattr(frozen, "_owner", False)
    monkeypatch.setattr(frozen, "_protected", False)
    yield home
    frozen.end()


def test_nothing_happens_in_a_program_that_is_not_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/kept")
    stale = tmp_path / f"_MEI{GONE_PID:08x}abcdef"
    stale.mkdir()
    frozen.begin()
    frozen.protect()
    assert os.environ["LD_LIBRARY_PATH"] == "/kept"
    assert frozen.variables() == {}
    assert frozen.remove_stale(tmp_path) == []
    assert stale.exists()
    assert selfstart.own_program("vmwrapper.process.supervisor") == (
        [sys.executable, "-P", "-m", "vmwrapper.process.supervisor"],
        {},
    )


@pytest.mark.parametrize("before", ["", "/opt/lib", "/opt/lib:/more"])
def test_children_get_the_library_path_of_before(home: Path, before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{home}:{before}" if before else str(home))
    if before:
        monkeypatch.setenv("LD_LIBRARY_PATH_ORIG", before)
    frozen.begin()
    assert os.environ.get("LD_LIBRARY_PATH", "") == before
    assert not [name for name in os.environ if name.startswith("_PYI_") or name == "LD_LIBRARY_PATH_ORIG"]


def test_a_program_of_ours_is_told_where_the_unpacked_folder_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(home))
    frozen.begin()
    words, more = selfstart.own_program("vmcontrol.hostmain", {"LD_LIBRARY_PATH": "/task"})
    assert words == [sys.executable]
    assert more["VMWRAPPER_AS"] == "vmcontrol.hostmain"
    assert more["LD_LIBRARY_PATH"] == f"{home}:/task"
    assert more.items() >= {**BOOT, "_PYI_APPLICATION_HOME_DIR": str(home)}.items()
    launched, variables = launch.command(["qemu", "-x"])
    assert launched == [sys.executable, "qemu", "-x"]
    assert variables["VMWRAPPER_LAUNCH"].startswith("--launch --session --parent=")
    assert variables["LD_LIBRARY_PATH"] == str(home)


def test_a_program_of_ours_finds_the_environment_that_it_was_meant_to_have(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen.begin()
    _, environment = supervised_command(["broker"], 2.0, {"LD_LIBRARY_PATH": "/task", "A": "b"})
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    frozen.begin()
    assert os.environ["LD_LIBRARY_PATH"] == "/task"
    assert not [name for name in os.environ if name.startswith("_PYI_") or name == "VMWRAPPER_AGAIN"]


def test_the_folder_stays_while_others_use_it(home: Path) -> None:
    (home / "lxml").mkdir()
    frozen.begin()
    selfstart.own_program("vmcontrol.hostmain")
    assert {path.stat().st_mode & 0o777 for path in (home, home / "lxml")} == {0o500}
    frozen.end()
    assert {path.stat().st_mode & 0o777 for path in (home, home / "lxml")} == {0o700}


def test_only_folders_that_nobody_uses_are_removed(home: Path, tmp_path: Path) -> None:
    frozen.begin()
    stale = tmp_path / f"_MEI{GONE_PID:08x}abcdef"
    (stale / "lxml").mkdir(parents=True)
    (stale / "lxml" / "etree.so").write_text("x")
    for path in (stale / "lxml", stale):
        path.chmod(0o500)
    others = [tmp_path / f"_MEI{os.getpid():08x}abcdef", tmp_path / "_MEI_project", tmp_path / "_MEIxyzwabcdefghij"]
    for path in others:
        path.mkdir()
    (tmp_path / f"_MEI{GONE_PID:08x}link_y").symlink_to(others[1])
    assert frozen.remove_stale(tmp_path) == [stale.name]
    assert not stale.exists()
    assert all(path.exists() for path in [home, *others])
