"""The frozen executable (PyInstaller, one file): what its boot loader leaves to us, put right at the start.

One file is two processes. The first unpacks the libraries into a folder of its own in the current directory (the slot),
starts the second, passes signals on to it, and removes the folder when it has ended. The second is the program. Both
differ from an unfrozen program in what is owned here:

- The environment: the boot loader's variables and its LD_LIBRARY_PATH are for starting this executable again, and for
  nothing else. `begin` takes them out; `variables` gives them to those that use the unpacked folder too (HostMain, a
  supervisor, a launcher), which are single processes and unpack nothing.
- The second dies with the first: the client kills only the pid that it knows.
- The folder stays while a HostMain saves its VMs, although the program that it belongs to was killed: `protect`.
- Folders that killed runs left in the slot: `remove_stale`.

In a program that is not frozen every function does nothing. Imports little: every launch of a program pays for it.
Linux is tested; for macOS and Windows the paths exist and have never been run (docs/internals/frozen.md).
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

LIBRARY_PATH = "LD_LIBRARY_PATH"
_LEVEL = "_PYI_PARENT_PROCESS_LEVEL"
_BOOT_VARIABLES = ("_PYI_ARCHIVE_FILE", "_PYI_APPLICATION_HOME_DIR", _LEVEL, "_PYI_LINUX_PROCESS_NAME")
_SECOND_PROCESS = "1"
"""bootloader/src/pyi_main.h: the level that the main process of a one-file program hands to its children."""
_PREFIX = "_MEI"
_PID_DIGITS = 8
"""bootloader/src/pyi_utils_posix.c: the folder is _MEI, the first process's pid in hexadecimal, six random letters."""
_NAME_LENGTH = len(_PREFIX) + _PID_DIGITS + 6
_PR_SET_PDEATHSIG, _SIGKILL = 1, 9  # linux/prctl.h, signal(7)

_boot: dict[str, str] = {}
_owner = False
_protected = False


def is_frozen() -> bool:
    return bool(getattr(sys, "frozen", False))


def begin() -> None:
    """First thing in the program: a clean environment, and an end with the boot loader's process."""
    global _owner  # noqa: PLW0603 (it is a fact about the process)
    if not is_frozen():
        return
    _boot.update({name: value for name in _BOOT_VARIABLES if (value := os.environ.pop(name, ""))})
    os.environ.pop("_PYI_SPLASH_IPC", None)
    _restore_library_path()
    # A process that was started with `variables` has the same level; the boot loader's own child has its pid's folder.
    first = _pid_of(os.path.basename(home()))  # noqa: PTH119 (pathlib costs more than all of this)
    if os.environ.pop("VMWRAPPER_AGAIN", "") or first is None:
        return
    _owner = True
    if os.name == "posix":
        _die_with(first)
    else:
        _watch_on_windows(first)


def home() -> str:
    """The unpacked folder; "" when not frozen."""
    return str(getattr(sys, "_MEIPASS", ""))


def variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What to add to `environment` so that this executable can be started again in the unpacked folder."""
    if not is_frozen():
        return {}
    found = {**_boot, _LEVEL: _SECOND_PROCESS, "VMWRAPPER_AGAIN": "1"}
    if sys.platform.startswith("linux"):
        before = environment.get(LIBRARY_PATH)
        found[LIBRARY_PATH] = f"{home()}:{before}" if before else home()
    return found


def protect() -> None:
    """Before HostMain or a supervisor starts: if only this process is killed, the boot loader cannot remove the folder.

    They save and end in order then, and the next run in the slot removes it. (root can always remove it; HostMain then
    saves nothing, and the checkpoint's snapshot counts.)
    """
    global _protected  # noqa: PLW0603
    if _owner and not _protected and os.name == "posix":
        _protected = True
        _set_modes(home(), 0o500)


def end() -> None:
    """Last thing in the program: the boot loader may remove the folder."""
    global _protected  # noqa: PLW0603
    if _protected:
        _protected = False
        _set_modes(home(), 0o700)


def remove_stale(folder: Path) -> list[str]:
    """Remove what killed runs unpacked into a slot; the names. Only when nothing of them runs any more."""
    if not is_frozen() or not _owner:
        return []
    import shutil

    ours = os.path.basename(home())  # noqa: PTH119
    removed = []
    for name in sorted(os.listdir(folder)):  # noqa: PTH208
        pid = _pid_of(name)
        path = os.path.join(folder, name)  # noqa: PTH118
        if pid is None or name == ours or os.path.islink(path) or _is_this_program(pid):  # noqa: PTH114
            continue
        _set_modes(path, 0o700)
        shutil.rmtree(path, ignore_errors=True)
        removed.append(name)
    return removed


# --- inside


def _restore_library_path() -> None:
    """As it was before the boot loader put its folder in front."""
    parts = os.environ.get(LIBRARY_PATH, "").split(":")
    if parts[0] != home():
        return
    if parts[1:]:
        os.environ[LIBRARY_PATH] = ":".join(parts[1:])
        os.environ.pop("LD_LIBRARY_PATH_ORIG", None)
    else:
        del os.environ[LIBRARY_PATH]


def _pid_of(name: str) -> int | None:
    """The boot loader's pid in the name of an unpacked folder; None: it is no such folder."""
    if not name.startswith(_PREFIX) or len(name) != _NAME_LENGTH:
        return None
    try:
        return int(name[len(_PREFIX) : len(_PREFIX) + _PID_DIGITS], 16)
    except ValueError:
        return None


def _is_this_program(pid: int) -> bool:
    try:
        return os.path.samefile(f"/proc/{pid}/exe", sys.executable)  # noqa: PTH121
    except OSError:
        return False


def _set_modes(folder: str, mode: int) -> None:
    for path, _, _ in os.walk(folder, topdown=True):
        try:
            os.chmod(path, mode)  # noqa: PTH101
        except OSError:
            continue


def _die_with(first: int) -> None:
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    elif sys.platform == "darwin":
        _watch_on_macos(first)
    if os.getppid() != first:  # it was killed before the kernel knew
        os._exit(1)


def _watch_on_macos(pid: int) -> None:
    """Never run. A thread that waits for the first process's end."""
    if sys.platform == "darwin":
        import select
        import threading

        def wait() -> None:
            queue = select.kqueue()
            event = select.kevent(pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)
            queue.control([event], 1)
            os.kill(os.getpid(), _SIGKILL)

        threading.Thread(target=wait, daemon=True).start()


def _watch_on_windows(pid: int) -> None:
    """Never run. A thread that waits for the first process's end; the client terminates only that one."""
    if sys.platform == "win32":
        import ctypes
        import threading

        synchronize, infinite = 0x00100000, 0xFFFFFFFF
        handle = ctypes.windll.kernel32.OpenProcess(synchronize, False, pid)

        def wait() -> None:
            ctypes.windll.kernel32.WaitForSingleObject(handle, infinite)
            os._exit(1)

        if handle:
            threading.Thread(target=wait, daemon=True).start()
