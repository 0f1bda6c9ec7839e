"""What a task runs in a container, decided as Docker does from the image's configuration and the job file. Pure.

    command         the whole decision; BadContainer when the image cannot run the task
    argv, environment, workdir, stop_signal     its parts

The disk's configuration comes from who made the container: it is text, checked for its types by
`vmcontrol.common.containerdisk`, and nothing here trusts it to make sense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from vmcontrol.common.containerdisk import ContainerConfig, ContainerDisk
from vmcontrol.protocol.container import ContainerRun, check_workdir
from vmwrapper.job import commandline
from vmwrapper.job.model import Task
from vmwrapper.vm.decisions import command_of

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""PATH of a container whose image has none (moby, oci/caps and daemon/container_operations: DefaultPathEnv)."""
DEFAULT_WORKDIR = "/app"
"""Of an image without WorkingDir, or with `/`, over which no folder can be laid."""

_SIGTERM, _RTMIN, _RTMAX = 15, 34, 64
_SIGNALS = tuple(
    """HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT STOP TSTP TTIN TTOU URG
    XCPU XFSZ VTALRM PROF WINCH IO PWR SYS""".split()  # noqa: SIM905
)
"""Of Linux, in the order of their numbers: the guest's, not those of the computer that the wrapper runs on."""
_NUMBERS = {name: number for number, name in enumerate(_SIGNALS, 1)} | {"IOT": 6, "CLD": 17, "POLL": 29}
_REAL_TIME = re.compile(r"RT(MIN|MAX)(?:([+-])([0-9]{1,2}))?")


class BadContainer(Exception):  # noqa: N818
    """The container cannot run the task; `str`: why, and what to do."""


@dataclass(frozen=True, slots=True)
class ContainerCommand:
    """A command in a container, as runCommand takes it."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    run: ContainerRun

    def to_struct(self) -> dict[str, object]:
        """What differs from the request of a command in the guest itself."""
        return {
            "command": self.argv[0],
            "arguments": list(self.argv[1:]),
            "environment": dict(self.environment),
            "container": {name.replace("-", "_"): value for name, value in self.run.to_json().items()},
        }


def command(task: Task, disk: ContainerDisk, further: Sequence[str] = ()) -> ContainerCommand:
    """What a task runs. further: words of vmwrapper's own command line. Raises BadContainer."""
    if task.guest is None:
        raise ValueError(f"{task.title} is no guest task")
    config = disk.config
    words = argv(task, config, further)
    folder = workdir(config, task.guest.container_workdir)
    stop = stop_signal(config.stop_signal)
    if config.uid is None or config.gid is None:
        raise BadContainer(
            f"its USER {config.user!r} does not exist in the image {disk.image!r}: build it with that user"
        )
    try:
        run = ContainerRun(
            disk=disk.id,
            workdir=folder,
            uid=config.uid,
            gid=config.gid,
            groups=tuple(config.groups),
            stop_signal=stop,
            network=task.guest.settings.network,
        )
    except ValueError as error:
        raise BadContainer(f"its configuration cannot be used: {error}") from error
    return ContainerCommand(words, environment(config.env, task.variables), run)


def argv(task: Task, config: ContainerConfig, further: Sequence[str] = ()) -> tuple[str, ...]:
    """Entrypoint and Cmd. command_line takes Cmd's place; application replaces Entrypoint and drops Cmd.

    further: appended; never in Cmd's place. Raises BadContainer when nothing is there to run.
    """
    given = tuple(commandline.split(task.command_line))
    words = (command_of(task), *given) if task.application else (*config.entrypoint, *(given or config.cmd))
    if not words or not words[0]:
        raise BadContainer(
            "there is nothing to run: the image has neither Entrypoint nor Cmd, and the task no <application>"
        )
    return (*words, *further)


def environment(image: Sequence[str], own: Mapping[str, str]) -> dict[str, str]:
    """Env of the image, PATH if it has none, and setenv over both. HOME is set in the guest, of the user's passwd."""
    variables = {"PATH": DEFAULT_PATH}
    variables |= {name: value for name, equals, value in (one.partition("=") for one in image) if name and equals}
    return variables | dict(own)


def workdir(config: ContainerConfig, own: str = "") -> str:
    """The working folder: that of the job file, else the image's, else /app. Raises BadContainer."""
    folder = own or _plain(config.workdir) or DEFAULT_WORKDIR
    try:
        check_workdir(folder)
    except ValueError as error:
        raise BadContainer(
            f"its working folder cannot be used ({error}): name another by <container_workdir>"
        ) from error
    return folder


def _plain(folder: str) -> str:
    """WorkingDir as Docker cleans it: from the root, without `.`, `..` and doubled slashes. "": it is the root."""
    parts: list[str] = []
    for part in PurePosixPath(folder).parts:
        if part == "..":
            del parts[-1:]
        elif part.strip("/"):
            parts.append(part)
    return "".join(f"/{part}" for part in parts)


def stop_signal(text: str) -> int:
    """The number of a signal of Linux, by name or number, as StopSignal has it; none: TERM. Raises BadContainer."""
    name = text.strip().upper().removeprefix("SIG")
    number = int(name) if name.isascii() and name.isdigit() and len(name) < 4 else _NUMBERS.get(name, 0)
    if not name:
        number = _SIGTERM
    elif found := _REAL_TIME.fullmatch(name):
        number = _RTMIN if found[1] == "MIN" else _RTMAX
        number += int(f"{found[2]}{found[3]}") if found[2] else 0
        number = number if _RTMIN <= number <= _RTMAX else 0
    if not 1 <= number <= _RTMAX:
        raise BadContainer(f"its StopSignal {text[:40]!r} is no signal of Linux")
    return number
