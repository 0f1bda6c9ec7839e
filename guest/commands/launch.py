"""Start one program in the guest: find it, open its files, execute it, with errors that name what is wrong.

Used by the supervisor only. The environment is the agent's with the request's added; the program gets
a session of its own, standard streams and nothing else, default signal handling, and is what the kernel kills first
when memory runs out (so the agent is not).

    LaunchError     `code` is a constant word of docs/reference/messages.md, `str` the sentence
"""

from __future__ import annotations

import errno
import os
import signal
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:  # without importing typing: each supervisor starts with this module
    from collections.abc import Mapping, Sequence

APPLICATION_MISSING = "application-missing"
APPLICATION_NOT_EXECUTABLE = "application-not-executable"
STDIN_MISSING = "stdin-missing"
FOLDER_MISSING = "folder-missing"
NOT_STARTED = "not-started"

LISTED = 20
"""Names that an error lists of the folder in which something is missing."""

_VICTIM = b"1000"  # oom_score_adj of commands, proc(5): the biggest of them is killed first, never the agent


class LaunchError(Exception):
    """The program could not be started."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class Program:
    """What to start. `stdin`: empty for none; `folder` is absolute; relative names are looked for in `places`."""

    def __init__(
        self,
        *,
        command: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: str,
        places: Sequence[str],
        stdin: str,
        stdout: str,
        stderr: str,
    ) -> None:
        self.command = command
        self.arguments = arguments
        self.environment = environment
        self.folder = folder
        self.places = places
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr


def listing(folder: str) -> str:
    """What is in a folder, shortly, for a message."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208
    except OSError as error:
        return f"{folder}: {error.strerror}"
    shown = ", ".join(names[:LISTED]) or "nothing"
    return f"in {folder} there is: {shown}{f' and {len(names) - LISTED} more' if len(names) > LISTED else ''}"


def find_file(name: str, places: Sequence[str]) -> str | None:
    """The absolute path of an existing file: absolute names as they are, others in the first place that has them."""
    for place in places:
        path = os.path.normpath(os.path.join(place, name))  # noqa: PTH118
        if os.path.isfile(path):  # noqa: PTH113
            return path
    return None


def find_executable(name: str, search_path: str) -> str | None:
    """The first executable file of that name in a PATH. (shutil.which, without the import.)"""
    for folder in search_path.split(os.pathsep):
        path = os.path.join(folder or ".", name)  # noqa: PTH118
        if os.path.isfile(path) and os.access(path, os.X_OK):  # noqa: PTH113
            return path
    return None


def find_application(program: Program, search_path: str) -> str:
    """The file to execute. Raises LaunchError.

    With a slash: relative to the working folder, else to the other places. A bare word: by PATH as a shell does, else
    in the places. A file that was copied without an x bit gets one, if it is ours.
    """
    name = program.command
    path = None
    if "/" not in name:
        path = find_executable(name, search_path) if name else None
    if path is None:
        path = find_file(name, program.places) if name else None
    if path is None:
        raise LaunchError(APPLICATION_MISSING, f"{name or 'no application named'}; {listing(program.places[0])}")
    if not os.access(path, os.X_OK):
        try:
            mode = stat.S_IMODE(os.stat(path).st_mode)  # noqa: PTH116
            os.chmod(path, mode | stat.S_IXUSR)  # noqa: PTH101
        except OSError as error:
            raise LaunchError(APPLICATION_NOT_EXECUTABLE, f"{path}: {error.strerror}") from error
    return path


def start(program: Program) -> int:
    """Start it; the pid of the new process, whose session is its own. Raises LaunchError.

    The folder and the umask, which posix_spawn cannot set, become this process's too: it starts nothing else.
    """
    if not os.path.isdir(program.folder):  # noqa: PTH112
        raise LaunchError(FOLDER_MISSING, f"{program.folder} is no folder")
    environment = {**os.environ, **program.environment}
    path = find_application(program, environment.get("PATH", os.defpath))
    fds: list[int] = []
    try:
        open_streams(program.stdin, program.stdout, program.stderr, program.places, fds)
        os.chdir(program.folder)
        os.umask(0o022)
        pid = os.posix_spawn(
            path,
            [program.command, *program.arguments],
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(fds)],
            setsid=True,
            setsigmask=(),
            setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
        )
    except OSError as error:
        raise _launch_error(path, error.errno or errno.EINVAL) from error
    finally:
        for fd in fds:
            os.close(fd)
    _make_victim(pid)
    return pid


def open_streams(stdin_name: str, stdout: str, stderr: str, places: Sequence[str], fds: list[int]) -> None:
    """Append the three standard streams, open. Raises LaunchError."""
    stdin = "/dev/null"
    if stdin_name:
        found = find_file(stdin_name, places)
        if found is None:
            raise LaunchError(STDIN_MISSING, f"{stdin_name}; {listing(places[0])}")
        stdin = found
    new = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for code, path, flags in (
        (STDIN_MISSING, stdin, os.O_RDONLY),
        (NOT_STARTED, stdout, new),
        (NOT_STARTED, stderr, new),
    ):
        try:
            fds.append(os.open(path, flags, 0o600))
        except OSError as error:
            raise LaunchError(code, f"{path}: {error.strerror}") from error


def _make_victim(pid: int) -> None:
    try:
        with open(f"/proc/{pid}/oom_score_adj", "wb") as file:  # noqa: PTH123
            file.write(_VICTIM)
    except OSError:  # it has ended
        pass


def _launch_error(path: str, number: int) -> LaunchError:
    if number == errno.ENOEXEC:
        return LaunchError(
            APPLICATION_NOT_EXECUTABLE, f"{path} is no program of this system, and no script that begins with #!"
        )
    if number == errno.ENOENT:  # the file is there: the kernel means its interpreter
        return LaunchError(APPLICATION_MISSING, f"{path}: the interpreter that it names is not there")
    code = APPLICATION_NOT_EXECUTABLE if number == errno.EACCES else NOT_STARTED
    return LaunchError(code, f"{path}: {os.strerror(number)}")
