"""VMmanage tasks: HostMain, the broker and what else the guest tasks need beside them; started, watched, ended.

Owns the secrets of the run, and the connection to HostMain. Never touches a VM itself.

Restarts: a broker or a foreign task that dies is started again at once (HostMain and the agents reconnect by
themselves). A HostMain that dies is started again too; under QEMU its VMs died with it, and the guest task then goes
back to the newest consistent state. More than RESTART_LIMIT deaths of one task without a snapshot or a finished task
between them end the job: 208.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from twisted.internet.defer import CancelledError, DeferredList

from vmcontrol.common.atomicfile import write_atomically
from vmcontrol.common.eventloop import Event, LimitReached, start, with_limit
from vmcontrol.common.slotfiles import SECRET
from vmcontrol.protocol import vmends
from vmcontrol.protocol.vmends import VmEnd
from vmwrapper.context.context import JobContext
from vmwrapper.context.readiness import Requirement
from vmwrapper.context.waiting import Patience
from vmwrapper.errors import BadInput, SubTaskFailed, TemporaryExit, translate_os_errors
from vmwrapper.paths import is_file
from vmwrapper.process.ending import kill_program
from vmwrapper.process.orphans import RUN_MARK, become_subreaper, end_orphans
from vmwrapper.process.program import Ended
from vmwrapper.process.supervised import SupervisedProcess
from vmwrapper.vm import broker_port
from vmwrapper.vm.managed import Command, Managed

if TYPE_CHECKING:
    from vmcontrol.common.door import DoorEndpoint
    from vmwrapper.vm.hostmain import HostMainClient

RESTART_LIMIT = 3
HOST_MAIN_REFUSED = 2
"""HostMain's exit status when its arguments or its configuration are wrong (vmcontrol/hostmain/main.py)."""
HOST_MAIN_MAY_PASS = 3
"""The same when it could not begin for something of this computer: a port in use, a full disk."""
HOST_MAIN_LIMIT_S = 60.0
"""For HostMain to say where it listens: a second on an idle computer; a loaded one that has just booted is slow."""
START_PATIENCE_S = 45.0
"""For HOST_MAIN_MAY_PASS: less than `hostmain` waits, so that the reason becomes known."""
LATER_S = 300
"""Seconds until a computer that HostMain could not work on is tried again."""
SAVE_LIMIT_S = 45.0
"""For saving all VMs at a quit; the client kills everything 60 s after the message."""
DROP_LIMIT_S = 10.0
"""For switching VMs off when nothing has to be kept."""
HOSTMAIN_STORY_BYTES = 12 * 1024
"""Of HostMain's log, at each of its starts, where it has no file of its own."""
_PORT_DELAY_S = 60
"""The next run chooses another port, if it is ours to choose."""
_PARTING_S = 3.0
"""After its answer to shutdown, HostMain has only to exit."""

log = logging.getLogger(__name__)


class Services:
    """All VMmanage tasks of the job."""

    def __init__(self, context: JobContext, *, is_first_run: bool, host_main: Sequence[str] | None = None) -> None:
        """is_first_run: nothing of this job is in the slot yet. host_main: in place of our own HostMain (tests)."""
        self._context = context
        self._is_first_run = is_first_run
        self._host_main_command = list(host_main) if host_main else None
        self._managed = [Managed(context, task) for task in context.job.vmmanage_tasks]
        wanted = [task.guest.hypervisor for task in context.job.tasks if task.guest is not None]
        self._hypervisor = next((one for one in wanted if one != "auto"), "auto")
        self._xmlrpc_secret = secrets.token_hex(32)
        self._login, self._passcode = f"run-{secrets.token_hex(4)}", secrets.token_hex(32)
        self._broker_port = broker_port.free()
        self._door: DoorEndpoint | None = None
        self._client: HostMainClient | None = None
        self._host_there = Event()
        self._failure: Exception | None = None
        self._failed = Event()
        self._patience = Patience(context.control.work_clock.seconds, START_PATIENCE_S)
        self._vm_ends: dict[str, VmEnd] = {}
        """What HostMain has said of the VMs that it ended."""
        self._ending = False

    def start(self) -> None:
        """Start all of them, in the order of the job file. Raises BadInput, SubTaskFailed, TemporaryExit."""
        self._make_secret()
        if sum(one.task.is_host_main for one in self._managed) != 1:
            raise BadInput(
                f"{self._context.source}: <VMmanage_task>: expected exactly one with the application HostMain for"
                " guest tasks"
            )
        commands = [self._command(one) for one in self._managed]  # all are looked at before one starts
        for one, command in zip(self._managed, commands, strict=True):
            self._start(one, command)

    def _make_secret(self) -> None:
        """The secret of the link with the guest: once per slot and result, for a restored guest knows no other one."""
        path = self._context.slot.file(SECRET)
        with translate_os_errors("The slot cannot be written", fault="checkpoint-file"):
            if self._is_first_run or not is_file(path) or path.is_symlink():
                write_atomically(path, secrets.token_hex(32).encode(), mode=0o600)

    async def hostmain(self) -> HostMainClient:
        """HostMain, as soon as it answers; waits for a restarted one. Raises SubTaskFailed, BadInput, TemporaryExit."""
        clock, limit = self._context.control.work_clock, HOST_MAIN_LIMIT_S
        while self._client is None:
            self._raise_failure()
            try:
                await with_limit(clock, limit, "HostMain", self._host_there.wait())
            except LimitReached as error:
                raise TemporaryExit(
                    f"HostMain did not say within {limit:g} s where it listens: look at the stdout and stderr files of "
                    "HostMain's VMmanage task",
                    fault="hostmain-start",
                    delay_s=LATER_S,
                ) from error
        self._raise_failure()
        return self._client

    async def failure(self) -> NoReturn:
        """Wait until a VMmanage task is beyond help, and raise how the job ends."""
        await self._failed.wait()
        self._raise_failure()
        raise AssertionError

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    @property
    def is_ending(self) -> bool:
        """Whether its programs are not needed any more: `end` was called."""
        return self._ending

    @property
    def running(self) -> bool:
        return any(one.process is not None and one.process.ended is None for one in self._managed)

    # --- starting

    def _command(self, one: Managed) -> Command:
        """Raises BadInput when a file is missing."""
        environment = {
            **os.environ,
            RUN_MARK: self._context.process_list.token,
            "VMWRAPPER_SLOT": str(self._context.slot_folder),
            "VMWRAPPER_BROKER_PORT": str(self._broker_port),
            "VMWRAPPER_BROKER_LOGIN": self._login,
            "VMWRAPPER_BROKER_PASSCODE": self._passcode,
        }
        program, environment = one.command(environment, self._host_main_command)
        if one.task.is_host_main:
            environment |= {
                "VMWRAPPER_LIFELINE_FD": "3",
                "VMWRAPPER_STATUS_FD": "4",
                "VMWRAPPER_XMLRPC_SECRET": self._xmlrpc_secret,
                "VMWRAPPER_SECRET_FILE": str(self._context.slot.file(SECRET)),
                "VMWRAPPER_DISK_BOUND": str(int(self._context.init_data.rsc_disk_bound)),
            }
            if not one.task.stderr_filename:  # its log is stderr.txt, of which the client sends the last 63 KiB
                environment["VMWRAPPER_LOG_BYTES"] = str(HOSTMAIN_STORY_BYTES)
            if self._hypervisor != "auto":
                environment["VMWRAPPER_HYPERVISOR"] = self._hypervisor
        return program, environment

    def _start(self, one: Managed, command: Command) -> None:
        handed = self._new_door() if one.task.is_host_main else None
        try:
            one.start(command, on_event=self._on_event, on_end=self._on_end, door=handed)
        finally:
            if handed is not None:
                handed.close()

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
        self._door = door.DoorEndpoint(self._context.reactor, ends[0])
        return ends[1]

    def _close_door(self) -> None:
        if self._door is not None:
            self._door.close()
            self._door = None

    # --- watching

    def _on_event(self, one: Managed, event: Mapping[str, Any]) -> None:
        ready = self._context.ready
        match event:
            case {"event": "xmlrpc", "host": host, "port": int(port)} if one.task.is_host_main:
                from vmwrapper.vm.hostmain import HostMainClient

                door = self._door if event.get("door") else None
                self._client = HostMainClient(self._context.reactor, str(host), port, self._xmlrpc_secret, door=door)
                ready.reached(Requirement.HOST_MAIN)
                self._host_there.set()
            case {"event": "broker", "port": int(port)} if one.task.is_host_main:
                self._broker_port = port
            case {"event": "broker-connected"}:
                ready.reached(Requirement.BROKER)
            case {"event": "broker-lost", **rest}:
                log.warning("HostMain lost the broker: %s", rest.get("detail", ""))
                ready.gone(Requirement.BROKER)
            case {"event": "hypervisor", "detail": str(detail)} if one.task.is_host_main:
                log.info("hypervisor: %s", detail)
            case {"event": "vms-ended", "vms": vms} if one.task.is_host_main:
                # TERM and the end of its lifeline make it save, too: then this is all that is heard of it
                self._vm_ends |= vmends.read(vms)
            case {"event": "hypervisor-open", "name": str(name)} if one.task.is_host_main:
                if name != "VirtualBox":  # its service, if it was asked for its opinion, is somebody else's child now
                    become_subreaper()
            case {"event": "failed", "detail": detail}:
                one.refusal = str(detail)
            case {"event": "ended", "status": status, "signal": number} if not one.task.is_host_main:
                one.program_ended = Ended(status, number)
            case _:
                log.debug("%s: %s", one.name, event)

    def _on_end(self, one: Managed, process: SupervisedProcess | None) -> None:
        if one.task.is_host_main:
            self._client = None
            self._close_door()
            self._host_there.clear()
            self._context.ready.gone(Requirement.HOST_MAIN, Requirement.BROKER)
        if self._is_all_ending():
            return
        end_orphans(self._context.process_list.token)
        if one.refusal:
            where = one.place("application")
            self._fail(SubTaskFailed(f"{where}: {one.name} cannot be started: {one.refusal}"))
            return
        ended = one.program_ended or (process.ended if process is not None else None)
        if one.task.is_host_main and ended is not None and ended.status == HOST_MAIN_MAY_PASS:
            self._start_later(one)
            return
        log.error("%s died: it %s", one.name, ended)
        one.quote_stderr()
        deaths = one.deaths.add()
        if one.task.is_host_main and ended is not None and ended.status == HOST_MAIN_REFUSED:
            self._fail(one.bad_input("command_line", f"HostMain refuses its configuration{one.last_words()}"))
        elif deaths > RESTART_LIMIT and not one.task.is_host_main and broker_port.is_taken(self._broker_port):
            why = f"{one.name} died {deaths} times: something else on this computer uses port {self._broker_port}"
            self._fail(TemporaryExit(why, fault="broker-port", delay_s=_PORT_DELAY_S))
        elif deaths > RESTART_LIMIT:
            story = f"{one.name} died {deaths} times, at last it {ended}{one.last_words()}"
            self._fail(SubTaskFailed(f"{one.place('VMmanage_task')}: {story}"))
        else:
            self._start_again(one)

    def _is_all_ending(self) -> bool:
        return self._ending or self._context.control.ending is not None

    def _start_again(self, one: Managed) -> None:
        if self._is_all_ending():
            return
        log.info("starting %s again", one.name)
        try:
            self._start(one, self._command(one))
        except (BadInput, SubTaskFailed) as error:
            self._fail(error)

    def _start_later(self, one: Managed) -> None:
        """HostMain could not begin here now: after a pause again, for a while; then the client tries later."""
        log.warning("HostMain cannot begin%s", one.last_words())
        pause_s = self._patience.next_pause_s()
        if pause_s is None:
            why = f"The part of this job that drives the virtual machine cannot begin{one.last_words()}"
            self._fail(TemporaryExit(why, fault="hostmain-start", delay_s=LATER_S))
        else:
            self._context.control.work_clock.callLater(pause_s, self._start_again, one)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._failed.set()
        self._host_there.set()

    # --- ending

    async def end(self, *, save: bool, limit_s: float = SAVE_LIMIT_S) -> Mapping[str, VmEnd]:
        """End them all, HostMain first, which saves its VMs or switches them off. What it says of each VM, by name.

        limit_s: for saving.
        """
        self._ending = True
        host_main = next((one for one in self._managed if one.task.is_host_main), None)
        if host_main is not None and host_main.process is not None:
            await self._end_host_main(host_main.process, limit_s if save else DROP_LIMIT_S, save=save)
        await DeferredList([start(one.end()) for one in self._managed])
        end_orphans(self._context.process_list.token)
        return dict(self._vm_ends)

    async def _end_host_main(self, process: SupervisedProcess, limit: float, *, save: bool) -> None:
        reactor = self._context.reactor
        done, end = False, reactor.seconds() + limit
        if self._client is not None:
            try:
                self._vm_ends |= await self._client.shutdown(save=save, limit_s=limit)
                done = True
            except CancelledError:
                raise
            except Exception as error:  # noqa: BLE001 (whatever it is, the lifeline is next)
                log.warning("HostMain did not do its shutdown: %s", error)
        process.cut_lifeline()
        left_s = _PARTING_S if done else max(_PARTING_S, end - reactor.seconds())
        try:
            await with_limit(reactor, left_s, "HostMain's end", start(process.wait()))
        except LimitReached as error:
            log.warning("%s: it is killed", error)
            await kill_program(reactor, process)
