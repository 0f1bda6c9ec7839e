"""What doctor notes of a computer without starting anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmwrapper import computer


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


def noted(tmp_path: Path, root: Path) -> str:
    return "\n".join(computer.hints(tmp_path, root=root))


def test_nothing_stands_out(tmp_path: Path) -> None:
    assert noted(tmp_path, system(tmp_path / "root")) == ""


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
    root = system(tmp_path / "root", files={"sys/module/kvm_amd/refcnt": "3\n", "sys/module/kvm_intel/refcnt": "0\n"})
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
