"""Run commands, each under a supervisor process of its own (guest/commands/supervisor.py). Knows nothing of messages
or of the ids' rules.

Standard output and error go straight to files in the state folder, never through the agent, so their size does not
matter. Owns those files: they are there from the start of a command until `drop_output`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from twisted.internet import defer
from twisted.internet.defer import Deferred

from guest.commands import outputtext
from guest.commands.contained import ContainedCommand
from guest.commands.supervised import SupervisedCommand
from guest.containers.client import ContainerHelper
from vmcontrol.common import eventloop, frozen, proctable
from vmcontrol.common.supervisor import KILL_LIMIT_S, become_subreaper
from vmcontrol.protocol.messages import CommandRun

log = logging.getLogger(__name__)

OVERDUE_S = 2 * KILL_LIMIT_S + 5.0
"""After the grace of a cancel: a supervisor whose command has not ended by then was stopped by it, and is killed."""
STOP_LIMIT_S, KILLED_LIMIT_S = 15.0, 3.0
"""For all supervisors to end when the agent goes (their own limit for killing is KILL_LIMIT_S), and to be gone when
they are killed after that."""
WARM_UP_AFTER_S = 0.5
"""After a command's end: its result and the copying of its outputs come first."""
ERROR_LIMIT = 2048
"""Characters of `error`."""
SUPERVISOR_DIED = "agent-fault"

_BOOTSTRAP = """
import sys
sys.path.append(sys.argv[1])
package = type(sys)("guest")
package.__path__ = [sys.argv[1] + "/guest"]
sys.modules["guest"] = package
from guest.commands.supervisor import main
main()
"""
"""Imports the supervisor without what guest/__init__.py does for the agent: its start is part of every command."""
_PACKAGES = str(Path(__file__).absolute().parents[2])
SUPERVISOR = ["-I", "-S", "-c", _BOOTSTRAP, _PACKAGES]
"""Arguments of the interpreter."""

SUPERVISOR_MARK = "VMMAIN_SUPERVISOR"
"""Environment variable that makes the frozen agent's executable a supervisor (packaging/vmmain.py)."""


_NOT_STARTED: dict[str, Any] = {
    "exit_status": None,
    "signal": None,
    "resources": {},
    "cpu_time_s": 0.0,
    "peak_memory_bytes": 0,
    "elapsed_s": 0.0,
    "cancelled": False,
}
"""Of a result, when there is no more to say."""


class Listener(Protocol):
    """Who wants to know. Called on the reactor; `ended` comes exactly once for each start."""

    def command_started(self, id: str, attempt: int, pid: int) -> None: ...
    def command_sampled(self, id: str, attempt: int, sample: Mapping[str, Any]) -> None: ...
    def command_ended(self, id: str, attempt: int, body: Mapping[str, Any]) -> None: ...


class Runner:
    """Starts, ends and accounts for commands.

    base_folder: what copies are relative to. working_folder: where commands run that name no folder.
    """

    def __init__(
        self,
        reactor: Any,
        listener: Listener,
        *,
        base_folder: Path,
        working_folder: Path,
        state_folder: Path,
        containers: ContainerHelper | None = None,
    ) -> None:
        self._reactor = reactor
        self._listener = listener
        self._base = base_folder
        self._working = working_folder
        self._state = state_folder
        self._containers = containers
        self._running: dict[tuple[str, int], SupervisedCommand] = {}
        self._spare: SupervisedCommand | None = None
        """A supervisor that waits for a request: under emulation its start takes a third of a second."""
        self._stopping = False

    def prepare(self, keep: set[tuple[str, int]]) -> None:
        """Make the state folder and remove outputs of an earlier agent, but those of the commands in `keep`."""
        self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = {path.name for key in keep for path in self._outputs(*key)}
        for path in self._state.iterdir():
            if path.suffix in {".out", ".err"} and path.name not in names:
                _remove(path)
        if not become_subreaper():
            log.warning("this kernel has no child subreapers: orphans of commands may survive them")

    def start(self, run: CommandRun) -> None:
        """Start a command; whatever goes wrong is told by `command_ended`."""
        folder = self._working
        if run.folder is not None:
            folder = self._working / os.path.expanduser(run.folder)  # noqa: PTH111 (a ~nobody stays as it is)
        stdout, stderr = self._outputs(run.id, run.attempt)
        request = {
            "command": run.command,
            "arguments": list(run.arguments),
            "environment": dict(run.environment),
            "folder": str(folder),
            "places": [str(folder), str(self._base)],
            "stdin": run.stdin,
            "stdout": str(stdout),
            "stderr": str(stderr),
            "fraction_done_file": run.fraction_done_file,
        }
        log.info("command %s (attempt %d): %s", run.id, run.attempt, run.command)
        if run.container is None:
            supervisor, self._spare = self._spare or SupervisedCommand(self), None
        else:
            supervisor = ContainedCommand(self)
        supervisor.run = run
        supervisor.alone = not self._running
        for other in self._running.values():
            other.alone = False
        self._running[(run.id, run.attempt)] = supervisor
        if supervisor.pid is None:
            try:
                if isinstance(supervisor, ContainedCommand):
                    supervisor.open(self._reactor, self._containers)
                else:
                    self._spawn(supervisor)
            except OSError as error:
                last = {"failed": SUPERVISOR_DIED, "detail": f"the supervisor was not started: {error}"}
                # Later: the caller learns first that it runs.
                self._reactor.callLater(0, self.supervisor_ended, supervisor, last)
                return
        supervisor.say(request)

    def warm_up(self) -> None:
        """Have a supervisor wait for the next command. To be called when the agent has nothing better to do."""
        if self._spare is not None or self._running or self._stopping:
            return  # beside a running command it would only take memory and processor from it
        self._spare = SupervisedCommand(self)
        try:
            self._spawn(self._spare)
        except OSError as error:
            log.warning("no supervisor was started: %s", error)
            self._spare = None

    def _spawn(self, supervisor: SupervisedCommand) -> None:
        command, environment = [sys.executable, *SUPERVISOR], dict(os.environ)
        if frozen.is_frozen():
            command, environment = [sys.executable], environment | {SUPERVISOR_MARK: "1", **frozen.variables()}
        streams = {0: "w", 1: "r", 2: 2}
        self._reactor.spawnProcess(supervisor, command[0], command, env=environment, childFDs=streams)

    def end(self, id: str, attempt: int, grace_s: float) -> None:
        """TERM to the command's whole tree, KILL to what is left after the grace. Harmless when it has ended.

        A command can stop its supervisor, which then obeys nobody: it is killed in the end, and the command after it.
        """
        supervisor = self._running.get((id, attempt))
        if supervisor is not None:
            log.info("command %s (attempt %d): ended on request, grace %g s", id, attempt, grace_s)
            grace_s = max(0.0, min(grace_s, 86400.0))
            supervisor.say({"cancel": grace_s})
            supervisor.end_by(self._reactor, self._reactor.seconds() + grace_s + OVERDUE_S)

    def drop_output(self, id: str, attempt: int) -> None:
        """Nobody wants its output any more."""
        for path in self._outputs(id, attempt):
            _remove(path)

    def not_started(self, id: str, attempt: int, detail: str) -> dict[str, Any]:
        """The result of a command that was not started for a reason of the agent's."""
        return self._body(id, attempt, {"failed": SUPERVISOR_DIED, "detail": detail}, alone=True)

    def with_output(self, body: Mapping[str, Any], limit: int) -> dict[str, Any]:
        """A result with the text of its outputs in `out` and `err`, as in 2009; at most `limit` bytes of each."""
        if "stdout_path" not in body:
            return dict(body)
        out = outputtext.inline(str(self._base / body["stdout_path"]), limit)
        err = outputtext.inline(str(self._base / body["stderr_path"]), limit)
        if body["error"]:
            err += body["error"] + "\n"
        return {**body, "out": out, "err": err}

    async def stop(self) -> None:
        """Kill everything; back when it is gone, at most STOP_LIMIT_S + KILLED_LIMIT_S later."""
        self._stopping = True
        supervisors = [*self._running.values(), *([self._spare] if self._spare is not None else [])]
        for limit_s, end in ((STOP_LIMIT_S, SupervisedCommand.let_go), (KILLED_LIMIT_S, SupervisedCommand.kill)):
            supervisors = [supervisor for supervisor in supervisors if not supervisor.gone.is_set()]
            if not supervisors:
                return
            for supervisor in supervisors:
                end(supervisor)
            everything: Deferred[Any] = defer.DeferredList(
                [supervisor.gone.wait() for supervisor in supervisors], consumeErrors=True
            )
            try:
                await eventloop.with_limit(self._reactor, limit_s, "the end of commands", everything)
            except eventloop.LimitReached as error:
                log.error("%s", error)

    # --- from the supervisors -----------------------------------------------------------------------------------------

    def supervisor_said(self, supervisor: SupervisedCommand, message: Mapping[str, Any]) -> None:
        run = supervisor.run
        if run is None:
            return
        if "started" in message:
            self._listener.command_started(run.id, run.attempt, message["started"])
        elif "sample" in message:
            self._listener.command_sampled(run.id, run.attempt, message["sample"])

    def supervisor_ended(self, supervisor: SupervisedCommand, last: Mapping[str, Any] | None) -> None:
        """The supervisor's process is gone; `last` is how it said that its command ended, None if it did not."""
        run = supervisor.run
        supervisor.end_by(self._reactor, None)
        if run is None:
            if self._spare is supervisor:
                self._spare = None
            supervisor.gone.set()
            return
        del self._running[(run.id, run.attempt)]
        if last is None:
            self._kill_orphans()
            last = {"failed": SUPERVISOR_DIED, "detail": "the command's supervisor died; the command was killed"}
        supervisor.gone.set()
        body = self._body(run.id, run.attempt, last, alone=supervisor.alone)
        log.info(
            "command %s (attempt %d) ended: %s",
            run.id,
            run.attempt,
            body["error"] or f"exit status {body['exit_status']}, signal {body['signal']}",
        )
        self._listener.command_ended(run.id, run.attempt, body)
        self._reactor.callLater(WARM_UP_AFTER_S, self.warm_up)

    def _outputs(self, id: str, attempt: int) -> tuple[Path, Path]:
        name = f"{hashlib.sha256(id.encode('utf-8', 'surrogatepass')).hexdigest()[:24]}-{attempt}"
        return self._state / f"{name}.out", self._state / f"{name}.err"

    def _relative(self, path: Path) -> str:
        return os.path.relpath(path, self._base)

    def _body(self, id: str, attempt: int, last: Mapping[str, Any], *, alone: bool) -> dict[str, Any]:
        """The result's keys: docs/reference/messages.md."""
        stdout, stderr = self._outputs(id, attempt)
        body: dict[str, Any] = {
            "cmd-id": id,
            "attempt": attempt,
            "stdout_path": self._relative(stdout),
            "stderr_path": self._relative(stderr),
            "stdout_size": _size(stdout),
            "stderr_size": _size(stderr),
            "stderr_tail": outputtext.tail(str(stderr)),
        }
        ended, error, out_of_memory = last.get("ended"), "", False
        if ended is None:
            now = time.time()
            ended = _NOT_STARTED | {"started": now, "ended": now}
            error, code = f"{last['failed']}: {_short(str(last['detail']))}", -1  # as the agent of protocol 1 said it
        else:
            if ended["left"]:
                log.error("command %s: %d of its processes cannot be killed", id, ended["left"])
            code = ended["signal"] if ended["exit_status"] is None else ended["exit_status"]
            # The kernel counts for the whole guest: with other commands beside it, it must be seen killed as well.
            seen = ended["killed_by_kernel"] or alone
            out_of_memory = bool(ended["killed_for_memory"] and ended["exit_status"] != 0 and seen)
        return body | {
            "error": error,
            "finished": ended["exit_status"] == 0,
            "exitCodeOrSignal": code,
            "out_of_memory": out_of_memory,
            **{name: ended[name] for name in (*_NOT_STARTED, "started", "ended")},
        }

    def _kill_orphans(self) -> None:
        """Kill what a dead supervisor left: the agent is its subreaper, so that is all below it but the other ones."""
        known = {one.pid for one in (*self._running.values(), self._spare) if one is not None}
        for _ in range(20):
            table = proctable.look()
            orphans = [entry.pid for entry in table.values() if entry.parent == os.getpid() and entry.pid not in known]
            if not orphans:
                return
            for entry in proctable.below(table, orphans):
                proctable.kill(entry)
            for pid in orphans:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)


def _remove(path: Path) -> None:
    """What cannot be removed (a folder that a command made there, say) stays, and no harm is done."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: %s", path, error.strerror)


def _short(text: str) -> str:
    """A command's name stands in it, which may be megabytes: the result must fit a message."""
    return text if len(text) <= ERROR_LIMIT else f"{text[:ERROR_LIMIT]} [cut: {ERROR_LIMIT} of {len(text)} characters]"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
