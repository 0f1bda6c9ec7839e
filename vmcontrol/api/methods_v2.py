"""HostMain's newer XML-RPC methods: what the wrapper needs beside those of 2009 (docs/reference/xml-rpc.md).

Each answers when something has happened, instead of being asked again and again. Times in seconds, sizes in bytes,
keys in snake_case.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from vmcontrol import __version__
from vmcontrol.api.arguments import (
    BadArgument,
    CommandId,
    Flag,
    ShortText,
    Text,
    Timeout,
    Vm,
    Whole,
    command_request,
    seconds,
    text,
    vm_settings,
    whole,
)
from vmcontrol.api.calls import exposed, waits
from vmcontrol.api.details import Details
from vmcontrol.guests.conversation import Conversation
from vmcontrol.guests.vms import GuestSilent, Machines
from vmcontrol.hypervisors.interface import VmExists
from vmcontrol.link.errors import LinkError
from vmcontrol.protocol import vmlimits
from vmcontrol.protocol.messages import CommandRun
from vmcontrol.protocol.vm import VmSettings
from vmcontrol.protocol.vmends import VmEnd
from vmcontrol.transfer.interface import TransferResult

log = logging.getLogger(__name__)

ANSWER_LIMIT_S = 20.0
"""Seconds that an agent has to answer; the wrapper waits 30 s for our answer."""

_DEFAULTS = VmSettings()


class MethodsV2:
    """Calls Machines and Commands, and shapes the answers."""

    def __init__(  # noqa: PLR0917 (of one caller)
        self,
        machines: Machines,
        conversation: Conversation,
        slot: Path,
        details: Details,
        broker_kind: str,
        end_vms: Callable[[bool], Awaitable[list[VmEnd]]],
        on_shutdown: Callable[[], None],
    ) -> None:
        """end_vms: save (True) or switch off all VMs of this HostMain; what became of each.

        on_shutdown: called when `shutdown` is about to answer; the answer must still leave.
        """
        self._machines = machines
        self._conversation = conversation
        self._commands = conversation.commands
        self._slot = slot
        self._details = details
        self._broker_kind = broker_kind
        self._end_vms = end_vms
        self._on_shutdown = on_shutdown

    # VMs

    @exposed
    async def defineVM(  # noqa: N802
        self, name: ShortText, image: Text, settings: Annotated[VmSettings, vm_settings] = _DEFAULTS
    ) -> bool:
        """Make a VM on a disk image, which is only read. True: made now. False: it was there, and is left as it is.

        settings: memory_mb, cpus, os_type, network, network_mode, port_forwards, remote_desktop, disks; all may be
        left out.
        """
        try:
            await self._machines.create(name, image, settings)
        except VmExists:
            return False
        return True

    @exposed
    async def getLimits(self) -> dict[str, object]:  # noqa: N802
        """What a VM can be given here: max_cpus, min_memory_mb, max_memory_mb."""
        most = await (await self._machines.ready()).max_cpus()
        memory = vmlimits.MEMORY_MB
        return {"max_cpus": most, "min_memory_mb": memory[0], "max_memory_mb": memory[-1]}

    @exposed
    async def deleteVM(self, name: Vm) -> None:  # noqa: N802
        """Remove a VM with all media that were made for it. True also if there is none."""
        await self._machines.delete(name)

    @exposed
    async def takeVM(self, name: Vm) -> None:  # noqa: N802
        """Use a VM that was there before: its state is noted, other tasks of the computer keep off. Harmless again."""
        await self._machines.take(name)

    @exposed
    async def releaseVM(self, name: Vm) -> None:  # noqa: N802
        """A VM that was taken is not needed any more: snapshots `vmwrapper_*` go, it is left Saved or off as it was."""
        await self._machines.release(name)

    @exposed
    async def getVMInfo(self, name: Vm) -> dict[str, object]:  # noqa: N802
        """state, id, pid (0: none), forwards, snapshots, current_snapshot, remote_desktop_address, vm_is_descendant,
        unusable (why nothing of a VM that is not live can be used any more; ""),
        trouble (why it is Aborted or Stuck), resumable (Stuck, and `unpause` tries to go on: nothing is lost)."""
        hypervisor = await self._machines.ready()
        snapshots = tuple(await hypervisor.list_snapshots(name))
        info = await hypervisor.info(name)
        descendant = hypervisor.capabilities.vm_is_descendant
        return replace(info, snapshots=snapshots, vm_is_descendant=descendant).to_struct()

    @waits
    async def waitVM(self, name: Vm, states: object, timeout: Timeout) -> str:  # noqa: N802
        """The VM's state, as soon as it is one of `states`, or at the time-out."""
        if isinstance(states, str):
            states = [states]
        if not isinstance(states, list):
            raise BadArgument("states: expected a list of states")
        wanted = [text(state, "states") for state in states]
        return (await self._machines.wait_state(name, wanted, timeout)).value

    @exposed
    async def listSnapshots(self, name: Vm) -> list[str]:  # noqa: N802
        """Names of a VM's snapshots."""
        return await (await self._machines.ready()).list_snapshots(name)

    @exposed
    async def deleteSnapshot(self, name: Vm, snapshot: Text) -> None:  # noqa: N802
        """Remove a snapshot. True also if there is none."""
        await (await self._machines.ready()).delete_snapshot(name, snapshot)

    @exposed
    async def setNetwork(self, name: Vm, connected: Flag) -> None:  # noqa: N802
        """Plug in, or pull, the network that the VM was granted. The way to the agent stays."""
        await (await self._machines.ready()).set_network(name, connected)

    @exposed
    async def setCpuCap(self, name: Vm, percent: object) -> bool:  # noqa: N802
        """Limit the VM to a share of its CPUs, 1 to 100 %. False: this hypervisor cannot."""
        share = whole(percent, "percent", 100, least=1)
        hypervisor = await self._machines.ready()
        if hypervisor.capabilities.cpu_cap:
            await hypervisor.set_cpu_cap(name, share)
        return hypervisor.capabilities.cpu_cap

    # Guests and commands

    @waits
    async def waitGuest(self, name: Vm, timeout: Timeout) -> bool:  # noqa: N802
        """True as soon as the VM's agent is there and can be reached; False at the time-out."""
        return await self._machines.wait_guest(name, timeout) is not None

    @waits
    async def waitSilent(self, name: Vm, silent: object, timeout: Timeout) -> float:  # noqa: N802
        """For how long the agent has given no sign of life: as soon as that is `silent` seconds, or at the time-out.

        Time counts in which the VM ran and had a processor when it wanted one, and this program as well.
        """
        wanted = seconds(silent, "silent", 24 * 3600.0)
        return round(await self._machines.wait_silent(name, wanted, timeout), 3)

    @waits
    async def pingGuest(self, name: Vm, timeout: Timeout, anew: Flag = False) -> bool:  # noqa: N802
        """Whether the agent answers within the time-out. anew: connections to it are dropped, and it is dialled."""
        return await self._machines.answers(name, timeout, dial_anew=anew)

    @waits
    async def getGuestUptime(self, name: Vm) -> float:  # noqa: N802
        """Seconds since the guest's boot, as its agent says. -1: it cannot be asked, or says no number."""
        try:
            uptime = (await self._machines.link(name).status()).get("uptime_s")
        except (GuestSilent, LinkError) as error:
            log.info("the uptime of %s is not known: %s", name, error)
            return -1.0
        if isinstance(uptime, int | float) and math.isfinite(uptime) and 0 <= uptime < 1e9:
            return float(uptime)
        return -1.0

    @waits
    async def runCommand(  # noqa: N802
        self, name: Vm, request: Annotated[CommandRun, command_request]
    ) -> dict[str, object]:
        """Have the agent run a command; answers when the agent has acknowledged it. Repeating the call is harmless.

        request: id, command; attempt, arguments, environment, folder, stdin, fraction_done_file, container may be left
        out.
        """
        guest = await self._machines.guest(name, ANSWER_LIMIT_S)
        run = replace(request, to=guest.id)
        self._details.keep(run, list(run.arguments), dict(run.environment), run.folder)
        return (await self._commands.run(guest, run, ANSWER_LIMIT_S)).status.to_struct()

    @waits
    async def waitCommand(  # noqa: N802
        self, name: Vm, id: CommandId, version: Whole, timeout: Timeout
    ) -> dict[str, object]:
        """What is known of a command, as soon as its version is not `version`, or at the time-out."""
        guest = await self._machines.id_of(name)
        return (await self._commands.wait(guest, id, version, timeout)).status.to_struct()

    @waits
    async def queryCommand(self, name: Vm, id: CommandId) -> dict[str, object]:  # noqa: N802
        """Ask the agent what it knows of a command."""
        guest = await self._machines.guest(name, ANSWER_LIMIT_S)
        return (await self._commands.query(guest, id, ANSWER_LIMIT_S)).status.to_struct()

    @waits
    async def listCommands(self, name: Vm) -> list[dict[str, object]]:  # noqa: N802
        """Ask the agent for all commands that it knows."""
        guest = await self._machines.guest(name, ANSWER_LIMIT_S)
        return [status.to_struct() for status in await self._commands.table(guest, ANSWER_LIMIT_S)]

    @waits
    async def cancelCommand(self, name: Vm, id: CommandId, grace: object = 5.0) -> dict[str, object]:  # noqa: N802
        """Have the agent end a command (TERM to its whole tree, KILL after `grace`). It then has a result like any."""
        grace_s = seconds(grace, "grace", 3600.0)
        guest = await self._machines.guest(name, ANSWER_LIMIT_S)
        return (await self._commands.cancel(guest, id, grace_s, ANSWER_LIMIT_S)).status.to_struct()

    @waits
    async def acknowledgeResult(self, name: Vm, id: CommandId) -> None:  # noqa: N802
        """The result is safe with the caller: the agent forgets the command. True when it has confirmed that."""
        guest = await self._machines.guest(name, ANSWER_LIMIT_S)
        await self._commands.acknowledge(guest, id, ANSWER_LIMIT_S)

    # Files

    @waits
    async def putFile(self, name: Vm, local: Text, remote: Text) -> dict[str, object]:  # noqa: N802
        """Copy a file into the guest: size, sha256, seconds."""
        source = self._slot / local
        return _copied(await self._machines.files(name).put(source, remote or source.name))

    @waits
    async def getFile(  # noqa: N802
        self, name: Vm, remote: Text, local: Text, most: object = None
    ) -> dict[str, object]:
        """Copy a file out of the guest: size, sha256, seconds. A file of more than `most` bytes is not copied."""
        limit = None if most is None else whole(most, "most")
        return _copied(await self._machines.files(name).get(remote, self._slot / local, most=limit))

    @waits
    async def listFiles(self, name: Vm, folder: Text = "") -> list[dict[str, object]]:  # noqa: N802
        """What is in a folder of the guest: name, size, folder (whether it is one)."""
        return await self._machines.link(name).list_folder(folder)

    # HostMain

    @exposed
    async def getStatus(self) -> dict[str, object]:  # noqa: N802
        """version, hypervisor, hypervisor_detail, broker (connected?), broker_kind, guests."""
        hypervisor, failure = self._machines.hypervisor, self._machines.failure
        detail = "" if failure is None else str(failure)
        if hypervisor is not None:
            detail = (await hypervisor.probe()).detail
        now = self._conversation.clock.seconds()
        return {
            "version": __version__,
            "hypervisor": "" if hypervisor is None else hypervisor.name,
            "hypervisor_detail": detail,
            "broker": self._conversation.connected,
            "broker_kind": self._broker_kind,
            "guests": [
                {
                    "id": g.id,
                    "ip": g.ip,
                    "protocol": g.protocol,
                    "agent": g.agent,
                    "here": g.confirmed,
                    "heard_s_ago": round(now - g.heard_at, 3),
                }
                for g in self._conversation.guests.all()
            ],
        }

    @exposed
    async def shutdown(self, save: Flag = True) -> list[dict[str, object]]:
        """Save (or power off) every live VM that this HostMain has started, answer what became of each, and end.

        One struct a VM: name, outcome (saved, off, failed), reason (why it failed), key (of the computer's trouble).
        """
        ends = await self._end_vms(save)
        self._on_shutdown()
        return [end.to_struct() for end in ends]


def _copied(result: TransferResult) -> dict[str, object]:
    return {"size": result.size, "sha256": result.sha256, "seconds": result.seconds}
