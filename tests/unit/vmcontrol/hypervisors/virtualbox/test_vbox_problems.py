"""VirtualBox's complaints, told apart. Texts are VirtualBox's own: of 7.2.22 as recorded, else as users report them."""

from __future__ import annotations

import pytest

from vmcontrol.hypervisors.interface import (
    HostProblem,
    HypervisorError,
    SnapshotNotFound,
    StateUnusable,
    VmExists,
    VmNotFound,
)
from vmcontrol.hypervisors.virtualbox import problems

PROBLEMS = [
    (
        "driver-missing",
        "The virtual machine 't1' has terminated unexpectedly during startup with exit code 1 (0x1)",
    ),
    ("driver-missing", "VBoxHeadless: Error -1908 in suplibOsInit!\nVBoxHeadless: Kernel driver not installed"),
    ("driver-missing", "VBoxManage: error: Driverless mode (VERR_SUP_DRIVERLESS)"),
    ("driver-version", "The VirtualBox kernel driver does not match this version (VERR_VM_DRIVER_VERSION_MISMATCH)."),
    ("driver-no-permission", "VBoxManage: error: Permission problem (VERR_VM_DRIVER_NOT_ACCESSIBLE). /dev/vboxdrv"),
    ("virtualization-in-use", "VT-x is being used by another hypervisor (VERR_VMX_IN_VMX_ROOT_MODE)."),
    ("virtualization-in-use", "VirtualBox can't operate in VMX root mode. (VERR_SVM_IN_USE)"),
    ("no-virtualization", "VT-x is disabled in the BIOS for all CPU modes (VERR_VMX_MSR_ALL_VMX_DISABLED)"),
    ("no-virtualization", "VBoxManage: error: AMD-V is disabled in the BIOS (or by the host OS) (VERR_SVM_DISABLED)"),
    ("no-virtualization", "VBoxManage: error: VT-x is not available (VERR_VMX_NO_VMX)"),
    ("no-memory", "Out of memory condition when allocating memory with low physical (VERR_NO_LOW_MEMORY)"),
    ("no-memory", "VBoxManage: error: The maximum RAM size was exceeded, VERR_GMM_HIT_VM_ACCOUNT_LIMIT"),
    ("disk-full", "VBoxManage: error: Could not create the medium storage unit '/x/disk.vdi' (VERR_DISK_FULL)"),
    ("disk-full", "VBoxManage: error: Failed to write; No space left on device"),
    ("disk-full", "VBoxManage: error: Failed to save the machine state to '/x.sav' (VERR_SSM_STATE) (VERR_DISK_FULL)"),
    ("save-failed", "VBoxManage: error: Failed to save the machine state to the saved state file '/x/one.sav'"),
    ("host-only-missing", "Nonexistent host networking interface, name 'vboxnet0' (VERR_INTERNAL_ERROR)"),
    (
        "host-only-missing",
        "VBoxNetAdpCtl: Error while adding new interface: failed to open /dev/vboxnetctl: No such file",
    ),
    ("image-damaged", "VBoxManage: error: Could not open the medium '/x/vm/one/base-0a1b2c3d.vmdk'."),
    ("save-failed", "90%...NS_ERROR_ABORT\nVBoxManage: error: Failed to save machine state.\nThe object is not ready"),
    ("image-damaged", "Could not find file for the medium '/x/vm/one/disk-0a1b2c3d.vdi' (VERR_FILE_NOT_FOUND)"),
    ("service-broken", "VBoxManage: error: Failed to create the VirtualBox object!"),
    ("service-gone", "VBoxManage: error: Code NS_ERROR_CALL_FAILED (0x800706BE) - Call to remote object failed"),
    ("vm-locked", "VBoxManage: error: The machine 't1' is already locked by a session (or being locked or unlocked)"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text"), PROBLEMS)
def test_problems_are_told_apart(key: str, text: str) -> None:
    error = problems.explain("starting one", text)
    assert isinstance(error, HostProblem)
    assert error.key == key
    assert "starting one" in error.reason


def test_what_never_passes_by_itself() -> None:
    permanent = {row.key for row in problems.PROBLEMS if row.delay_s is None}
    assert permanent == {"no-virtualization", "image-damaged"}
    assert all(row.delay_s is None or 60 <= row.delay_s <= 3600 for row in problems.PROBLEMS), "nobody waits a day"


def test_boinc_hears_of_missing_virtualization_by_its_word() -> None:
    error = problems.explain("starting", "VT-x is not available (VERR_VMX_NO_VMX)")
    assert "ERR_CPU_VM_EXTENSIONS_DISABLED" in str(error)
    other = problems.explain("starting", "VT-x is being used by another hypervisor (VERR_VMX_IN_VMX_ROOT_MODE)")
    assert "ERR_CPU_VM_EXTENSIONS_DISABLED" not in str(other), "that passes; the flag would stick until BOINC restarts"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (VmNotFound, "VBoxManage: error: Could not find a registered machine named 'nosuch'"),
        (SnapshotNotFound, "VBoxManage: error: Could not find a snapshot named 'nosuch'"),
        (SnapshotNotFound, "This machine does not have any snapshots"),
        (VmExists, "VBoxManage: error: Machine settings file '/x/c1/c1.vbox' already exists"),
        (StateUnusable, "VBoxManage: error: Failed to load unit 'cpum' (VERR_SSM_LOAD_CONFIG_MISMATCH)"),
    ],
)
def test_other_errors_have_their_own_kind(kind: type[HypervisorError], text: str) -> None:
    assert type(problems.explain("it", text)) is kind


def test_what_no_row_knows_keeps_virtualboxs_words() -> None:
    text = (
        "0%...10%...100%\nVBoxManage: error: A NAT rule of this name already exists\n"
        'VBoxManage: error: Context: "AddRedirect(...)" at line 2251 of file VBoxManageModifyVM.cpp'
    )
    error = problems.explain("setting up one", text)
    assert type(error) is HypervisorError
    assert str(error) == "setting up one: A NAT rule of this name already exists"


@pytest.mark.parametrize(
    ("text", "locked"),
    [
        ("The machine 't1' is already locked by a session (or being locked or unlocked)", True),
        ("Cannot unregister the machine 't1' while it is locked", True),
        ("Cannot close medium '/x/img.vdi' because it has 1 child media", False),
    ],
)
def test_a_lock_that_passes(text: str, locked: bool) -> None:
    assert problems.is_locked(text) is locked
