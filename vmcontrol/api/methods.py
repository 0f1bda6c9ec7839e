"""HostMain's newer XML-RPC methods: what the wrapper needs beside those of the original.

Described in docs/reference/xml-rpc.md.

Each answers when something has happened, instead of being asked again and again. Times in seconds, sizes in bytes,
keys in snake_case. `to_fault` of `vmcontrol.api.methods_v1` gives their faults.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vmcontrol import __version__
from vmcontrol.api.arguments import BadArgument, argument_list, environment, optional, seconds, text, whole
from vmcontrol.api.methods_v1 import MethodsV1, exposed, waits
from vmcontrol.guests.conversation import Conversation
from vmcontrol.guests.vms import GuestSilent, Machines
from vmcontrol.hypervisors.interface import SpecRefused, VmExists
from vmcontrol.link.errors import LinkError
from vmcontrol.protocol import messages, vmlimits
from vmcontrol.protocol.handshake import AGENT_PORT
from vmcontrol.protocol.text import unfit_for_header
from vmcontrol.protocol.vm import NETWORK_MODES, PortForward
from vmcontrol.protocol.vmends import VmEnd

log = logging.getLogger(__name__)

ANSWER_LIMIT_S = 20.0
"""Seconds that an agent has to answer; the wrapper waits 30 s for our answer."""
POLL_LIMIT_S = 3600.0
"""The longest time-out of a call that waits."""


class Api(MethodsV1):
    """All methods."""

    def __init__(
        self,
        *,
        machines: Machines,
        conversation: Conversation,
        slot: Path,
        secret_file: Path,
        broker_kind: str,
        end_vms: Callable[[bool], Awaitable[list[VmEnd]]],
        on_shutdown: Callable[[], None],
    ) -> None:
        """end_vms: save (True) or switch off all VMs of this HostMain; what became of each.

        on_shutdown: called when `shutdown` is about to answer; the answer must still leave.
        """
        super().__init__(machines=machines, conversation=conversation, slot=slot, secret_file=secret_file)
        self._broker_kind = broker_kind
        self._end_vms = end_vms
        self._on_shutdown = on_shutdown

    # VMs

    @exposed
    async def defineVM(self, name: object, image: object, settings: object = None) -> bool:  # noqa: N802
        """Make a VM on a disk image, which is only read. True: made now. False: it was there, and is left as it is.

        settings: memory_mb, cpus, os_type, network, network_mode, port_forwards, remote_desktop; all may be left out.
        """
        spec = self._spec(name, image, **_settings(settings))
        hypervisor = await self._machines.ready()
        if spec.network_mode == "hostonly" and not hypervisor.capabilities.host_only_network:
            raise SpecRefused(f"network_mode: {hypervisor.name} has no host-only network")
        try:
            await hypervisor.create(spec)
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
    async def deleteVM(self, name: object) -> bool:  # noqa: N802
        """Remove a VM with all media that were made for it. True also if there is none."""
        await self._machines.delete(await self._vm(name))
        return True

    @exposed
    async def takeVM(self, name: object) -> bool:  # noqa: N802
        """Use a VM that was there before: its state is noted, other tasks of the computer keep off. Harmless again."""
        await self._machines.take(await self._vm(name))
        return True

    @exposed
    async def releaseVM(self, name: object) -> bool:  # noqa: N802
        """A VM that was taken is not needed any more: snapshots `vmwrapper_*` go, it is left Saved or off as it was."""
        await self._machines.release(await self._vm(name))
        return True

    @exposed
    async def getVMInfo(self, name: object) -> dict[str, object]:  # noqa: N802
        """state, id, pid (0: none), forwards, snapshots, current_snapshot, remote_desktop_address, vm_is_descendant,
        unusable (why nothing of a VM that is not live can be used any more; ""),
        trouble (why it is Aborted or Stuck), resumable (Stuck, and `unpause` tries to go on: nothing is lost)."""
        vm = await self._vm(name)
        hypervisor = await self._machines.ready()
        snapshots = tuple(await hypervisor.list_snapshots(vm))
        descendant = hypervisor.capabilities.vm_is_descendant
        info = await hypervisor.info(vm)
        return replace(info, snapshots=snapshots, vm_is_descendant=descendant).to_struct()

    @waits
    async def waitVM(self, name: object, states: object, timeout: object) -> str:  # noqa: N802
        """The VM's state, as soon as it is one of `states`, or at the time-out."""
        if isinstance(states, str):
            states = [states]
        if not isinstance(states, list):
            raise BadArgument("states: expected a list of states")
        wanted = [text(state, "states") for state in states]
        state = await self._machines.wait_state(await self._vm(name), wanted, seconds(timeout, "timeout", POLL_LIMIT_S))
        return str(state.value)

    @exposed
    async def listSnapshots(self, name: object) -> list[str]:  # noqa: N802
        """Names of a VM's snapshots."""
        return await (await self._machines.ready()).list_snapshots(await self._vm(name))

    @exposed
    async def deleteSnapshot(self, name: object, snapshot: object) -> bool:  # noqa: N802
        """Remove a snapshot. True also if there is none."""
        await (await self._machines.ready()).delete_snapshot(await self._vm(name), text(snapshot, "snapshot"))
        return True

    @exposed
    async def setNetwork(self, name: object, connected: object) -> bool:  # noqa: N802
        """Plug in, or pull, the network that the VM was granted. The way to the agent stays."""
        await (await self._machines.ready()).set_network(await self._vm(name), _flag(connected, "connected"))
        return True

    @exposed
    async def setCpuCap(self, name: object, percent: object) -> bool:  # noqa: N802
        """Limit the VM to a share of its CPUs, 1 to 100 %. False: this hypervisor cannot."""
        vm, share = await self._vm(name), _whole(percent, "percent", 1, 100)
        hypervisor = await self._machines.ready()
        if not hypervisor.capabilities.cpu_cap:
            return False
        await hypervisor.set_cpu_cap(vm, share)
        return True

    # Guests and commands

    @waits
    async def waitGuest(self, name: object, timeout: object) -> bool:  # noqa: N802
        """True as soon as the VM's agent is there and can be reached; False at the time-out."""
        limit = seconds(timeout, "timeout", POLL_LIMIT_S)
        return await self._machines.wait_guest(await self._vm(name), limit) is not None

    @waits
    async def waitSilent(self, name: object, silent: object, timeout: object) -> float:  # noqa: N802
        """For how long the agent has given no sign of life: as soon as that is `silent` seconds, or at the time-out.

        Time counts in which the VM ran and had a processor when it wanted one, and this program as well.
        """
        limit = seconds(timeout, "timeout", POLL_LIMIT_S)
        wanted = seconds(silent, "silent", 24 * 3600.0)
        return round(await self._machines.wait_silent(await self._vm(name), wanted, limit), 3)

    @waits
    async def pingGuest(self, name: object, timeout: object, anew: object = False) -> bool:  # noqa: N802
        """Whether the agent answers within the time-out. anew: connections to it are dropped, and it is dialled."""
        limit = seconds(timeout, "timeout", POLL_LIMIT_S)
        return await self._machines.answers(await self._vm(name), limit, dial_anew=_flag(anew, "anew"))

    @waits
    async def getGuestUptime(self, name: object) -> float:  # noqa: N802
        """Seconds since the guest's boot, as its agent says. -1: it cannot be asked, or says no number."""
        vm = await self._vm(name)
        try:
            uptime = (await self._machines.link(vm).status()).get("uptime_s")
        except (GuestSilent, LinkError) as error:
            log.info("the uptime of %s is not known: %s", vm, error)
            return -1.0
        if isinstance(uptime, int | float) and math.isfinite(uptime) and 0 <= uptime < 1e9:
            return float(uptime)
        return -1.0

    @waits
    async def runCommand(self, name: object, request: object) -> dict[str, object]:  # noqa: N802
        """Have the agent run a command; answers when the agent has acknowledged it. Repeating the call is harmless.

        request: id, command; attempt, arguments, environment, folder, stdin, fraction_done_file may be left out.
        """
        asked = _request(request, "")
        guest = await self._machines.guest(await self._vm(name), ANSWER_LIMIT_S)
        run = replace(asked, to=guest.id)
        self._note(run, list(run.arguments), dict(run.environment), run.folder)
        return (await self._commands.run(guest, run, ANSWER_LIMIT_S)).status.to_struct()

    @waits
    async def waitCommand(  # noqa: N802
        self,
        name: object,
        id: object,
        version: object,
        timeout: object,
    ) -> dict[str, object]:
        """What is known of a command, as soon as its version is not `version`, or at the time-out."""
        command, seen = _id(id), _whole(version, "version", 0, 2**31 - 1)
        limit = seconds(timeout, "timeout", POLL_LIMIT_S)
        vm_id = await self._machines.id_of(await self._vm(name))
        return (await self._commands.wait(vm_id, command, seen, limit)).status.to_struct()

    @waits
    async def queryCommand(self, name: object, id: object) -> dict[str, object]:  # noqa: N802
        """Ask the agent what it knows of a command."""
        command = _id(id)
        guest = await self._machines.guest(await self._vm(name), ANSWER_LIMIT_S)
        return (await self._commands.query(guest, command, ANSWER_LIMIT_S)).status.to_struct()

    @waits
    async def listCommands(self, name: object) -> list[dict[str, object]]:  # noqa: N802
        """Ask the agent for all commands that it knows."""
        guest = await self._machines.guest(await self._vm(name), ANSWER_LIMIT_S)
        return [status.to_struct() for status in await self._commands.table(guest, ANSWER_LIMIT_S)]

    @waits
    async def cancelCommand(self, name: object, id: object, grace: object = 5.0) -> dict[str, object]:  # noqa: N802
        """Have the agent end a command (TERM to its whole tree, KILL after `grace`). It then has a result like any."""
        command, grace_s = _id(id), seconds(grace, "grace", 3600.0)
        guest = await self._machines.guest(await self._vm(name), ANSWER_LIMIT_S)
        return (await self._commands.cancel(guest, command, grace_s, ANSWER_LIMIT_S)).status.to_struct()

    @waits
    async def acknowledgeResult(self, name: object, id: object) -> bool:  # noqa: N802
        """The result is safe with the caller: the agent forgets the command. True when it has confirmed that."""
        command = _id(id)
        guest = await self._machines.guest(await self._vm(name), ANSWER_LIMIT_S)
        await self._commands.acknowledge(guest, command, ANSWER_LIMIT_S)
        return True

    # Files

    @waits
    async def putFile(self, name: object, local: object, remote: object) -> dict[str, object]:  # noqa: N802
        """Copy a file into the guest: size, sha256, seconds."""
        source = self._local(local)
        result = await self._machines.files(await self._vm(name)).put(source, text(remote, "remote") or source.name)
        return {"size": result.size, "sha256": result.sha256, "seconds": result.seconds}

    @waits
    async def getFile(  # noqa: N802
        self, name: object, remote: object, local: object, most: object = None
    ) -> dict[str, object]:
        """Copy a file out of the guest: size, sha256, seconds. A file of more than `most` bytes is not copied."""
        target = self._local(local)
        limit = None if most is None else whole(most, "most", 2**31 - 1)
        result = await self._machines.files(await self._vm(name)).get(text(remote, "remote"), target, most=limit)
        return {"size": result.size, "sha256": result.sha256, "seconds": result.seconds}

    @waits
    async def listFiles(self, name: object, folder: object = "") -> list[dict[str, object]]:  # noqa: N802
        """What is in a folder of the guest: name, size, folder (whether it is one)."""
        link = self._machines.link(await self._vm(name))
        return await link.list_folder(text(folder, "folder"))

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
    async def shutdown(self, save: object = True) -> list[dict[str, object]]:
        """Save (or power off) every live VM that this HostMain has started, answer what became of each, and end.

        One struct a VM: name, outcome (saved, off, failed), reason (why it failed), key (of the computer's trouble).
        """
        ends = await self._end_vms(_flag(save, "save"))
        self._on_shutdown()
        return [end.to_struct() for end in ends]


def _flag(value: object, what: str) -> bool:
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise BadArgument(f"{what}: expected true or false, got {value!r:.80}")


def _whole(value: object, what: str, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BadArgument(f"{what}: expected a whole number from {least} to {most}, got {value!r:.80}")
    return value


def _id(value: object) -> str:
    id = text(value, "id", 200)
    if not id or unfit_for_header(id):
        raise BadArgument("id: expected the id of a command, without control characters and without blanks at its ends")
    return id


_SETTINGS: Mapping[str, Callable[[object], object]] = {
    "memory_mb": lambda value: _whole(value, "memory_mb", vmlimits.MEMORY_MB[0], vmlimits.MEMORY_MB[-1]),
    "cpus": lambda value: _whole(value, "cpus", 1, vmlimits.MOST_CPUS),
    "os_type": lambda value: text(value, "os_type", 100),
    "network": lambda value: _flag(value, "network"),
    "network_mode": lambda value: _one_of(value, "network_mode", NETWORK_MODES),
    "port_forwards": lambda value: _forwards(value),  # noqa: PLW0108 (defined below)
    "remote_desktop": lambda value: _flag(value, "remote_desktop"),
}


def _one_of(value: object, what: str, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise BadArgument(f"{what}: expected one of {', '.join(choices)}, got {value!r:.80}")
    return value


def _settings(value: object) -> dict[str, Any]:
    """The settings of a VM as arguments of VmSpec."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadArgument("settings: expected a struct")
    unknown = [key for key in value if key not in _SETTINGS]
    if unknown:
        raise BadArgument(f"settings: {unknown[0]!r:.80} is none; there are {', '.join(_SETTINGS)}")
    return {key: _SETTINGS[key](item) for key, item in value.items() if item is not None}


def _forwards(value: object) -> tuple[PortForward, ...]:
    if not isinstance(value, list):
        raise BadArgument("port_forwards: expected a list of structs")
    forwards: list[PortForward] = []
    for one in value:
        if not isinstance(one, Mapping) or not set(one) <= {"guest_port", "host_port", "remote"}:
            raise BadArgument("port_forwards: expected structs of guest_port, host_port, remote")
        guest_port = _whole(one.get("guest_port"), "guest_port", 1, 65535)
        if guest_port == AGENT_PORT:
            raise BadArgument(f"port_forwards: the guest's port {AGENT_PORT} is the agent's, which has its own forward")
        if guest_port in [forward.guest_port for forward in forwards]:
            raise BadArgument(f"port_forwards: the guest's port {guest_port} is there twice")
        forwards.append(
            PortForward(
                guest_port=guest_port,
                host_port=_whole(one.get("host_port") or 0, "host_port", 0, 65535),
                remote=_flag(one.get("remote") or False, "remote"),
            )
        )
    return tuple(forwards)


_REQUEST = ("id", "attempt", "command", "arguments", "environment", "folder", "stdin", "fraction_done_file")


def _request(value: object, guest: str) -> messages.CommandRun:
    if not isinstance(value, Mapping):
        raise BadArgument("request: expected a struct")
    unknown = [key for key in value if key not in _REQUEST]
    if unknown:
        raise BadArgument(f"request: {unknown[0]!r:.80} is none of its keys; there are {', '.join(_REQUEST)}")
    command = text(value.get("command"), "command")
    if not command:
        raise BadArgument("command: expected the program to run")
    attempt = value.get("attempt")
    return messages.CommandRun(
        to=guest,
        id=_id(value.get("id")),
        command=command,
        arguments=_plain_arguments(value.get("arguments")),
        environment=environment(value.get("environment")),
        folder=optional(value.get("folder"), "folder"),
        stdin=optional(value.get("stdin"), "stdin") or "",
        attempt=1 if attempt is None else _whole(attempt, "attempt", 1, 2**31 - 1),
        inline_output=False,
        fraction_done_file=optional(value.get("fraction_done_file"), "fraction_done_file") or "",
    )


def _plain_arguments(value: object) -> tuple[str, ...]:
    if value is not None and not isinstance(value, list):
        raise BadArgument("arguments: expected a list of texts")
    return argument_list(value)
