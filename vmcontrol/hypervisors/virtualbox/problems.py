"""VirtualBox's error messages: pattern, what it means, what the volunteer can do, when a new try makes sense.

Pure. Texts are those of VirtualBox 6.1 to 7.2; what no row knows stays a HypervisorError with VirtualBox's own words.
docs/internals/drivers/virtualbox.md shows the same table for people.
"""

from __future__ import annotations

import re

from vmcontrol.hypervisors.common.problems import HOUR, MINUTE, MINUTES_5, look_up, one_line, row
from vmcontrol.hypervisors.interface import (
    NO_VIRTUALIZATION,
    HostProblem,
    HypervisorError,
    SnapshotNotFound,
    StateUnusable,
    VmExists,
    VmNotFound,
)

PROBLEMS = (
    row(
        r"VERR_(VM_DRIVER_VERSION_MISMATCH|SUP_(HELPER_)?VERSION_MISMATCH|SUPLIB_VERSION|SUPDRV_.*VERSION)"
        r"|rc=-1910|vboxdrv.*(version|does not match)|kernel (driver|module).*(old|version)",
        "driver-version",
        "VirtualBox's kernel driver is of another version than VirtualBox (after an update?); restart this computer, or"
        " build the driver again as root (Linux: /sbin/vboxconfig, or dpkg-reconfigure virtualbox-dkms)",
        HOUR,
    ),
    row(
        r"VERR_VM_DRIVER_NOT_ACCESSIBLE|rc=-1909|/dev/vboxdrv.*permission|permission.*?/dev/vboxdrv"
        r"|VERR_SUPDRV_NO_.*ACCESS|effective UID is not root",
        "driver-no-permission",
        "this user may not use VirtualBox's kernel driver; add the user that runs BOINC (often boinc) to the group"
        " vboxusers and start BOINC again",
        HOUR,
    ),
    row(
        r"VERR_VM_DRIVER_NOT_INSTALLED|rc=-1908|kernel driver not installed|/dev/vboxdrv.*(no such|not exist)"
        r"|VERR_VM_DRIVER_LOAD_ERROR|VERR_VM_DRIVER_OPEN_ERROR|VERR_SUP_DRIVERLESS|\(driverless"
        r"|terminated unexpectedly during startup.*\(0x1\)",
        "driver-missing",
        "VirtualBox's kernel driver is not loaded; restart this computer, or build and load the driver as root (Linux:"
        " /sbin/vboxconfig, or apt install virtualbox-dkms and linux-headers; Secure Boot needs a signed driver)",
        HOUR,
    ),
    row(
        r"VERR_(VMX|SVM)_IN_(VMX|SVM)_ROOT_MODE|VERR_(VMX|SVM)_IN_USE|being used by another hypervisor"
        r"|VERR_NEM_VM_CREATE_FAILED|VERR_NEM_NOT_AVAILABLE|VERR_NEM_MISSING_KERNEL_API",
        "virtualization-in-use",
        "another hypervisor (KVM, Hyper-V, VMware) holds the processor's virtualization; end its virtual machines or"
        " switch it off",
        HOUR,
    ),
    row(
        r"VERR_VMX_NO_VMX|VERR_SVM_NO_SVM|VERR_VMX_MSR_(ALL_)?VMX_DISABLED|VERR_VMX_MSR_LOCKED_OR_DISABLED"
        r"|VERR_VMX_MSR_VMXON_DISABLED|VERR_SVM_DISABLED|VERR_HM_NO_64_BIT|VT-x is (not available|disabled)"
        r"|AMD-V is (not available|disabled)|not optional for 64-bit guest",
        "no-virtualization",
        f"this processor has no hardware virtualization (VT-x, AMD-V), or it is switched off: switch it on in the"
        f" firmware (BIOS, UEFI) set-up of this computer [{NO_VIRTUALIZATION}]",
    ),
    row(
        r"VERR_(NO_MEMORY|NO_PAGE_MEMORY|NO_LOW_MEMORY|NO_CONT_MEMORY|GMM_\w+|OUT_OF_RESOURCES|EM_NO_MEMORY)"
        r"|out of memory|E_OUTOFMEMORY|cannot allocate memory|VERR_LOCK_FAILED|not enough (host )?memory",
        "no-memory",
    ),
    row(
        r"VERR_DISK_FULL|no space left on device|VERR_FILE_TOO_BIG|VERR_DISK_QUOTA|not enough (free )?space"
        r"|disk quota exceeded|DrvVD_DISKFULL|the disk is full|VERR_VD_NOT_ENOUGH_SPACE|\bENOSPC\b",
        "disk-full",
    ),
    row(
        r"NAT.*(failed to (set up|redirect)|could not (set up|bind))|VERR_NET_ADDRESS_IN_USE|address already in use",
        "port-taken",
    ),
    row(
        r"host networking interface|host[- ]only (adapter|network|interface)|vboxnetctl|VBoxNetAdpCtl|VERR_INTNET",
        "host-only-missing",
        "VirtualBox's host-only network cannot be used; make one in VirtualBox (File, Tools, Network Manager), or with"
        " `VBoxManage hostonlyif create`",
        HOUR,
    ),
    row(
        r"base-[0-9a-f]{8}\.vmdk|Could not open the medium|VERR_(VD|VDI|VMDK)_\w+|VERR_ZIP_CORRUPTED"
        r"|Could not find file for the medium|VD: error .* opening",
        "image-damaged",
    ),
    row(
        r"read-only file system|VERR_WRITE_PROTECT",
        "read-only",
        "BOINC's data folder or VirtualBox's settings folder cannot be written",
        HOUR,
    ),
    row(
        r"Failed to save (the )?(machine|execution) state",
        "save-failed",
        "VirtualBox could not save the virtual machine's state",
        MINUTE,
    ),
    row(
        r"Failed to initialize COM|NS_ERROR_ABORT|failed to create the VirtualBox object|Unable to create.*VirtualBox"
        r"|could not (create|open).*\.config/VirtualBox|VERR_ACCESS_DENIED.*VirtualBox\.xml|HOME environment variable"
        r"|Initialisation of COM failed|VirtualBox\.xml|CO_E_SERVER_EXEC_FAILURE|REGDB_E_CLASSNOTREG",
        "service-broken",
        "VirtualBox's service does not start; its settings folder (~/.config/VirtualBox of the user that runs BOINC)"
        " must exist and be writable by that user, and VirtualBox.xml in it be readable",
        MINUTES_5,
    ),
    row(
        r"NS_ERROR_CALL_FAILED|NS_ERROR_SOCKET|NS_ERROR_FAILURE.*VirtualBoxWrap|RPC_S_|object is not ready"
        r"|E_ACCESSDENIED|object functionality is limited|NS_BASE_STREAM|service.*terminated",
        "service-gone",
        "VirtualBox's service ended while it was needed; it will be tried again",
        MINUTE,
    ),
    row(
        r"permission denied|VERR_ACCESS_DENIED",
        "no-permission",
    ),
    row(r"VERR_TOO_MANY_OPEN_FILES|too many open files", "no-files"),
    row(
        r"already locked|is locked|being locked or unlocked|while it is locked|locked for a session"
        r"|VBOX_E_OBJECT_IN_USE",
        "vm-locked",
        "another program (perhaps VirtualBox's window) uses the virtual machine; close it there",
        MINUTES_5,
    ),
)

_LOCKED = re.compile(
    r"already (has a lock|locked)|is already locked by a session|being locked or unlocked|while it is locked"
    r"|is locked for a session|not locked for (a )?session|The machine is not mutable or running",
    re.IGNORECASE,
)
_UNKNOWN_VM = re.compile(r"Could not find a registered machine|VBOX_E_OBJECT_NOT_FOUND.*FindMachine", re.IGNORECASE)
_UNKNOWN_SNAPSHOT = re.compile(
    r"Could not find a snapshot|does not have any snapshots|Snapshot action on nonexistent", re.IGNORECASE
)
_EXISTS = re.compile(r"Machine settings file '.*' already exists|machine with the same name", re.IGNORECASE)
_STATE_UNUSABLE = re.compile(
    r"VERR_SSM_\w+|saved state file|failed to load (unit|saved state)|Could not open the saved state"
    r"|VERR_LOAD_CONFIG_MISMATCH|VERR_CPUM_INCOMPATIBLE\w*|VERR_UNKNOWN_SAVED_STATE",
    re.IGNORECASE,
)


_WRITING = re.compile(r"Failed to save (the )?(machine|execution) state|VERR_DISK_FULL|no space left", re.IGNORECASE)
"""A state that could not be written: nothing is wrong with the ones that are there."""


def is_locked(text: str) -> bool:
    """Whether the call may work in a moment: somebody's session with this VM is just beginning or ending."""
    return _LOCKED.search(text) is not None


def never_began(text: str) -> bool:
    """Whether a call failed before it did anything: no service was there to be asked, as when it has just died."""
    return "Failed to create the VirtualBox object" in text or "failed to create a session object" in text


def is_limited(text: str) -> bool:
    """Whether a VM is registered, but its settings cannot be read."""
    return "object functionality is limited" in text


def broke_off(text: str) -> bool:
    """Whether a question that failed with this text has not been answered: the service went away in the middle.

    What no row knows is half an answer: VBoxManage prints what it had received until then.
    """
    if is_limited(text):
        return False
    error = explain("", text)
    return error.key == "service-gone" if isinstance(error, HostProblem) else type(error) is HypervisorError


def explain(what: str, text: str) -> HypervisorError:
    """The error for `text`, which VirtualBox said when `what` was tried."""
    words = _essence(text)
    if _UNKNOWN_VM.search(words):
        return VmNotFound(f"{what}: {words}")
    if _UNKNOWN_SNAPSHOT.search(words):
        return SnapshotNotFound(f"{what}: {words}")
    if _EXISTS.search(words):
        return VmExists(f"{what}: {words}")
    if _STATE_UNUSABLE.search(words) and not _WRITING.search(words):
        return StateUnusable(f"{what}: {words}")
    return look_up(PROBLEMS, what, words)


def _essence(text: str) -> str:
    """VirtualBox's words in one line, without progress bars and the source lines that complained."""
    lines = [
        line.removeprefix("VBoxManage: ").removeprefix("error: ").strip()
        for line in text.splitlines()
        if line.strip() and not re.match(r"0%\.\.\.[\d%.]*$", line.strip()) and "error: Context:" not in line
        and not line.startswith("Waiting for VM")
    ]  # fmt: skip
    return one_line(" ".join(lines))


def not_installed(detail: str = "") -> HostProblem:
    """There is no VBoxManage."""
    found = f" ({detail})" if detail else ""
    return HostProblem(
        f"VirtualBox is not installed{found}; install it from virtualbox.org or with the system's package manager",
        key="virtualbox-missing",
        delay_s=None,
    )


def too_old(version: object, oldest: object) -> HostProblem:
    return HostProblem(
        f"VirtualBox {version} is too old; {oldest} or newer is needed", key="virtualbox-too-old", delay_s=None
    )


def hung(what: str, limit_s: float) -> HostProblem:
    """VBoxManage was killed at its time limit."""
    return HostProblem(
        f"VirtualBox did not answer within {limit_s:g} s (VBoxManage {what}); if that comes back, end the process"
        " VBoxSVC or restart this computer",
        key="virtualbox-hung",
        delay_s=MINUTES_5,
    )


IN_USE = "vm-in-use"


def in_use(name: str) -> HostProblem:
    """An existing VM that another task of this computer uses; waiting for it is no failure of the job."""
    return HostProblem(
        f"the virtual machine {name} is used by another task on this computer; waiting until it is free",
        key=IN_USE,
        delay_s=MINUTE,
    )
