"""Starting one program in the guest: finding it, opening its files, fork and exec, with errors that name what is wrong.

Used by the keeper only, which has one thread. The environment is the agent's with the request's added; the program gets
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
if TYPE_CHECKING:  # without importing typing: each keeper starts with this module
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
    """Start it; the pid of the new process, whose session is its own. Raises LaunchError."""
    if not os.path.isdir(program.folder):  # noqa: PTH112
        raise LaunchError(FOLDER_MISSING, f"{program.folder} is no folder")
    environment = {**os.environ, **program.environment}
    path = find_application(program, environment.get("PATH", os.defpath))
    with _Files(program) as files:
        return _fork(path, program, environment, files.fds)


class _Files:
    """The three standard streams, open; closed again in this process at the end."""

    def __init__(self, program: Program) -> None:
        self.fds: list[int] = []
        self._program = program

    def __enter__(self) -> _Files:
        program = self._program
        stdin = "/dev/null"
        if program.stdin:
            found = find_file(program.stdin, program.places)
            if found is None:
                raise LaunchError(STDIN_MISSING, f"{program.stdin}; {listing(program.places[0])}")
            stdin = found
        new = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._open(STDIN_MISSING, stdin, os.O_RDONLY)
            self._open(NOT_STARTED, program.stdout, new)
            self._open(NOT_STARTED, program.stderr, new)
        except LaunchError:
            self.__exit__()
            raise
        return self

    def _open(self, code: str, path: str, flags: int) -> None:
        try:
            self.fds.append(os.open(path, flags, 0o600))
        except OSError as error:
            raise LaunchError(code, f"{path}: {error.strerror}") from error

    def __exit__(self, *_: object) -> None:
        for fd in self.fds:
            os.close(fd)


def _fork(path: str, program: Program, environment: Mapping[str, str], fds: Sequence[int]) -> int:
    report, report_in_child = os.pipe()  # closed by a successful exec
    pid = os.fork()
    if pid == 0:
        _become(path, program, environment, fds, report_in_child)  # never returns
    os.close(report_in_child)
    with os.fdopen(report, "rb") as file:
        failure = file.read(64)
    if not failure:
        return pid
    os.waitpid(pid, 0)
    number = int(failure)
    if number == errno.ENOEXEC:
        raise LaunchError(
            APPLICATION_NOT_EXECUTABLE, f"{path} is no program of this system, and no script that begins with #!"
        )
    if number == errno.ENOENT:  # the file is there: the kernel means its interpreter
        raise LaunchError(APPLICATION_MISSING, f"{path}: the interpreter that it names is not there")
    code = APPLICATION_NOT_EXECUTABLE if number == errno.EACCES else NOT_STARTED
    raise LaunchError(code, f"{path}: {os.strerror(number)}")


def _become(
    path: str, program: Program, environment: Mapping[str, str], fds: Sequence[int], report: int
) -> None:  # pragma: no cover (runs in the child only)
    number = errno.EINVAL
    try:
        os.setsid()
        try:
            victim = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
            os.write(victim, _VICTIM)
            os.close(victim)
        except OSError:
            pass
        os.chdir(program.folder)
        high = [os.dup(fd) if fd < 3 else fd for fd in fds]
        for target, fd in enumerate(high):
            os.dup2(fd, target)
        for number_of_signal in signal.valid_signals():
            if number_of_signal not in {signal.SIGKILL, signal.SIGSTOP}:
                try:
                    signal.signal(number_of_signal, signal.SIG_DFL)
                except (OSError, ValueError):
                    continue
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.umask(0o022)
        os.execve(path, [program.command, *program.arguments], environment)  # noqa: S606
    except OSError as error:
        number = error.errno or errno.EINVAL
    finally:
        os.write(report, str(number).encode())
        os._exit(127)
