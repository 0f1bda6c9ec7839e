"""Start a program that must not outlive us and must not be ended behind our back: set up a process, then exec.

For QEMU, the broker's supervisor and others that are ended through a protocol of their own. Between fork and exec:
  1. TERM, INT and HUP are blocked. systemd ends boinc-client by TERM to every process of its group while we are still
     saving; a blocked signal stays blocked across exec.
  2. On Linux the kernel is asked to KILL the process when its parent dies (prctl(2), PR_SET_PDEATHSIG). If the parent
     died before that, the process ends at once. The signal comes when the **thread** that spawned it ends: spawn from
     the reactor's thread only.
  3. Optionally a session and process group of its own, so that a terminal's Ctrl-C does not reach it.
Then the program replaces this one under the same pid, with the inherited files.

Use `command`; it returns what to spawn. This file is also run as a script (`python -I -S launch.py ...`, or
`python -m vmcontrol.common.launch`), so it imports little. A frozen program has no `-m`: it calls `run_if_asked` first
thing.

Owns nothing. Not run on anything but Linux: elsewhere on POSIX step 2 is left out, on Windows all of it.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # every import here is paid at each start of a VM
    from collections.abc import Mapping, Sequence
    from typing import NoReturn

ASKED = "VMWRAPPER_LAUNCH"
"""Environment variable that makes a frozen program a launcher; its value is the options, separated by blanks."""

NOT_FOUND, NOT_EXECUTABLE, PARENT_GONE = 127, 126, 125
"""Exit statuses of the launcher itself; the first two are a shell's."""

_BLOCKED = ("SIGTERM", "SIGINT", "SIGHUP")
_PR_SET_PDEATHSIG, _SIGKILL = 1, 9  # linux/prctl.h, signal(7)


def command(
    program: Sequence[str], *, session: bool = True, die_with_parent: bool = True
) -> tuple[list[str], dict[str, str]]:
    """The argument list that starts `program` this way, and variables to add to its environment.

    The caller of `spawnProcess` has to be this very process. `program[0]` is looked up on PATH.
    """
    if os.name != "posix":
        return list(program), {}
    options = ["--session"] if session else []
    if die_with_parent:
        options.append(f"--parent={os.getpid()}")
    if getattr(sys, "frozen", False):
        from vmcontrol.common import frozen

        return [sys.executable, *program], {ASKED: " ".join(["--launch", *options]), **frozen.variables()}
    script = os.path.abspath(__file__)  # noqa: PTH100 (pathlib would triple the time this file takes)
    return [sys.executable, "-I", "-S", script, *options, "--", *program], {}


def run_if_asked(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> None:
    """First line of a frozen program: become the launched program if that is what we were started for, else return."""
    asked = environment.get(ASKED)
    if asked:
        os.environ.pop(ASKED, None)
        main([*asked.split(), "--", *arguments])


def main(arguments: Sequence[str]) -> NoReturn:
    """Become the program after `--`. Exits with one of our statuses and a line on stderr if that cannot be done."""
    import signal

    options, program = _parted(arguments)
    signal.pthread_sigmask(signal.SIG_BLOCK, {getattr(signal, name) for name in _BLOCKED})
    for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores these two, and exec would hand that on
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    if "--session" in options and os.getsid(0) != os.getpid():
        try:  # noqa: SIM105 (contextlib is not imported for this)
            os.setsid()
        except PermissionError:
            pass  # a group leader already: that is nearly as good
    for option in options:
        if option.startswith("--parent="):
            _die_with(int(option.removeprefix("--parent=")))
    try:
        os.execvp(program[0], program)  # noqa: S606 (no shell is the point)
    except OSError as error:
        print(f"{program[0]}: {error.strerror}", file=sys.stderr)  # noqa: T201 (the one way to tell the caller)
        os._exit(NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE)


def _parted(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments or arguments[-1] == "--":
        sys.exit("usage: launch [--session] [--parent=PID] -- PROGRAM [ARGUMENTS...]")
    at = list(arguments).index("--")
    return list(arguments[:at]), list(arguments[at + 1 :])


def _die_with(parent: int) -> None:
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it died before the kernel knew; nobody would ever end us
        os._exit(PARENT_GONE)


if __name__ == "__main__":
    main(sys.argv[1:])
