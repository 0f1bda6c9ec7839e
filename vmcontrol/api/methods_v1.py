"""The XML-RPC methods of the original, with their names, arguments, results and faults (docs/reference/xml-rpc.md).

Checks what callers send, asks Machines and Commands, shapes the answers. Nothing received is evaluated. The newer
methods are in `vmcontrol.api.methods`, which builds on this class.
"""

from __future__ import annotations

import errno
import inspect
import json
import logging
import time
import uuid
import xmlrpc.client
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from twisted.python.failure import Failure

from vmcontrol.api.arguments import (
    BadArgument,
    argument_list,
    environment,
    optional,
    seconds,
    text,
    working_folder,
)
from vmcontrol.common import eventloop
from vmcontrol.common.eventloop import LimitReached
from vmcontrol.common.slotfiles import GUEST_CONSOLE, VM_FOLDER
from vmcontrol.guests.command import Command
from vmcontrol.guests.commands import NotPossible
from vmcontrol.guests.conversation import Conversation
from vmcontrol.guests.outputs import output_text
from vmcontrol.guests.registry import Guest
from vmcontrol.guests.repeater import Dropped, NoAnswer
from vmcontrol.guests.vms import GuestSilent, Machines
from vmcontrol.hypervisors.interface import HostProblem, HypervisorError, SpecRefused, VmNotFound, VmSpec
from vmcontrol.link.errors import LinkError
from vmcontrol.protocol import messages
from vmcontrol.protocol.handshake import AGENT_PORT
from vmcontrol.protocol.xmltext import LongText, cut_text
from vmcontrol.transfer.interface import FileMissing, FileUnusable, LocalFileMissing, TransferError

log = logging.getLogger(__name__)

ERROR, TROUBLE, MISSING, SILENT, REFUSED = -1, 1, 2, 3, 4
"""Fault codes: the original's for all; the computer's trouble; a missing file; a silent guest; what can never be."""
RUN_LIMIT_S = 3600.0
"""Seconds of a VM that is not paused, for which a CMD_RUN of runCmd is repeated; its caller has its answer long before.
Then the command has failed."""
DETAILS_LIMIT, DETAILS_CHARACTERS = 1000, 4 * 1024 * 1024
"""Requests that getCmdDetails still knows, and their size together."""
NAME_LIMIT = 100
_DISK_FULL = ("disk-full", "the disk of this computer is full; free some space in BOINC's data folder", 600)
_NO_FILES = ("no-files", "this computer has too many files open; it will be tried again", 60)
TROUBLES: Mapping[int, tuple[str, str, int]] = {
    errno.ENOSPC: _DISK_FULL,
    getattr(errno, "EDQUOT", errno.ENOSPC): _DISK_FULL,
    errno.EMFILE: _NO_FILES,
    errno.ENFILE: _NO_FILES,
    errno.ENOMEM: ("no-memory", "this computer has not enough free memory; it will be tried again", 300),
    errno.EROFS: ("read-only", "BOINC's data folder cannot be written", 3600),
}
"""The computer's trouble as the system tells it: key, reason for the volunteer, seconds until a new try makes sense."""

M = TypeVar("M", bound=Callable[..., Awaitable[object]])


def exposed(method: M) -> M:
    """Mark a method as callable over XML-RPC under its own name."""
    method.exposed = True  # type: ignore[attr-defined]
    return method


def waits(method: M) -> M:
    """An exposed method that is given up when its caller goes away. Others go on: a VM must not stay half saved."""
    method.given_up = True  # type: ignore[attr-defined]
    return exposed(method)


def to_fault(error: Exception) -> xmlrpc.client.Fault:
    """The fault that a caller sees for an error."""
    cause = error.__cause__
    if isinstance(error, TransferError) and isinstance(cause, OSError) and cause.errno in TROUBLES:
        error = cause  # our disk, or what else this computer has not enough of
    match error:
        case HostProblem():
            trouble = {"key": error.key, "reason": error.reason, "delay_s": error.delay_s}
            return xmlrpc.client.Fault(TROUBLE, json.dumps(trouble))
        case FileMissing() | FileUnusable() | LocalFileMissing():
            return xmlrpc.client.Fault(MISSING, json.dumps(_missing(error)))
        case OSError(errno=int(number)) if number in TROUBLES:
            key, reason, delay_s = TROUBLES[number]
            where = f"{error.filename}: " if error.filename else ""
            trouble = {"key": key, "reason": f"{reason} ({where}{error.strerror})", "delay_s": delay_s}
            return xmlrpc.client.Fault(TROUBLE, json.dumps(trouble))
        case SpecRefused() | GuestSilent() | NoAnswer() | LinkError():
            return xmlrpc.client.Fault(REFUSED if isinstance(error, SpecRefused) else SILENT, str(error))
        case (
            BadArgument() | NotPossible() | HypervisorError() | TransferError() | LimitReached() | messages.BadMessage()
        ):
            return xmlrpc.client.Fault(ERROR, str(error))
    log.warning("an XML-RPC call failed: %s: %s", type(error).__name__, error, exc_info=error)
    return xmlrpc.client.Fault(ERROR, str(error) or type(error).__name__)


def _missing(error: FileMissing | FileUnusable | LocalFileMissing) -> dict[str, object]:
    """The text of fault 2, as an object."""
    value: dict[str, object] = {"path": str(error.path), "listing": []}
    if isinstance(error, FileMissing):
        value["listing"] = [entry.name + ("/" if entry.folder else "") for entry in error.listing]
    elif isinstance(error, FileUnusable):
        value["reason"] = error.reason
    return value


class MethodsV1:
    """The methods of the original."""

    def __init__(self, *, machines: Machines, conversation: Conversation, slot: Path, secret_file: Path) -> None:
        self._machines = machines
        self._conversation = conversation
        self._commands = conversation.commands
        self._slot = slot
        self._secret_file = secret_file
        self._details: OrderedDict[str, str] = OrderedDict()

    def methods(self) -> dict[str, Callable[..., Awaitable[object]]]:
        """Name -> function that checks the number of its arguments."""
        return {
            name: _counted(name, function)
            for name, function in inspect.getmembers(self, inspect.iscoroutinefunction)
            if getattr(function, "exposed", False)
        }

    @exposed
    async def help(self, methodName: object = None) -> str:  # noqa: N803 (the original's name)
        """Text about one method, or about all of them."""
        names = sorted(self.methods()) if not methodName else [text(methodName, "methodName")]
        parts = []
        for name in names:
            function: Any = getattr(self, name, None)
            if not getattr(function, "exposed", False):
                raise BadArgument(f"No such method: {name}")
            parts.append(f"{_usage(name, function)}:\n{inspect.getdoc(function) or ''}")
        return "\n\n".join(parts)

    # VMs

    @exposed
    async def start(self, vm: object) -> bool:
        """Start a VM that is off, or resume one that is saved. Returns when it runs."""
        await self._machines.start(await self._vm(vm))
        return True

    @exposed
    async def powerOff(self, vm: object) -> bool:  # noqa: N802
        """Pull the plug. A saved state is discarded."""
        await self._machines.power_off(await self._vm(vm))
        return True

    @exposed
    async def pause(self, vm: object) -> bool:
        """Stop its clock."""
        await self._machines.pause(await self._vm(vm))
        return True

    @exposed
    async def unpause(self, vm: object) -> bool:
        """Let it go on."""
        await self._machines.unpause(await self._vm(vm))
        return True

    @exposed
    async def saveState(self, vm: object) -> bool:  # noqa: N802
        """Write the VM's memory to disk and end it; `start` resumes it."""
        await self._machines.save_state(await self._vm(vm))
        return True

    @exposed
    async def getState(self, vm: object) -> str:  # noqa: N802
        """VirtualBox's name of the state: PoweredOff, Saved, Running, Paused, Aborted, ..."""
        name = await self._vm(vm)
        return str((await (await self._machines.ready()).state(name)).value)

    @exposed
    async def saveSnapshot(self, vm: object, name: object, desc: object = "") -> bool:  # noqa: N802
        """Take a snapshot of memory and disk; the VM goes on."""
        vm_name = await self._vm(vm)
        snapshot, description = text(name, "name", NAME_LIMIT), text(desc, "desc")
        await self._machines.save_snapshot(vm_name, snapshot, description)
        return True

    @exposed
    async def restoreSnapshot(self, vm: object, snapshot: object = "") -> bool:  # noqa: N802
        """Take a VM that is not live back to a snapshot; without a name, as in the original, to the current one."""
        await self._machines.restore_snapshot(await self._vm(vm), optional(snapshot, "snapshot"))
        return True

    @exposed
    async def listAvailableVMs(self) -> list[str]:  # noqa: N802
        """Names of all VMs."""
        return await (await self._machines.ready()).list_vms()

    @exposed
    async def listRunningVMs(self) -> list[str]:  # noqa: N802
        """Names of the VMs that run."""
        return await (await self._machines.ready()).list_running()

    @exposed
    async def listRegisteredVMs(self) -> list[str]:  # noqa: N802
        """Names of the VMs whose agents are there."""
        return await self._machines.registered()

    @exposed
    async def getNamesToIdsMapping(self) -> dict[str, str]:  # noqa: N802
        """VM name -> id (MAC, upper case with colons)."""
        return await self._machines.names_to_ids()

    @exposed
    async def getIdsToNamesMapping(self) -> dict[str, str]:  # noqa: N802
        """VM id -> name."""
        return {id: name for name, id in (await self._machines.names_to_ids()).items()}

    @exposed
    async def getPerformanceData(self, vm: object) -> dict[str, float]:  # noqa: N802
        """The hypervisor's figures: cpu_time_s, memory_bytes, disk_bytes."""
        name = await self._vm(vm)
        return await (await self._machines.ready()).performance(name)

    @exposed
    async def createVM(self, name: object, hddImagePath: object) -> list[object]:  # noqa: N802, N803
        """Make a VM with default settings on a disk image, which is only read. Fails if the name exists."""
        spec = self._spec(name, hddImagePath)
        await (await self._machines.ready()).create(spec)
        return [True, spec.name]

    # Commands

    @exposed
    async def runCmd(  # noqa: N802, PLR0917 (as in the original)
        self,
        vm: object,
        cmd: object,
        args: object = (),
        env: object = None,
        path: object = None,
        fileForStdin: object = "",  # noqa: N803
    ) -> str:
        """Run a command in the guest; answers its id at once.

        `vm` may be a pattern over ids, such as 08:00:27:*: then in every registered guest that it fits, with one id.
        """
        to, guests = await self._addressed(text(vm, "name of the VM", 256))
        run = messages.CommandRun(
            to=to,
            id=str(uuid.uuid4()),
            command=text(cmd, "cmd"),
            arguments=argument_list(args),
            environment=environment(env),
            folder=working_folder(path),
            stdin=optional(fileForStdin, "fileForStdin") or "",
        )
        self._note(run, args, env, path)
        for guest in guests:
            # to each by itself: each acknowledges it, and what one did not hear is repeated for that one
            fetched = guest.protocol >= 2 and self._machines.is_dialled(guest.id)
            to_one = replace(run, to=guest.id, inline_output=not fetched)
            clock = self._machines.clock_of(guest.id)
            running = eventloop.start(self._commands.run(guest, to_one, RUN_LIMIT_S, fetched=fetched, clock=clock))
            if guest.protocol < 2:
                await running  # sent once; if it could not be sent, the caller is told
            else:
                running.addErrback(self._not_run, guest.id, run.id)
        return run.id

    def _not_run(self, failure: Failure, guest: str, id: str) -> None:
        """A command of runCmd was not acknowledged: its caller, who has its answer, looks into the list of results."""
        log.warning("command %s: %s", id, failure.getErrorMessage())
        if failure.check(NoAnswer) and not failure.check(Dropped):
            self._commands.give_up(guest, id, f"it was not started: {failure.getErrorMessage()}")

    @waits
    async def ping(self, vm: object, timeout_secs: object = 5.0) -> str:
        """Have the agent answer."""
        limit = seconds(float(timeout_secs) if isinstance(timeout_secs, str) else timeout_secs, "timeout_secs")
        name = await self._vm(vm)
        try:
            await self._conversation.ping(await self._machines.id_of(name), limit)
        except LimitReached as error:
            raise BadArgument(f"PING timeout (for {name})") from error
        return f"PONG from {name}"

    @exposed
    async def listFinishedCmds(self) -> list[str]:  # noqa: N802
        """Ids of the commands whose results wait."""
        return self._commands.finished()

    @waits
    async def getCmdResults(self, cmdId: object) -> object:  # noqa: N802, N803
        """The result of a command, which leaves the list of finished ones; an empty text if there is none.

        A command that went to many guests is in that list once for each; each call answers the next one's result.
        """
        command = self._commands.waiting_result(text(cmdId, "cmdId"))
        if command is None or command.result is None:
            return ""
        await self._commands.complete(command)
        body = command.result
        result = {
            "out": await self._output(command, "out"),
            "err": await self._output(command, "err"),
            "finished": bool(body.get("finished")),
            "exitCodeOrSignal": body.get("exitCodeOrSignal", -1),
            "resources": body.get("resources") or {},
        }
        self._commands.take(command, self._registered(command.guest))
        return result

    @exposed
    async def getCmdDetails(self, cmdId: object) -> str:  # noqa: N802, N803
        """JSON text of the request; null if it is not known."""
        return self._details.get(text(cmdId, "cmdId"), "null")

    # Files

    @waits
    async def cpFileToVM(self, vm: object, local: object, remote: object = None) -> list[object]:  # noqa: N802
        """Copy a file into the guest: [stdout, stderr, exit status]. Without `remote`, its base name."""
        name = await self._registered_name(vm)
        source = self._local(local)
        return await self._copy(
            lambda: self._machines.files(name).put(source, optional(remote, "remote") or source.name)
        )

    @waits
    async def cpFileFromVM(self, vm: object, remote: object, local: object = None) -> list[object]:  # noqa: N802
        """Copy a file out of the guest: [stdout, stderr, exit status]. Without `local`, its base name."""
        name = await self._registered_name(vm)
        source = text(remote, "remote")
        target = self._local(optional(local, "local") or Path(source).name)
        return await self._copy(lambda: self._machines.files(name).get(source, target))

    # What the methods share

    async def _copy(self, copy: Callable[[], Awaitable[object]]) -> list[object]:
        try:
            await copy()
        except (TransferError, LinkError, GuestSilent, OSError) as error:
            if isinstance(error, TransferError) and error.program_result is not None:
                return list(error.program_result)
            return ["", f"{error}\n", 1]
        return ["", "", 0]

    async def _vm(self, vm: object) -> str:
        """The name of a VM that was given by name or id."""
        return await self._machines.name_of(text(vm, "name of the VM", 256))

    def _registered(self, id: str) -> Guest | None:
        return self._conversation.guests.get(id)

    async def _addressed(self, vm: str) -> tuple[str, list[Guest]]:
        """`to`, and the guests that it means: of one VM, by name or id, or of a pattern over ids."""
        try:
            name = await self._machines.name_of(vm)
            guest = self._registered(await self._machines.id_of(name))
        except VmNotFound:
            if not any(character in vm for character in "*?["):
                raise
            guests = [one for one in self._conversation.guests.all() if messages.addressed_to(vm, one.id)]
            if not guests:
                raise BadArgument(f"'{vm}' is not a registered VM.") from None
            return vm, guests
        if guest is None:
            raise BadArgument(f"'{name}' is not a registered VM.")
        return guest.id, [guest]

    async def _registered_name(self, vm: object) -> str:
        name = await self._vm(vm)
        if self._registered(await self._machines.id_of(name)) is None:
            raise BadArgument(f"Unregistered VM: {name}")
        return name

    def _local(self, path: object) -> Path:
        """A path on this computer; relative ones begin in the slot."""
        return self._slot / text(path, "path of the local file")

    def _spec(self, name: object, image: object, **settings: Any) -> VmSpec:
        vm_name = text(name, "name", NAME_LIMIT)
        if not vm_name or vm_name.startswith(".") or "/" in vm_name or "\\" in vm_name or not vm_name.isprintable():
            raise BadArgument(f"name: {vm_name!r} cannot be the name of a VM")
        path = self._slot / text(image, "image")
        if not path.is_file():
            raise BadArgument(f"image: {path} is no file")
        self._machines.secret()  # there must be one before a guest looks for it
        asked = tuple(settings.pop("port_forwards", ()))
        needed = [f for f in self._machines.needed_forwards if f.guest_port not in {a.guest_port for a in asked}]
        return VmSpec(
            name=vm_name,
            image=path,
            folder=self._slot / VM_FOLDER / vm_name,
            agent_port=AGENT_PORT,
            secret_file=self._secret_file,
            console_log=self._slot / GUEST_CONSOLE,
            port_forwards=(*asked, *needed),
            **settings,
        )

    def _note(self, run: messages.CommandRun, args: object, env: object, path: object) -> None:
        """Keep the request for getCmdDetails, as it came. Raises BadArgument if it cannot be sent."""
        try:
            messages.encode(run)
        except ValueError as error:
            raise BadArgument(str(error)) from error
        values = (time.time(), run.to, run.command, args, env, path, run.stdin)
        keys = ("timestamp", "to", "cmd", "args", "env", "path", "fileForStdin")
        self._details[run.id] = json.dumps(dict(zip(keys, values, strict=True)), default=str)
        while len(self._details) > DETAILS_LIMIT or sum(map(len, self._details.values())) > DETAILS_CHARACTERS:
            self._details.popitem(last=False)

    async def _output(self, command: Command, stream: str) -> str | LongText:
        """The text of a finished command's output; asked of the guest when it is a file there."""
        assert command.result is not None  # noqa: S101 (the caller looked)
        body = command.result
        inline = body.get(stream)
        path = body.get("stdout_path" if stream == "out" else "stderr_path")
        if command.fetched and isinstance(inline, str | LongText):
            return inline
        if command.inline or not isinstance(path, str) or not path:
            return cut_text(inline if isinstance(inline, str) else "")
        name = await self._machines.name_of(command.guest)
        return await output_text(self._machines.link(name), path)


def _counted(name: str, function: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
    signature = inspect.signature(function)

    async def call(*arguments: object) -> object:
        try:
            signature.bind(*arguments)
        except TypeError as error:
            raise BadArgument(f"{_usage(name, function)}: {error}") from None
        try:
            return await function(*arguments)
        except VmNotFound as error:
            vm = arguments[0] if arguments else ""
            raise BadArgument(f"No VM by the name/id {vm} found") from error

    call.given_up = getattr(function, "given_up", False)  # type: ignore[attr-defined]
    return call


def _usage(name: str, function: Callable[..., object]) -> str:
    parts: Sequence[str] = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in inspect.signature(function).parameters.values()
    ]
    return f"{name}({', '.join(parts)})"
