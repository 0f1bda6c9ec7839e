"""The decisions of a guest task, without any I/O: how its VM comes up, whether its command is sent, what its end means.

Pure: facts in, a decision out. `vmwrapper.vm.machine` and `vmwrapper.vm.task` carry them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from vmwrapper.errors import BadInput, GuestOutOfMemory, JobError, TaskFailed
from vmwrapper.job.model import NCPUS, GuestOptions, Job, Task
from vmwrapper.names import snapshot_number
from vmwrapper.state.checkpoint import GuestProgress, Phase, SnapshotRecord, VmRecord

if TYPE_CHECKING:
    from vmcontrol.protocol.command import CommandStatus

LIVE = frozenset({"Starting", "Running", "Paused", "Saving", "Restoring"})
DEAD = ("PoweredOff", "Aborted", "Saved", "Stopping", "Stuck")
"""States in which a VM that should run does not."""
ENDED = tuple(state for state in DEAD if state != "Stopping")
"""Those that say how it ended; from Stopping it goes on to one of them."""
TAIL_LINES = 20
_GUEST_SIGKILL = 9
"""The guest is Linux, whatever the host is: Windows has no signal.SIGKILL."""


class Way(StrEnum):
    """How a VM gets to run."""

    CREATE = "create"
    """It is not there: made and booted."""
    RECREATE = "recreate"
    """What is there belongs to no state that we know: deleted, made anew and booted."""
    BOOT = "boot"
    """Not ours: switched on as it is."""
    RESTORE = "restore"
    """Back to the checkpoint's snapshot, and on from there."""
    RESUME = "resume"
    """Its saved state is the newest there is."""
    TAKE_OVER = "take over"
    """It runs, left by a HostMain that was killed: its memory is the newest state there is."""


@dataclass(frozen=True, slots=True)
class StartPlan:
    way: Way
    snapshot: str = ""
    """For RESTORE."""
    entry: SnapshotRecord | None = None
    """What the checkpoint knows of that snapshot."""
    rolled_back: bool = False
    """What was sent may be unknown to the guest because its state is older, not because it never arrived."""
    why: str = ""
    """For stderr.txt."""


def plan_start(record: VmRecord, state: str | None, snapshots: Sequence[str], unusable: str = "") -> StartPlan:
    """How to bring a VM up. state: what the hypervisor says; None: it does not know the VM.

    unusable: why nothing of it can be used any more (its image was replaced), a saved state or snapshot neither.

    The newest consistent state counts: memory that still runs, else a saved state, else the checkpoint's snapshot (or a
    newer one of ours, when the checkpoint is an older generation), else the beginning.
    """
    if unusable and record.ours and state is not None and state not in LIVE:
        return StartPlan(Way.RECREATE, rolled_back=True, why=f"{unusable}: it is made anew")
    return _from_newest(record, state, snapshots)


def _from_newest(record: VmRecord, state: str | None, snapshots: Sequence[str]) -> StartPlan:
    if state == "Saved":
        return StartPlan(Way.RESUME, why="its saved state is resumed")
    if state in LIVE:
        return StartPlan(Way.TAKE_OVER, why="it still runs and is taken over")
    if not record.ours:
        return StartPlan(Way.BOOT, rolled_back=True, why="it is switched on")
    lost = "its saved state is gone; " if record.saved_state_expected else ""
    if state is None:
        return StartPlan(Way.CREATE, rolled_back=True, why=lost + "it is made")
    entry = next((one for one in reversed(record.snapshots) if one.name in snapshots), None)
    # One that the checkpoint does not name is nothing, unless those that it names are gone: then it is an older one.
    newest = newest_snapshot(snapshots) if record.snapshots else ""
    chosen = entry.name if entry is not None else newest
    if chosen:
        older = "" if chosen == (record.snapshot or chosen) else f"{record.snapshot} is gone; "
        return StartPlan(Way.RESTORE, chosen, entry, rolled_back=True, why=f"{lost}{older}back to snapshot {chosen}")
    return StartPlan(Way.RECREATE, rolled_back=True, why=f"{lost}it is {state} and has no snapshot: made anew")


def newest_snapshot(snapshots: Sequence[str]) -> str:
    """The newest of our snapshots; empty when there is none."""
    ours = [(number, name) for name in snapshots if (number := snapshot_number(name)) is not None]
    return max(ours)[1] if ours else ""


@dataclass(frozen=True, slots=True)
class Watch:
    """The agent has it: wait for its end."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Send:
    """Send it with this attempt."""

    attempt: int
    copy_files: bool
    """The application and its input have to be copied in (again)."""
    rollback: str = ""
    """Why this is another attempt; for stderr.txt."""


def next_step(progress: GuestProgress, known: CommandStatus | None) -> Watch | Send:
    """What to do about the command, by what the agent knows of it. Only what is unknown to it is sent."""
    state = known.state if known is not None else "unknown"
    seen = known.attempt if known is not None else 0
    if state in ("running", "finished"):
        return Watch(seen)
    if state in ("lost", "refused"):
        detail = known.detail if known is not None else ""
        return Send(max(progress.attempt, seen) + 1, copy_files=True, rollback=f"the guest calls it {state} ({detail})")
    if progress.phase is Phase.PREPARING:
        again = "the guest went back to a state before it" if progress.attempt > 1 else ""
        return Send(progress.attempt, copy_files=True, rollback=again)
    return Send(progress.attempt, copy_files=False)


def foreign(commands: Sequence[CommandStatus], current: str) -> list[CommandStatus]:
    """Commands that the agent knows and that are not the current one: to be cancelled or forgotten first."""
    return [command for command in commands if command.id != current and command.state != "unknown"]


# --- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Copy:
    """A file to copy: `logical` on the host, `remote` in the guest."""

    logical: str
    remote: str
    executable: bool = False
    what: str = "copy_file_to_VM"
    """The element that names it, for messages."""


def remote_name(logical: str) -> str:
    """The name in the guest of a file of the slot: the logical name, relative to the agent's folder."""
    return str(PurePosixPath(logical))


def files_in(task: Task) -> list[Copy]:
    """What goes into the guest before the command, each once, the application first."""
    guest = _guest(task)
    copies: list[Copy] = []
    if guest.copy_app_to_vm:
        copies.append(Copy(task.application, remote_name(task.application), executable=True, what="application"))
    copies += [Copy(name, remote_name(name)) for name in guest.copy_files_to_vm]
    if task.stdin_filename:
        copies.append(Copy(task.stdin_filename, remote_name(task.stdin_filename), what="stdin_filename"))
    seen: set[str] = set()
    return [copy for copy in copies if not (copy.remote in seen or seen.add(copy.remote))]  # type: ignore[func-returns-value]


def files_out(task: Task) -> list[Copy]:
    """What comes out of the guest after the command, streams apart, each once."""
    streams = {task.stdout_filename, task.stderr_filename}
    names = dict.fromkeys(name for name in _guest(task).copy_files_from_vm if name not in streams)
    return [Copy(name, remote_name(name), what="copy_file_from_VM") for name in names]


def command_of(task: Task) -> str:
    """The program to run in the guest: where it was copied to, or where it is."""
    guest = _guest(task)
    if guest.copy_app_to_vm:
        return f"./{remote_name(task.application)}"
    if guest.app_path_vm:
        return str(PurePosixPath(guest.app_path_vm) / remote_name(task.application))
    return task.application


def request(task: Task, progress: GuestProgress, arguments: Sequence[str], attempt: int) -> dict[str, object]:
    """runCommand's struct."""
    return {
        "id": progress.command_id,
        "attempt": attempt,
        "command": command_of(task),
        "arguments": list(arguments),
        "environment": task.variables,
        "folder": None,
        "stdin": remote_name(task.stdin_filename) if task.stdin_filename else "",
        "fraction_done_file": task.fraction_done_filename,
    }


def missing_inputs(job: Job, unzip_done: int, tasks_done: int, fault_of: Callable[[str], str]) -> list[BadInput]:
    """Files that a guest task needs, that are not there, and that nothing which still runs before it can make.

    fault_of: why a logical name does not lead to an input file, after the name; "" when it does. Host tasks and unzip
    tasks can make anything.
    """
    if unzip_done < len(job.unzip_tasks):
        return []
    complaints: list[BadInput] = []
    made: set[str] = set()
    for task in job.tasks[tasks_done:]:
        if task.guest is None:
            break
        needed = [(copy.logical, copy.what) for copy in files_in(task)]
        if task.guest.image:
            needed.append((task.guest.image, "image"))
        if task.guest.container:
            needed.append((task.guest.container, "container"))
        complaints += [
            bad_input(job.source, task, name, what, fault)
            for name, what in needed
            if remote_name(name) not in made and (fault := fault_of(name))
        ]
        made |= {remote_name(name) for name in (task.stdout_filename, task.stderr_filename) if name}
        made |= {copy.remote for copy in files_out(task)}
    return complaints


def users(job: Job) -> tuple[str, ...]:
    """For each task the VM that it uses, "" for none."""
    return tuple(task.guest.virtualmachine if task.guest is not None else "" for task in job.tasks)


def bad_input(source: str, task: Task, name: str, what: str, fault: str) -> BadInput:
    """An input file on the host that cannot be used. what: the element that names it. fault: why, after the name."""
    return BadInput(f"{source}:{task.line}: <{what}>: {name} {fault}")


# --- the end ---------------------------------------------------------------------------------------------------------


def verdict(task: Task, result: Mapping[str, Any], *, time_limit_reached: bool) -> JobError | None:
    """What the result of the command means for the job; None: the task's program did its work.

    A program that its time_limit ended counts as done, as with BOINC's wrapper.
    """
    name = task.title
    error = str(result.get("error") or "")
    if error:
        return TaskFailed(f"{name} could not be started in the guest: {error}")
    status, by_signal = result.get("exit_status"), result.get("signal")
    if result.get("out_of_memory"):
        return GuestOutOfMemory(
            f"the guest ran out of memory and its kernel killed {name}; memory_size_mb is "
            f"{_guest(task).settings.memory_mb} (line {task.line})"
        )
    if time_limit_reached or status == 0:
        return None
    if by_signal is not None:
        return TaskFailed(f"{name} was ended by signal {by_signal} in the guest")
    return TaskFailed(f"{name} failed in the guest with exit status {status}")


def was_killed(result: Mapping[str, Any], *, time_limit_reached: bool) -> bool:
    """Whether KILL ended the program, and neither want of memory nor its time limit was the reason: no end of its own
    making. Other signals (SEGV, ABRT, TERM, ...) are a failure of the program."""
    return result.get("signal") == _GUEST_SIGKILL and not result.get("out_of_memory") and not time_limit_reached


def tail(text: str, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a program's output, for stderr.txt."""
    return [line for line in text.splitlines() if line.strip()][-lines:]


def wanted_cpus(guest: GuestOptions, ncpus: float) -> int:
    """How many processors the VM is to have. ncpus: of init_data.xml, or of --nthreads."""
    return guest.settings.cpus if guest.settings.cpus != NCPUS else max(1, int(ncpus))


def capped_cpus(guest: GuestOptions, wanted: int, most: int) -> tuple[int, str]:
    """Processors of the VM, and a line when they are fewer than the client gives to the job.

    most: what the hypervisor takes. A number that the job file names is not changed: it is refused when the VM is made.
    """
    if guest.settings.cpus != NCPUS or wanted <= most:
        return wanted, ""
    given = f"the client gives {wanted} processors to this job"
    return most, f"{given}, and the hypervisor takes at most {most}: the VM gets {most}"


def _guest(task: Task) -> GuestOptions:
    if task.guest is None:
        raise ValueError(f"{task.title} is no guest task")
    return task.guest
