"""All XML-RPC methods of HostMain: those of 2009, the newer ones, and `help`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from vmcontrol.api.arguments import OptionalText
from vmcontrol.api.calls import Method, callable_method, exposed, functions_of, help_text
from vmcontrol.api.details import Details
from vmcontrol.api.methods_v1 import MethodsV1
from vmcontrol.api.methods_v2 import MethodsV2
from vmcontrol.guests.conversation import Conversation
from vmcontrol.guests.vms import Machines
from vmcontrol.protocol.vmends import VmEnd


class Api:
    """The methods of one HostMain."""

    def __init__(
        self,
        *,
        machines: Machines,
        conversation: Conversation,
        slot: Path,
        broker_kind: str,
        end_vms: Callable[[bool], Awaitable[list[VmEnd]]],
        on_shutdown: Callable[[], None],
    ) -> None:
        """end_vms, on_shutdown: see MethodsV2."""
        self._machines = machines
        details = Details()
        v1 = MethodsV1(machines, conversation, slot, details)
        v2 = MethodsV2(machines, conversation, slot, details, broker_kind, end_vms, on_shutdown)
        self._functions = functions_of(v1) | functions_of(v2) | functions_of(self)

    def methods(self) -> dict[str, Method]:
        """By name: functions that take arguments as they came."""
        name_of = self._machines.name_of
        return {name: callable_method(name, function, name_of) for name, function in self._functions.items()}

    @exposed
    async def help(self, methodName: OptionalText = None) -> str:  # noqa: N803 (the original's name)
        """Text about one method, or about all of them."""
        return help_text(self._functions, methodName or "")
