"""HostMain's XML-RPC methods as the wrapper uses them: typed, each call with a limit.

Owns no state but the address. Never repeats a call by itself: whether that is right is for the caller to know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from xmlrpc.client import Fault

from twisted.internet.defer import CancelledError
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.web import error as web_error

from vmcontrol.common.door import DoorEndpoint
from vmcontrol.common.eventloop import LimitReached, with_limit
from vmcontrol.common.httpclient import why_failed
from vmcontrol.protocol import vmends
from vmcontrol.protocol.command import CommandStatus
from vmcontrol.protocol.vm import VmInfo, VmSettings
from vmcontrol.protocol.vmends import VmEnd
from vmwrapper.vm.trouble import (
    CallFailed,
    GuestSilent,
    HostMainError,
    HostMainGone,
    HostMainSilent,
    HypervisorTrouble,
    MissingFile,
    Refused,
)
from vmwrapper.vm.xmlrpc_call import XmlRpc

USER = "vmwrapper"
SHORT_S = 30.0
"""For what HostMain answers by itself, or after asking the agent (which it repeats, up to its own limit)."""
VM_S = 7200.0
"""For what the hypervisor does to a VM: start, save, snapshot. Beyond every limit of the drivers, whose longest is for
starting a saved VM: 240 s, and its memory at 10 MiB a second (64 GiB: 6554 s). That HostMain is dead is seen by its
connection, and that it answers nothing by the short calls."""
TRANSFER_S = 24 * 3600.0
"""For one file. HostMain notices a transfer that stands still long before."""
LONG_POLL_S = 25.0
LONG_POLL_MARGIN_S = 15.0
CONNECT_S = 5.0


class HostMainClient:
    """The way to one HostMain: through its door, else to its TCP port. Every call has a connection of its own."""

    def __init__(self, reactor: Any, host: str, port: int, secret: str, *, door: DoorEndpoint | None = None) -> None:
        """host, port, secret: used without a door."""
        self._reactor = reactor
        if door is not None:
            self._methods = XmlRpc(reactor, door)
        else:
            endpoint = TCP4ClientEndpoint(reactor, host, port, timeout=CONNECT_S)
            self._methods = XmlRpc(reactor, endpoint, user=USER, password=secret)

    async def call(self, method: str, *arguments: object, limit_s: float = SHORT_S) -> Any:
        """Call any method. Raises HostMainErrors only (and CancelledError)."""
        try:
            return await with_limit(self._reactor, limit_s, method, self._methods.call(method, arguments))
        except LimitReached as error:
            raise HostMainSilent(f"HostMain: {error}") from error
        except Fault as error:
            raise _typed(method, error) from error
        except (web_error.Error, ValueError) as error:  # no answer of the method: it has too much to do, or is ending
            raise HostMainGone(f"{method}: HostMain could not answer: {error}") from error
        except CancelledError:
            raise
        except Exception as error:
            raise HostMainGone(f"{method}: no connection to HostMain: {why_failed(error)}") from error

    # --- VMs

    async def available(self) -> list[str]:
        return [str(name) for name in await self.call("listAvailableVMs")]

    async def define(self, name: str, image: str, settings: VmSettings) -> bool:
        """True: made now; False: it was there."""
        return bool(await self.call("defineVM", name, image, settings.to_struct(), limit_s=VM_S))

    async def max_cpus(self) -> int:
        """How many processors a VM can have with the hypervisor that is used."""
        return int((await self.call("getLimits"))["max_cpus"])

    async def delete(self, name: str) -> None:
        await self.call("deleteVM", name, limit_s=VM_S)

    async def take(self, name: str) -> None:
        """Of a VM that was there before the job."""
        await self.call("takeVM", name)

    async def release(self, name: str) -> None:
        """It is left as it was found."""
        await self.call("releaseVM", name, limit_s=VM_S)

    async def info(self, name: str) -> VmInfo:
        return VmInfo.from_struct(await self.call("getVMInfo", name))

    async def state(self, name: str) -> str:
        return str(await self.call("getState", name))

    async def wait_vm(self, name: str, states: Sequence[str], timeout_s: float = LONG_POLL_S) -> str:
        limit = timeout_s + LONG_POLL_MARGIN_S
        return str(await self.call("waitVM", name, list(states), timeout_s, limit_s=limit))

    async def start(self, name: str) -> None:
        await self.call("start", name, limit_s=VM_S)

    async def pause(self, name: str) -> None:
        await self.call("pause", name)

    async def unpause(self, name: str) -> None:
        await self.call("unpause", name)

    async def save_state(self, name: str) -> None:
        await self.call("saveState", name, limit_s=VM_S)

    async def power_off(self, name: str) -> None:
        await self.call("powerOff", name, limit_s=VM_S)

    async def save_snapshot(self, name: str, snapshot: str, description: str) -> None:
        await self.call("saveSnapshot", name, snapshot, description, limit_s=VM_S)

    async def restore_snapshot(self, name: str, snapshot: str) -> None:
        await self.call("restoreSnapshot", name, snapshot, limit_s=VM_S)

    async def delete_snapshot(self, name: str, snapshot: str) -> None:
        await self.call("deleteSnapshot", name, snapshot, limit_s=VM_S)

    async def set_network(self, name: str, *, connected: bool) -> None:
        await self.call("setNetwork", name, connected)

    async def set_cpu_cap(self, name: str, percent: int) -> bool:
        """False: this hypervisor cannot."""
        return bool(await self.call("setCpuCap", name, percent))

    async def performance(self, name: str) -> Mapping[str, float]:
        value = await self.call("getPerformanceData", name)
        if not isinstance(value, Mapping):
            return {}
        return {str(key): float(number) for key, number in value.items() if isinstance(number, int | float)}

    # --- guests

    async def wait_guest(self, name: str, timeout_s: float = LONG_POLL_S) -> bool:
        return bool(await self.call("waitGuest", name, timeout_s, limit_s=timeout_s + LONG_POLL_MARGIN_S))

    async def wait_silent(self, name: str, silent_s: float, timeout_s: float = LONG_POLL_S) -> float:
        """Seconds of silence of the guest that count, as soon as they are `silent_s`, or at the time-out."""
        limit = timeout_s + LONG_POLL_MARGIN_S
        return float(await self.call("waitSilent", name, silent_s, timeout_s, limit_s=limit))

    async def ping_guest(self, name: str, timeout_s: float, *, anew: bool = False) -> bool:
        """Whether the agent answers. anew: over a new connection."""
        return bool(await self.call("pingGuest", name, timeout_s, anew, limit_s=timeout_s + LONG_POLL_MARGIN_S))

    async def guest_uptime(self, name: str) -> float | None:
        """Seconds since the guest's boot, as its agent says; None: it cannot be asked."""
        uptime = float(await self.call("getGuestUptime", name))
        return uptime if uptime >= 0 else None

    async def run(self, name: str, request: Mapping[str, object]) -> CommandStatus:
        return CommandStatus.from_struct(await self.call("runCommand", name, dict(request), limit_s=2 * SHORT_S))

    async def wait_command(self, name: str, id: str, version: int, timeout_s: float = LONG_POLL_S) -> CommandStatus:
        limit = timeout_s + LONG_POLL_MARGIN_S
        return CommandStatus.from_struct(await self.call("waitCommand", name, id, version, timeout_s, limit_s=limit))

    async def query(self, name: str, id: str) -> CommandStatus:
        return CommandStatus.from_struct(await self.call("queryCommand", name, id))

    async def commands(self, name: str) -> list[CommandStatus]:
        return [CommandStatus.from_struct(one) for one in await self.call("listCommands", name)]

    async def cancel(self, name: str, id: str, grace_s: float) -> CommandStatus:
        return CommandStatus.from_struct(await self.call("cancelCommand", name, id, grace_s, limit_s=SHORT_S + grace_s))

    async def acknowledge(self, name: str, id: str) -> None:
        await self.call("acknowledgeResult", name, id)

    async def file_sizes(self, name: str, folder: str) -> dict[str, int]:
        """Names and sizes of the files in a folder of the guest; "": the agent's own."""
        entries = await self.call("listFiles", name, folder)
        return {str(one["name"]): int(one.get("size") or 0) for one in entries if not one.get("folder")}

    async def put_file(self, name: str, local: str, remote: str) -> Mapping[str, Any]:
        return dict(await self.call("putFile", name, local, remote, limit_s=TRANSFER_S))

    async def get_file(self, name: str, remote: str, local: str, *, most: int | None = None) -> Mapping[str, Any]:
        """most: bytes; of a larger file nothing is copied (MissingFile, with a reason)."""
        limits = () if most is None else (most,)
        return dict(await self.call("getFile", name, remote, local, *limits, limit_s=TRANSFER_S))

    # --- HostMain itself

    async def status(self) -> Mapping[str, Any]:
        return dict(await self.call("getStatus"))

    async def shutdown(self, *, save: bool, limit_s: float) -> dict[str, VmEnd]:
        """What became of each VM that HostMain had to end, by name."""
        return vmends.read(await self.call("shutdown", save, limit_s=limit_s))


def _typed(method: str, fault: Fault) -> HostMainError:
    text = str(fault.faultString)
    try:
        if fault.faultCode == 1:
            value = json.loads(text)
            delay = value.get("delay_s")
            return HypervisorTrouble(
                str(value["reason"]), key=str(value["key"]), delay_s=None if delay is None else int(delay)
            )
        if fault.faultCode == 2:
            value = json.loads(text)
            listing = [str(one) for one in value.get("listing") or ()]
            return MissingFile(str(value["path"]), listing, str(value.get("reason") or ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        return CallFailed(f"{method}: {text}")
    if fault.faultCode == 4:
        return Refused(text)
    if fault.faultCode == 3:
        return GuestSilent(f"{method}: {text}")
    return CallFailed(f"{method}: {text}")
