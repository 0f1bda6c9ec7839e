"""The XML-RPC methods of 2009, with their names, arguments and results (docs/reference/xml-rpc.md)."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from twisted.python.failure import Failure

from vmcontrol.api.arguments import (
    BadArgument,
    OptionalText,
    ShortText,
    Text,
    Vm,
    argument_list,
    environment,
    optional,
    seconds,
    text,
    working_folder,
)
from vmcontrol.api.calls import exposed, waits
from vmcontrol.api.details import Details
from vmcontrol.common import eventloop
from vmcontrol.common.eventloop import LimitReached
from vmcontrol.guests.command import Command
from vmcontrol.guests.conversation import Conversation
from vmcontrol.guests.outputs import output_text
from vmcontrol.guests.registry import Guest
from vmcontrol.guests.repeater import Dropped, NoAnswer
from vmcontrol.guests.vms import GuestSilent, Machines
from vmcontrol.hypervisors.interface import VmNotFound
from vmcontrol.link.errors import LinkError
from vmcontrol.protocol import messages
from vmcontrol.protocol.vm import VmSettings
from vmcontrol.protocol.xmltext import LongText, cut_text
from vmcontrol.transfer.interface import TransferError

log = logging.getLogger(__name__)

RUN_LIMIT_S = 3600.0
"""Seconds of a VM that is not paused, for which a CMD_RUN of runCmd is repeated; its caller has its answer long before.
Then the command has failed."""


class MethodsV1:
    """Calls Machines and Commands, and shapes the answers."""

    def __init__(self, machines: Machines, conversation: Conversation, slot: Path, details: Details) -> None:
        self._machines = machines
        self._conversation = conversation
        self._commands = conversation.commands
        self._slot = slot
        self._details = details

    # VMs

    @exposed
    async def start(self, vm: Vm) -> None:
        """Start a VM that is off, or resume one that is saved. Returns when it runs."""
        await self._machines.start(vm)

    @exposed
    async def powerOff(self, vm: Vm) -> None:  # noqa: N802
        """Pull the plug. A saved state is discarded."""
        await self._machines.power_off(vm)

    @exposed
    async def pause(self, vm: Vm) -> None:
        """Stop its clock."""
        await self._machines.pause(vm)

    @exposed
    async def unpause(self, vm: Vm) -> None:
        """Let it go on."""
        await self._machines.unpause(vm)

    @exposed
    async def saveState(self, vm: Vm) -> None:  # noqa: N802
        """Write the VM's memory to disk and end it; `start` resumes it."""
        await self._machines.save_state(vm)

    @exposed
    async def getState(self, vm: Vm) -> str:  # noqa: N802
        """VirtualBox's name of the state: PoweredOff, Saved, Running, Paused, Aborted, ..."""
        return (await self._machines.state(vm)).value

    @exposed
    async def saveSnapshot(self, vm: Vm, name: ShortText, desc: Text = "") -> None:  # noqa: N802
        """Take a snapshot of memory and disk; the VM goes on."""
        await self._machines.save_snapshot(vm, name, desc)

    @exposed
    async def restoreSnapshot(self, vm: Vm, snapshot: OptionalText = "") -> None:  # noqa: N802
        """Take a VM that is not live back to a snapshot; without a name, as in 2009, to the current one."""
        await self._machines.restore_snapshot(vm, snapshot or None)

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
    async def getPerformanceData(self, vm: Vm) -> dict[str, float]:  # noqa: N802
        """The hypervisor's figures: cpu_time_s, memory_bytes, disk_bytes."""
        return await (await self._machines.ready()).performance(vm)

    @exposed
    async def createVM(self, name: ShortText, hddImagePath: Text) -> list[object]:  # noqa: N802, N803
        """Make a VM with default settings on a disk image, which is only read. Fails if the name exists."""
        await self._machines.create(name, hddImagePath, VmSettings())
        return [True, name]

    # Commands

    @exposed
    async def runCmd(  # noqa: N802, PLR0917 (as in 2009)
        self,
        vm: object,
        cmd: Text,
        args: object = (),
        env: object = None,
        path: object = None,
        fileForStdin: OptionalText = "",  # noqa: N803
    ) -> str:
        """Run a command in the guest; answers its id at once.

        `vm` may be a pattern over ids, such as 08:00:27:*: then in every registered guest that it fits, with one id.
        """
        to, guests = await self._addressed(text(vm, "name of the VM", 256))
        run = messages.CommandRun(
            to=to,
            id=str(uuid.uuid4()),
            command=cmd,
            arguments=argument_list(args),
            environment=environment(env),
            folder=working_folder(path),
            stdin=fileForStdin or "",
        )
        self._details.keep(run, args, env, path)
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
    async def ping(self, vm: Vm, timeout_secs: object = 5.0) -> str:
        """Have the agent answer."""
        limit = seconds(float(timeout_secs) if isinstance(timeout_secs, str) else timeout_secs, "timeout_secs")
        try:
            await self._conversation.ping(await self._machines.id_of(vm), limit)
        except LimitReached as error:
            raise BadArgument(f"PING timeout (for {vm})") from error
        return f"PONG from {vm}"

    @exposed
    async def listFinishedCmds(self) -> list[str]:  # noqa: N802
        """Ids of the commands whose results wait."""
        return self._commands.finished()

    @waits
    async def getCmdResults(self, cmdId: Text) -> object:  # noqa: N802, N803
        """The result of a command, which leaves the list of finished ones; an empty text if there is none.

        A command that went to many guests is in that list once for each; each call answers the next one's result.
        """
        command = self._commands.waiting_result(cmdId)
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
    async def getCmdDetails(self, cmdId: Text) -> str:  # noqa: N802, N803
        """JSON text of the request; null if it is not known."""
        return self._details.get(cmdId)

    # Files

    @waits
    async def cpFileToVM(self, vm: Vm, local: Text, remote: OptionalText = None) -> list[object]:  # noqa: N802
        """Copy a file into the guest: [stdout, stderr, exit status]. Without `remote`, its base name."""
        await self._check_registered(vm)
        source = self._slot / local
        return await self._copy(lambda: self._machines.files(vm).put(source, remote or source.name))

    @waits
    async def cpFileFromVM(self, vm: Vm, remote: Text, local: object = None) -> list[object]:  # noqa: N802
        """Copy a file out of the guest: [stdout, stderr, exit status]. Without `local`, its base name."""
        await self._check_registered(vm)
        target = self._slot / (optional(local, "local") or Path(remote).name)
        return await self._copy(lambda: self._machines.files(vm).get(remote, target))

    # What the methods share

    async def _copy(self, copy: Callable[[], Awaitable[object]]) -> list[object]:
        try:
            await copy()
        except (TransferError, LinkError, GuestSilent, OSError) as error:
            if isinstance(error, TransferError) and error.program_result is not None:
                return list(error.program_result)
            return ["", f"{error}\n", 1]
        return ["", "", 0]

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

    async def _check_registered(self, vm: str) -> None:
        if self._registered(await self._machines.id_of(vm)) is None:
            raise BadArgument(f"Unregistered VM: {vm}")

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
