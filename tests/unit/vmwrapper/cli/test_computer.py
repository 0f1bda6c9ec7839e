"""What doctor notes of a computer without starting anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmwrapper.cli import computer


def system(root: Path, *, flags: str = "fpu vmx", files: dict[str, str] | None = None) -> Path:
    for name, text in {"proc/cpuinfo": f"processor : 0\nflags\t\t: {flags}\n", **(files or {})}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(autouse=True)
def settings_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VBOX_USER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(computer, "LEAST_MEMORY_MB", 0)
    monkeypatch.setattr(computer, "LEAST_DISK_MB", 0)


def noted(tmp_path: Path, root: Path, virtualbox: str = "") -> str:
    return "\n".join(computer.hints(tmp_path, virtualbox=virtualbox, root=root))


def test_nothing_stands_out(tmp_path: Path) -> None:
    assert noted(tmp_path, system(tmp_path / "root", files={"dev/kvm": ""})) == ""


def test_no_virtualization_is_said_with_boincs_word(tmp_path: Path) -> None:
    said = noted(tmp_path, system(tmp_path / "root", flags="fpu sse2"))
    assert "firmware" in said
    assert "ERR_CPU_VM_EXTENSIONS_DISABLED" in said


def test_virtualbox_without_its_driver(tmp_path: Path) -> None:
    root = system(tmp_path / "root", files={"usr/lib/virtualbox/VBoxManage": ""})
    assert "/sbin/vboxconfig" in noted(tmp_path, root)
    (root / "dev").mkdir()
    (root / "dev/vboxdrv").touch()
    assert "vboxconfig" not in noted(tmp_path, root)


def test_kvm_that_somebody_uses(tmp_path: Path) -> None:
    counts = {"sys/module/kvm_amd/refcnt": "3\n", "sys/module/kvm_intel/refcnt": "0\n"}
    root = system(tmp_path / "root", files={"dev/kvm": "", **counts})
    said = noted(tmp_path, root)
    assert "kvm_amd is in use" in said
    assert "kvm_intel" not in said


def test_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computer, "LEAST_MEMORY_MB", 2**40)
    monkeypatch.setattr(computer, "LEAST_DISK_MB", 2**40)
    said = noted(tmp_path, system(tmp_path / "root"))
    assert "memory" in said
    assert "disk" in said


def test_a_system_that_shows_nothing(tmp_path: Path) -> None:
    assert noted(tmp_path, tmp_path / "empty") == ""


@pytest.mark.parametrize("driver", ["7.2.22_Debian r175245 (0x00340001)", "7.2.2 r1 (0x00340001)"])
def test_a_driver_of_another_version(tmp_path: Path, driver: str) -> None:
    root = system(tmp_path / "root", files={"sys/module/vboxdrv/version": f"{driver}\n"})
    assert ("vboxconfig" in noted(tmp_path, root, virtualbox="7.2.22")) == (not driver.startswith("7.2.22"))
    assert "vboxconfig" not in noted(tmp_path, root, virtualbox="")


def test_a_user_who_may_not_use_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = system(tmp_path / "root", files={"opt/VirtualBox/VBoxManage": "", "dev/vboxdrv": ""})
    assert "vboxusers" not in noted(tmp_path, root)
    monkeypatch.setattr(computer, "_in_group", lambda name: False)
    assert "adduser USER vboxusers" in noted(tmp_path, root)


def test_a_settings_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def access(path: Path, mode: int) -> bool:
        return path != tmp_path

    (tmp_path / "slot").mkdir()
    monkeypatch.setattr(os, "access", access)  # root may write everywhere
    said = "\n".join(computer.hints(tmp_path / "slot", root=system(tmp_path / "root")))
    assert f"VirtualBox's settings folder {tmp_path / 'home'} cannot be written" in said


@pytest.mark.parametrize(("flag", "module"), [("vmx", "kvm_intel"), ("svm", "kvm_amd")])
def test_kvm_that_is_not_loaded(tmp_path: Path, flag: str, module: str) -> None:
    assert f"modprobe {module}" in noted(tmp_path, system(tmp_path / "root", flags=f"fpu {flag} sse"))


def test_kvm_that_this_user_may_not_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = system(tmp_path / "root", files={"dev/kvm": ""})
    monkeypatch.setattr(os, "access", lambda path, mode: path != root / "dev/kvm")
    assert "group kvm" in noted(tmp_path, root)
