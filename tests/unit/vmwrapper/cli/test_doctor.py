"""`vmwrapper doctor` as a process: what it says of a computer whose VirtualBox is played by a script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """#!/bin/sh
case $1 in
  --version) echo {version} ;;
  showvminfo) printf 'name="x"\\nUUID="%s"\\nVMState="poweroff"\\n' "$2" ;;
  startvm) echo 'VBoxManage: error: {error}' >&2; exit 1 ;;
esac
"""


def doctor(folder: Path, version: str = "7.2.22r1", error: str = "", *, installed: bool = True) -> tuple[int, str]:
    program = folder / "VBoxManage"
    if installed:
        program.write_text(SCRIPT.format(version=version, error=error))
        program.chmod(0o755)
    variables = {"VMWRAPPER_VBOXMANAGE": str(program), "VBOX_USER_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    qemu = folder / "bin"  # an empty PATH has no QEMU
    qemu.mkdir()
    (qemu / "sh").symlink_to("/bin/sh")
    done = subprocess.run(
        [sys.executable, "-m", "vmwrapper", "doctor"],
        cwd=folder, env={**os.environ, **variables, "PATH": str(qemu)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "Traceback" not in done.stdout + done.stderr, done
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("The VM session was aborted. Kernel driver not installed (rc=-1908)", "/sbin/vboxconfig"),
        ("VERR_VM_DRIVER_VERSION_MISMATCH", "of another version"),
        (
            "VT-x is disabled in the BIOS for all CPU modes (VERR_VMX_MSR_ALL_VMX_DISABLED)",
            "ERR_CPU_VM_EXTENSIONS_DISABLED",
        ),
        ("VT-x is being used by another hypervisor (VERR_VMX_IN_VMX_ROOT_MODE)", "another hypervisor"),
        ("VERR_NO_MEMORY", "not enough free memory"),
        ("VERR_VM_DRIVER_NOT_ACCESSIBLE", "group vboxusers"),
    ],
)
def test_what_a_test_machine_meets_is_said_with_what_to_do(tmp_path: Path, error: str, advice: str) -> None:
    status, said = doctor(tmp_path, error=error)
    assert status == 1
    (line,) = [line for line in said.splitlines() if line.startswith("VirtualBox: cannot be used: 7.2.22")]
    assert advice in line
    assert "QEMU: cannot be used:" in said
    assert "QEMU is not installed" in said


def test_a_virtualbox_that_is_too_old(tmp_path: Path) -> None:
    status, said = doctor(tmp_path, version="6.0.24r1")
    assert status == 1
    assert "VirtualBox 6.0.24 is too old; 6.1.0 or newer is needed" in said


def test_no_virtualbox(tmp_path: Path) -> None:
    status, said = doctor(tmp_path, installed=False)
    assert status == 1
    assert "VirtualBox is not installed" in said
