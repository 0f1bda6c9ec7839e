"""VMmanage tasks: HostMain, the broker and what else the guest tasks need beside them; started, watched, ended.

Owns these processes, the secrets of the run, and the connection to HostMain. Never touches a VM itself.

Restarts: a broker or a foreign task that dies is started again at once (HostMain and the agents reconnect by
themselves). A HostMain that dies is started again too; under QEMU its VMs died with it, and the guest task then goes
back to the newest consistent state. More than RESTART_LIMIT deaths of one task without a snapshot or a finished task
between them end the job: 208.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError, DeferredList

from vmcontrol.common.atomicfile import write_atomically
from vmcontrol.common.eventloop import Event, LimitReached, start, with_limit
from vmcontrol.common.slotfiles import SECRET
from vmcontrol.protocol import vmends
from vmcontrol.protocol.vmends import VmEnd
from vmwrapper.context.logical_names import LinkRefused, LogicalNames
from vmwrapper.context.readiness import Readiness, Requirement
from vmwrapper.context.streams import streams_of
from vmwrapper.context.waiting import Patience
from vmwrapper.errors import BadInput, SubTaskFailed, TemporaryExit
from vmwrapper.job import commandline
from vmwrapper.job.model import VmManageTask
from vmwrapper.log import quote, size_of, tail_of_file
from vmwrapper.paths import fault_of_input, is_file, what_is_there
from vmwrapper.process import trees
from vmwrapper.process.leftovers import ProcessList, Role
from vmwrapper.process.selfstart import own_program
from vmwrapper.process.supervised import DOOR_FD, Held, kept_command, start_held
from vmwrapper.process.trees import CannotStart, Ended, StreamError, Streams
from vmwrapper.slot import Slot
from vmwrapper.vm import broker_port

if TYPE_CHECKING:
    from vmcontrol.common.door import DoorEndpoint
    from vmwrapper.context.control import Control
    from vmwrapper.vm.hostmain import HostClient

RESTART_LIMIT = 3
HOST_MAIN_REFUSED = 2
"""HostMain's exit status when its arguments or its configuration are wrong (vmcontrol/hostmain/main.py)."""
HOST_MAIN_MAY_PASS = 3
"""The same when it could not begin for something of this computer: a port in use, a full disk."""
HOST_MAIN_LIMIT_S = 60.0
"""For HostMain to say where it listens: a second on an idle computer; a loaded one that has just booted is slow."""
START_PATIENCE_S = 45.0
"""For that: less than `host` waits, so that the reason is told."""
LATER_S = 300
"""Seconds until a computer that HostMain could not work on is tried again."""
SAVE_LIMIT_S = 45.0
"""For saving all VMs at a quit; the client kills everything 60 s after the message."""
DROP_LIMIT_S = 10.0
"""For switching VMs off when nothing has to be kept."""
HOSTMAIN_STORY_BYTES = 12 * 1024
"""Of HostMain's log, at each of its starts, where it has no file of its own."""
KEPT_GRACE_S = 2.0
"""For programs that take a TERM."""
_PORT_DELAY_S = 60
"""The next run chooses another port, if it is ours to choose."""
_PARTING_S = 3.0
"""After its answer to shutdown, HostMain has only to exit."""

log = logging.getLogger(__name__)


@dataclass
class _Managed:
    """One VMmanage task while it runs."""

    task: VmManageTask
    name: str
    held: Held | None = None
    deaths: int = 0
    refusal: str = ""
    """Why the keeper could not start its program."""
    program_ended: Ended | None = None
    """How the program under the keeper ended, as the keeper says; its own end says nothing."""
    stderr_begins: int = 0
    """Bytes that were in its stderr file when it was started."""
    over: Event = field(default_factory=Event)
    """Set while no process of it runs."""


class Management:
    """All VMmanage tasks of the job."""

    def __init__(
        self,
        reactor: Any,
        *,
        slot: Slot,
        source: str,
        tasks: Sequence[VmManageTask],
        names: LogicalNames,
        control: Control,
        process_list: ProcessList,
        ready: Readiness,
        hypervisor: str,
        disk_bound: float = 0.0,
        host_main: Sequence[str] | None = None,
    ) -> None:
        """source: name of the job file, for messages. hypervisor: what the job asks for, or "auto". host_main: another
        command than our own HostMain, in tests.
        """
        self._reactor = reactor
        self._slot = slot
        self._source = source
        self._names = names
        self._control = control
        self._process_list = process_list
        self._ready = ready
        self._hypervisor = hypervisor
        self._disk_bound = disk_bound
        self._host_main_command = host_main
        self._managed = [_Managed(task, _name(task)) for task in tasks]
        self._xmlrpc_secret = secrets.token_hex(32)
        self._login, self._passcode = f"run-{secrets.token_hex(4)}", secrets.token_hex(32)
        self._broker_port = broker_port.free()
        self._door: DoorEndpoint | None = None
        self._client: HostClient | None = None
        self._host_there = Event()
        self._failure: Exception | None = None
        self._patience = Patience(control.work_clock.seconds, START_PATIENCE_S)
        self._vm_ends: dict[str, VmEnd] = {}
        """What HostMain has said of the VMs that it ended."""
        self.on_hypervisor: Callable[[str], None] = lambda _name: None
        """Called with the name of the hypervisor that HostMain uses, as soon as it does."""
        self.failed = Event()
        """Set when a VMmanage task is beyond help; `raise_failure` says how the job ends."""
        self._ending = False

    def start(self) -> None:
        """Start all of them, in the order of the job file. Raises BadInput."""
        if sum(one.task.is_host_main for one in self._managed) != 1:
            raise BadInput(
                f"{self._source}: <VMmanage_task>: expected exactly one with the application HostMain for guest tasks"
            )
        commands = [self._command(one.task) for one in self._managed]  # all are looked at before one starts
        for one, command in zip(self._managed, commands, strict=True):
            self._start(one, *command)

    async def host(self) -> HostClient:
        """HostMain, as soon as it answers; waits for a restarted one. Raises SubTaskFailed, BadInput, TemporaryExit."""
        limit = HOST_MAIN_LIMIT_S
        while self._client is None:
            self.raise_failure()
            try:
                await with_limit(self._control.work_clock, limit, "HostMain", self._host_there.wait())
            except LimitReached as error:
                raise TemporaryExit(
                    f"HostMain did not say within {limit:g} s where it listens: look at the stdout and "
                    "stderr files of HostMain's VMmanage task",
                    fault="hostmain-start",
                    delay_s=LATER_S,
                ) from error
        self.raise_failure()
        return self._client

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def forgive_deaths(self) -> None:
        """The job has got further: only deaths in a row count."""
        for one in self._managed:
            one.deaths = 0

    @property
    def is_ending(self) -> bool:
        """Whether its programs are not needed any more: `end` was called."""
        return self._ending

    @property
    def running(self) -> bool:
        return any(one.held is not None and one.held.ended is None for one in self._managed)

    # --- starting

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            trees.RUN_MARK: self._process_list.token,
            "VMWRAPPER_SLOT": str(self._slot.folder),
            "VMWRAPPER_BROKER_PORT": str(self._broker_port),
            "VMWRAPPER_BROKER_LOGIN": self._login,
            "VMWRAPPER_BROKER_PASSCODE": self._passcode,
        }

    def _command(self, task: VmManageTask) -> tuple[list[str], dict[str, str]]:
        """The command line of a task and its environment. Raises BadInput when a file is missing."""
        words = commandline.resolve(commandline.split(task.command_line), self._names.resolve)
        environment = {**self._environment(), **task.variables}
        if not task.is_host_main:
            program = self._find_program(task)
            return kept_command([program, *words], KEPT_GRACE_S, environment)
        configuration = [word for word in words if Path(word).name != "HostMain.py"]
        if not configuration:
            raise self._bad_input(task, "command_line", "HostMain needs the name of its configuration file")
        try:
            fault = fault_of_input(self._names.source(configuration[0]), self._slot.folder)
        except LinkRefused as refused:
            fault = refused.why
        if fault:
            raise self._bad_input(task, "command_line", f"HostMain's configuration {configuration[0]} {fault}")
        own, extra = own_program("vmcontrol.hostmain", environment)
        if not task.stderr_filename:  # its log is stderr.txt, of which the client sends the last 63 KiB
            environment["VMWRAPPER_LOG_BYTES"] = str(HOSTMAIN_STORY_BYTES)
        environment |= {
            **extra,
            "VMWRAPPER_LIFELINE_FD": "3",
            "VMWRAPPER_STATUS_FD": "4",
            "VMWRAPPER_XMLRPC_SECRET": self._xmlrpc_secret,
            "VMWRAPPER_SECRET_FILE": str(self._slot.file(SECRET)),
            "VMWRAPPER_DISK_BOUND": str(int(self._disk_bound)),
        }
        if self._hypervisor != "auto":
            environment["VMWRAPPER_HYPERVISOR"] = self._hypervisor
        return [*(self._host_main_command or own), *configuration], environment

    def _find_program(self, task: VmManageTask) -> str:
        """The path of a program: a file of the slot by its logical name, else found on PATH. Raises BadInput."""
        path = self._slot.folder / self._names.resolve(task.application)
        if is_file(path):
            return str(path.absolute())
        if "/" not in task.application and (found := shutil.which(task.application)):
            return found
        neither = f"{task.application} is neither a file in the slot nor a program on PATH"
        raise self._bad_input(task, "application", f"{neither}; {what_is_there(self._slot.folder)}")

    def _bad_input(self, task: VmManageTask, element: str, text: str) -> BadInput:
        return BadInput(f"{self._place(task, element)}: {text}")

    def _place(self, task: VmManageTask, element: str) -> str:
        return f"{self._source}:{task.line}: <{element}>"

    def _start(self, one: _Managed, command: Sequence[str], environment: Mapping[str, str]) -> None:
        streams = self._streams(one)
        handed = self._new_door() if one.task.is_host_main else None
        if handed is not None:
            environment = {**environment, "VMWRAPPER_DOOR_FD": str(DOOR_FD)}
        one.over.clear()
        one.refusal, one.program_ended, one.stderr_begins = "", None, size_of(streams.stderr)
        try:
            one.held = start_held(
                self._reactor,
                one.name,
                command,
                folder=self._slot.folder,
                environment=environment,
                streams=streams,
                on_event=lambda event: self._on_event(one, event),
                on_end=lambda: self._on_end(one),
                door=handed,
            )
        except StreamError as error:
            raise self._bad_stream(one, error) from error
        except CannotStart as error:
            raise SubTaskFailed(f"{self._place(one.task, 'application')}: {one.name}: {error}") from error
        finally:
            if handed is not None:
                handed.close()
        role = Role.HOST_MAIN if one.task.is_host_main else Role.KEEPER
        with contextlib.suppress(OSError):  # the mark in the environment finds it as well
            self._process_list.add(role, one.held.pid, one.held.began)

    def _new_door(self) -> socket.socket | None:
        """Make the door to a HostMain that is about to start; its end. None: it is reached by its TCP port."""
        from vmcontrol.common import door  # late: a job without guest tasks never needs it

        self._close_door()
        try:
            ends = door.pair()
        except OSError as error:
            log.warning("no socket can be handed to HostMain (%s): its TCP port is used", error.strerror)
            return None
        if ends is None:
            return None
        self._door = door.DoorEndpoint(self._reactor, ends[0])
        return ends[1]

    def _close_door(self) -> None:
        if self._door is not None:
            self._door.close()
            self._door = None

    def _streams(self, one: _Managed) -> Streams:
        try:
            return streams_of(one.task, self._names)
        except StreamError as error:
            raise self._bad_stream(one, error) from error

    def _bad_stream(self, one: _Managed, error: StreamError) -> BadInput:
        there = f"; {what_is_there(self._slot.folder)}" if error.is_missing else ""
        return self._bad_input(one.task, error.element, f"{one.name}: {error}{there}")

    # --- watching

    def _on_event(self, one: _Managed, event: Mapping[str, Any]) -> None:
        match event:
            case {"event": "xmlrpc", "host": host, "port": int(port)} if one.task.is_host_main:
                from vmwrapper.vm.hostmain import HostClient

                door = self._door if event.get("door") else None
                self._client = HostClient(self._reactor, str(host), port, self._xmlrpc_secret, door=door)
                self._ready.reached(Requirement.HOST_MAIN)
                self._host_there.set()
            case {"event": "broker", "port": int(port)} if one.task.is_host_main:
                self._broker_port = port
            case {"event": "broker-connected"}:
                self._ready.reached(Requirement.BROKER)
            case {"event": "broker-lost", **rest}:
                log.warning("HostMain lost the broker: %s", rest.get("detail", ""))
                self._ready.gone(Requirement.BROKER)
            case {"event": "hypervisor", "detail": str(detail)} if one.task.is_host_main:
                log.info("hypervisor: %s", detail)
            case {"event": "vms-ended", "vms": vms} if one.task.is_host_main:
                # TERM and the end of its lifeline make it save, too: then this is all that is heard of it
                self._vm_ends |= vmends.read(vms)
            case {"event": "hypervisor-open", "name": str(name)} if one.task.is_host_main:
                self.on_hypervisor(name)
            case {"event": "failed", "detail": detail}:
                one.refusal = str(detail)
            case {"event": "ended", "status": status, "signal": number} if not one.task.is_host_main:
                one.program_ended = Ended(status, number)
            case _:
                log.debug("%s: %s", one.name, event)

    def _on_end(self, one: _Managed) -> None:
        held, one.held = one.held, None
        one.over.set()
        if held is not None:
            self._process_list.drop(held.pid)
        if one.task.is_host_main:
            self._client = None
            self._close_door()
            self._host_there.clear()
            self._ready.gone(Requirement.HOST_MAIN, Requirement.BROKER)
        if self._ending or self._control.ending is not None:
            return
        trees.end_orphans(self._process_list.token)
        if one.refusal:
            where = self._place(one.task, "application")
            self._fail(SubTaskFailed(f"{where}: {one.name} cannot be started: {one.refusal}"))
            return
        ended = one.program_ended or (held.ended if held is not None else None)
        if one.task.is_host_main and ended is not None and ended.status == HOST_MAIN_MAY_PASS:
            self._start_later(one)
            return
        log.error("%s died: it %s", one.name, ended)
        self._show_stderr(one)
        one.deaths += 1
        if one.task.is_host_main and ended is not None and ended.status == HOST_MAIN_REFUSED:
            words = f"HostMain refuses its configuration{self._last_words(one)}"
            self._fail(self._bad_input(one.task, "command_line", words))
        elif one.deaths > RESTART_LIMIT and not one.task.is_host_main and broker_port.is_taken(self._broker_port):
            words = f"{one.name} died {one.deaths} times: something else on this computer uses port {self._broker_port}"
            self._fail(TemporaryExit(words, fault="broker-port", delay_s=_PORT_DELAY_S))
        elif one.deaths > RESTART_LIMIT:
            story = f"{one.name} died {one.deaths} times, at last it {ended}{self._last_words(one)}"
            self._fail(SubTaskFailed(f"{self._place(one.task, 'VMmanage_task')}: {story}"))
        else:
            self._start_again(one)

    def _start_again(self, one: _Managed) -> None:
        if self._ending or self._control.ending is not None:
            return
        log.info("starting %s again", one.name)
        try:
            self._start(one, *self._command(one.task))
        except (BadInput, SubTaskFailed) as error:
            self._fail(error)

    def _start_later(self, one: _Managed) -> None:
        """HostMain could not begin here now: after a pause again, for a while; then the client tries later."""
        log.warning("HostMain cannot begin%s", self._last_words(one))
        pause_s = self._patience.next_pause_s()
        if pause_s is None:
            why = f"The part of this job that drives the virtual machine cannot begin{self._last_words(one)}"
            self._fail(TemporaryExit(why, fault="hostmain-start", delay_s=LATER_S))
        else:
            self._control.work_clock.callLater(pause_s, self._start_again, one)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self.failed.set()
        self._host_there.set()

    def _show_stderr(self, one: _Managed) -> None:
        quote(f"{one.name} stderr", self._stderr_tail(one))

    def _last_words(self, one: _Managed) -> str:
        """What it said last, as the end of a sentence; nothing when that went to our own stderr."""
        if not one.task.stderr_filename:
            return ""
        lines = self._stderr_tail(one)
        return f": {lines[-1]}" if lines else f": it wrote nothing to {one.task.stderr_filename}"

    def _stderr_tail(self, one: _Managed) -> list[str]:
        try:
            path = self._streams(one).stderr
        except BadInput:
            return []  # it has put a link in the place of its file
        return tail_of_file(path, since=one.stderr_begins) if path is not None else []

    # --- ending

    async def end(self, *, save: bool, limit_s: float = SAVE_LIMIT_S) -> Mapping[str, VmEnd]:
        """End them all, HostMain first, which saves its VMs or switches them off. What it says of each VM, by name.

        limit_s: for saving.
        """
        self._ending = True
        host_main = next((one for one in self._managed if one.task.is_host_main), None)
        if host_main is not None and host_main.held is not None:
            await self._end_host_main(host_main.held, limit_s if save else DROP_LIMIT_S, save=save)
        await DeferredList([start(self._end_kept(one)) for one in self._managed if one.held is not None])
        trees.end_orphans(self._process_list.token)
        return dict(self._vm_ends)

    async def _end_host_main(self, held: Held, limit: float, *, save: bool) -> None:
        done, end = False, self._reactor.seconds() + limit
        client = self._client
        if client is not None:
            try:
                self._vm_ends |= await client.shutdown(save=save, limit_s=limit)
                done = True
            except CancelledError:
                raise
            except Exception as error:  # noqa: BLE001 (whatever it is, the lifeline is next)
                log.warning("HostMain did not do its shutdown: %s", error)
        held.cut_lifeline()
        left_s = _PARTING_S if done else max(_PARTING_S, end - self._reactor.seconds())
        try:
            await with_limit(self._reactor, left_s, "HostMain's end", start(held.wait()))
        except LimitReached as error:
            log.warning("%s: it is killed", error)
            await trees.end_tree(self._reactor, held, grace_s=0)

    async def _end_kept(self, one: _Managed) -> None:
        held = one.held
        if held is None:
            return
        held.cut_lifeline()
        try:
            await with_limit(self._reactor, KEPT_GRACE_S + 3.0, f"the end of {one.name}", one.over.wait())
        except LimitReached as error:
            log.warning("%s: it is killed", error)
            await trees.end_tree(self._reactor, held, grace_s=0)


def _name(task: VmManageTask) -> str:
    return "HostMain" if task.is_host_main else Path(task.application).name


def make_secret(slot: Slot, *, anew: bool) -> None:
    """The secret of the link with the guest: once per slot and result, for a restored guest knows no other one."""
    path = slot.file(SECRET)
    if anew or not is_file(path) or path.is_symlink():
        write_atomically(path, secrets.token_hex(32).encode(), mode=0o600)
